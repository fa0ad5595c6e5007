"""Secure summation, the last release step: sums leave as ring elements under masks, or not at all."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from fedhead.client.release.secure_sessions import SecureSessions
from fedhead.errors import FedheadError
from fedhead.protocol.actions import ACTIONS, EVALUATE, GRADIENT, TRAIN
from fedhead.protocol.fields import Digest, wrong_fields
from fedhead.protocol.messages import Manifest, MessageError, Payload
from fedhead.protocol.steps import Masking, Release, Step
from fedhead.secure.replies import SUM, SiteNames, additive, purpose_of
from fedhead.sums.heads import TABLE, HeadSums
from fedhead.sums.sums import Arrays

if TYPE_CHECKING:
    from fedhead.client.site_data import Site


_PLAIN = (
    "sends sums only under secure summation ([privacy] require in its site.toml), and this run does not use it: set "
    "secure_sum = true under [privacy] in run.toml."
)


@dataclass(frozen=True)
class Asked:
    """A request for a masked reply.

    Attributes:
        action: the action.
        request: the message without the session.
        session: the session of secure summation that it belongs to.
        manifest: of the run.
    """

    action: str
    request: Payload
    session: Payload
    manifest: Manifest

    def sums(self, arrays: Arrays) -> Arrays:
        """Return the arrays of a reply as they add across sites: heads as changes weighted by rows."""
        if self.action not in (TRAIN, GRADIENT, EVALUATE):
            return additive(arrays)
        made = {name: array for name, array in arrays.items() if name != TABLE}
        base = self.request.arrays
        if self.action == GRADIENT:
            base = {name: np.zeros_like(array) for name, array in made.items()}
        return HeadSums(made, arrays[TABLE][0], base=base).to_arrays()


def masking_of(site: "Site", asked: Asked) -> Masking:
    """Return how a site masks its reply to a request.

    Raises:
        FedheadError: if it does not take part in the session.
    """
    own = site.masking(asked)
    return replace(own, encode=lambda arrays: own.encode(None if arrays is None else asked.sums(arrays)))


class _Session(BaseModel):
    """Values of the session of a request.

    Attributes:
        session: its id.
        opened: the sites that opened it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Digest
    opened: SiteNames


class SecureSum(Step):
    """Masks replies that are sums over rows, as the request's session says.

    Args:
        required: whether such replies leave under masks only.
        sessions: the site's secure sums; None if it has no roster, and cannot take part in one.
    """

    per_site: ClassVar[bool] = True

    def __init__(self, *, required: bool = False, sessions: SecureSessions | None = None) -> None:
        self.required = required
        self._sessions = sessions

    @property
    def sessions(self) -> SecureSessions:
        """The site's secure sums.

        Raises:
            FedheadError: if it has no roster.
        """
        if self._sessions is None:
            raise FedheadError(
                "This site takes no part in secure summation, because its kit has no accepted roster.toml. Ask the "
                "consortium's authority for the signed roster, and accept it: fedhead roster verify."
            )
        return self._sessions

    def check(self, manifest: Manifest) -> None:
        """Check that a run uses secure summation if the site requires it, and only if the site can take part.

        Raises:
            FedheadError: if not.
        """
        self._require(manifest)
        if manifest.secure_sum:
            _ = self.sessions

    def _require(self, manifest: Manifest) -> None:
        if self.required and not manifest.secure_sum:
            raise FedheadError(f"This site {_PLAIN}")

    def admit(self, action: str, manifest: Manifest, *, masked: bool) -> None:
        self._require(manifest)
        if manifest.secure_sum and ACTIONS[action].sums and not masked:
            raise FedheadError("This run uses secure summation, but the request for sums belongs to no secure sum.")

    def masking(self, asked: Asked) -> Masking:
        """Return how the site's own sums are masked for the session of a request.

        Raises:
            FedheadError: if the site takes no part in secure sums.
            MessageError: if the session has another form.
        """
        try:
            values = _Session(**asked.session.values)
        except (ValidationError, TypeError) as error:
            wrong = wrong_fields(error) if isinstance(error, ValidationError) else "its keys"
            raise MessageError(f"its session of secure summation is invalid ({wrong})") from None
        sessions, purpose = self.sessions, purpose_of(asked.manifest, asked.action, asked.request)

        def mask(arrays: Arrays | None) -> npt.NDArray[np.uint64]:
            reply = sessions.mask(values.session, purpose, values.opened, asked.session.arrays, lambda: arrays)
            masked: npt.NDArray[np.uint64] = reply["masked"]
            return masked

        return Masking(mask, sessions.threshold(values.session))

    def leave(self, payload: Payload, release: Release) -> Payload:
        """Return a payload with the masked vector only; other replies pass unchanged.

        Raises:
            FedheadError: if masks are required and the request has no session, or the site takes no part in it.
        """
        action = ACTIONS.get(release.action)
        if action is None or not action.sums or not (payload.arrays or release.failed):
            return payload
        if release.masking is None:
            if self.required:
                raise FedheadError(f"{release.site} {_PLAIN}")
            return payload
        return Payload({}, {SUM: release.masking.encode(None if release.failed else payload.arrays)})

    def applies(self, manifest: Manifest) -> bool:
        return manifest.secure_sum

    def conceals(self, manifest: Manifest) -> bool:
        return manifest.secure_sum and self._sessions is not None

    def describe(self) -> str:
        return (
            "Secure summation: each site's sums and heads were masked, so the coordinator learned their total over all "
            "sites only."
        )
