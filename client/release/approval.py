"""Approval by a person: replies that rest on rows wait until someone at the site has agreed to their kind.

Agreement is for one run and backbone, and is remembered.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from fedhead.client.release.ledger import Entry, entry_of
from fedhead.client.release.payloads import Payloads
from fedhead.client.release.tuned import tuned_parameters, tunes
from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, home, locked, safe_name, write_atomically
from fedhead.protocol.actions import ACTIONS, INSTALL
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.steps import Release, Step
from fedhead.wording import one_line

logger = logging.getLogger(__name__)

Ask = Callable[[str], bool]
"""Shows a person what would leave, and returns whether they agree."""

Origin = Callable[[Manifest], str]
"""Returns in words where the site has a run's weights from."""


class Approval(BaseModel):
    """What a person agreed to.

    Attributes:
        when: in UTC.
        coordinator: the digest of its authority's certificate, or its address where it has none.
        run: the id of the run.
        action: the message to answer.
        backbone: the spec.
        digest: of the backbone, as the run claims it: spec, weights, layer and preprocessing.
        layer: of the backbone.
        weights: the digest of its weights. Empty in agreements of earlier versions, which agree to nothing.
        tune: the layers that the run tunes, as in `tune.layers`; empty for a head alone.
    """

    model_config = ConfigDict(frozen=True)

    when: AwareDatetime
    coordinator: str
    run: str
    action: str
    backbone: str
    digest: str
    layer: str = ""
    weights: str = ""
    tune: str = ""

    def covers(self, other: "Approval") -> bool:
        """Return whether this agrees to `other` too."""
        mine, its = (one.model_dump(exclude={"when"}) for one in (self, other))
        return mine == its


class _File(BaseModel):
    agreed: tuple[Approval, ...]


class Approvals(Step):
    """Lets a release pass if a person agreed to its kind for this run and backbone before, or agrees now.

    Args:
        path: where agreements are remembered.
        coordinator: the coordinator's identity: the digest of its key, or its address without one.
        ask: asks a person; None without one.
        payloads: where a release is written for the person to look at.
        data: the site's data spec.
        address: the coordinator's.
        origin: where the site has a backbone from.
    """

    per_site = True

    def __init__(
        self,
        path: Path,
        coordinator: str,
        ask: Ask | None,
        payloads: Payloads,
        *,
        data: str = "",
        address: str = "",
        origin: Origin = lambda manifest: "",
    ) -> None:
        self._path = path
        self._coordinator = coordinator
        self._ask = ask
        self._payloads = payloads
        self._data = data
        self._address = address
        self._origin = origin

    def leave(self, payload: Payload, release: Release) -> Payload:
        """Return the payload if it may leave.

        Raises:
            FedheadError: if nobody agreed, or the approvals on disk are damaged.
        """
        if release.basis is None:
            return payload
        assert release.manifest is not None
        wanted = self._approval(release.manifest, release.action)
        if self._remembers(wanted):
            return payload
        if self._ask is None:
            raise FedheadError(
                f"{release.site} releases {release.action} only after a person there has approved it for this run, and "
                "nobody can be asked: fedhead client --approve was started without a terminal."
            )
        entry, written = entry_of(payload, release), self._payloads.write(payload, release)
        described = self._described(release.manifest, release.action, tuned_parameters(payload))
        if not self._ask(described + _of_release(entry, self._data, written)):
            raise FedheadError(f"The operator of {release.site} did not approve {release.action}.")
        self._remember(wanted)
        return payload

    def describe(self) -> str:
        return "A person at the site approved each kind of reply for this run before the first one left."

    def agree(self, manifest: Manifest) -> bool:
        """Return whether a person agreed, or agrees now, to take unknown weights from the coordinator."""
        wanted = self._approval(manifest, INSTALL)
        if self._remembers(wanted):
            return True
        if self._ask is None or not self._ask(self._described(manifest, INSTALL) + _OF_WEIGHTS):
            return False
        self._remember(wanted)
        return True

    def _approval(self, manifest: Manifest, action: str) -> Approval:
        return Approval(
            when=datetime.now(UTC),
            coordinator=self._coordinator,
            run=manifest.run,
            action=action,
            backbone=manifest.backbone,
            digest=manifest.backbone_digest,
            layer=manifest.layer,
            weights=manifest.weights_digest,
            tune=tunes(manifest),
        )

    def _described(self, manifest: Manifest, action: str, tuned: int = 0) -> str:
        """Describe a request for a person.

        Args:
            manifest: of the run.
            action: the message to answer.
            tuned: the number of the backbone's parameters in the reply.
        """
        asked = ACTIONS[action]
        if action == INSTALL:
            origin = "unknown to this site"
        elif self._remembers(self._approval(manifest, INSTALL)):
            origin = "sent by the coordinator, agreed to by a person here"
        else:
            origin = self._origin(manifest)
        return _lines(
            {
                "coordinator": self._address,
                "run": manifest.run,
                "asks to": f"{asked.asks} ({action})",
                "backbone": f"{manifest.backbone}, layer {manifest.layer}",
                "weights": f"sha256:{manifest.weights_digest}",
                "": origin,
                **(
                    {"tunes": f"{tunes(manifest)}, which shows more of rows than a head alone"} if manifest.tune else {}
                ),
                "leaves": asked.tells + (f"; {tuned:,} trained parameters of the backbone" if tuned else ""),
            }
        )

    def _remembers(self, wanted: Approval) -> bool:
        return any(one.covers(wanted) for one in read_approvals(self._path))

    def _remember(self, agreed: Approval) -> None:
        # Read again: while a person was asked, others may have been revoked.
        with _changing(self._path) as before:
            _write(self._path, [*before, agreed])


_OF_WEIGHTS = """\
note         Whoever chooses the weights chooses which numbers of a row enter the sums. Agree only if you know these
             weights: fedhead backbones fetch SPEC --json prints the digest of those that the library publishes.
"""


def _of_release(entry: Entry, data: str, written: Path) -> str:
    classes = ", ".join(f"{one_line(name, 60)} {count}" for name, count in entry.classes.items()) or "none"
    return _lines(
        {
            "rows": f"{entry.rows} of {data}",
            "classes": one_line(classes, 2000),
            "bytes": f"{entry.bytes}, SHA-256 {entry.digest}",
            "look at": str(written),
        }
    )


def _lines(fields: dict[str, str]) -> str:
    return "".join(f"{name:12} {one_line(text, 2000)}\n" for name, text in fields.items() if text)


def approvals_path(site: str) -> Path:
    """Return where the approvals of a site are kept."""
    return home() / "sites" / safe_name(site) / "approvals.json"


def read_approvals(path: Path) -> list[Approval]:
    """Return the agreements, oldest first.

    Agreements of the form that knew neither run nor backbone are void.

    Raises:
        FedheadError: if the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "agreed" not in content:
            return []
        return list(_File.model_validate(content).agreed)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ValidationError) as error:
        logger.error("%s cannot be read: %s", path, error)
        raise FedheadError(
            "The site's approvals cannot be read, so nothing leaves it. Its operator can remove the file that the "
            "site's log names, and approve again."
        ) from None


def revoke(path: Path, numbers: Sequence[int]) -> list[Approval]:
    """Take back agreements, by their numbers from 1; return them. A running client asks again from the next reply on.

    Raises:
        UserError: if there is no such number.
        FedheadError: if the file is damaged.
    """
    known = read_approvals(path)
    for number in numbers:
        if not 1 <= number <= len(known):
            raise UserError(f"There is no approval {number}; there are {len(known)}.")
    revoked = [known[number - 1] for number in numbers]
    with _changing(path) as agreed:
        _write(path, [one for one in agreed if one not in revoked])
    return revoked


@contextmanager
def _changing(path: Path) -> Iterator[list[Approval]]:
    """Give the approvals to change; a site's clients for several coordinators, and revocations, take turns."""
    with disk_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            yield read_approvals(path)


def _write(path: Path, agreed: Sequence[Approval]) -> None:
    write_atomically(path, _File(agreed=tuple(agreed)).model_dump_json(indent=1) + "\n")
