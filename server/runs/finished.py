"""A finished run whose sites can change: its state, and the one way to change it."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from fedhead.adaptation import adaptation_file
from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.config import RunConfig
from fedhead.devices import pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.foreign import foreign_file
from fedhead.files import locked_folder, write_atomically
from fedhead.heads import Head, make_head
from fedhead.model import BACKBONE_FILE
from fedhead.protocol.messages import Manifest
from fedhead.registry import suggest
from fedhead.server.report.card import write_card
from fedhead.server.runs.delivered import DeliveredModel
from fedhead.server.runs.examples import EXAMPLES
from fedhead.server.runs.folder import RunFolder
from fedhead.server.runs.membership import Measured, MembershipChange, has_contrast, total
from fedhead.server.runs.record import WORTH
from fedhead.server.runs.summary import RunSummary
from fedhead.server.site_sums import PARTS, Draft, Part, Record, SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for
from fedhead.tasks import Task, make_task, tasks
from fedhead.wording import MOST_NAMES, quoted

logger = logging.getLogger(__name__)

HISTORY = "membership.jsonl"
"""The file of a run folder with a line for each change."""


class FinishedRun:
    """A finished run, open for one change of membership.

    The index of its sums is the state; model, configuration, result and history follow from it. If a process is killed
    before all of them are written, they are written when the run is opened next.

    Args:
        path: the run folder, which the caller has locked; see `opened`.

    Raises:
        UserError: if the folder holds no finished run whose sites can change.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "run.toml").is_file():
            raise UserError(f"{path} is not a run folder: it has no run.toml.")
        self.path = path
        self.folder = RunFolder(path)
        self.config = RunConfig.from_toml(path / "run.toml")
        self.sums: SiteSums = self.folder.sums
        self._refuse_unsolved()
        self.model = DeliveredModel(path / "model.safetensors")
        self.result = _result(path)
        if self.result.kept == "tuned":
            raise UserError(
                f"The model of {path} has a tuned backbone, and the sums of its sites are of the backbone before "
                "tuning: no head solved from them fits it, so no site can join or leave, and nothing can be computed "
                "from them. Start a run with all the sites."
            )
        if not self.sums.exists() or not self.sums.sites():
            because = ", because secure summation hides them" if self.config.privacy.secure_sum else ""
            raise UserError(
                f"{path} holds no sums of its sites (nothing in {self.sums.path}){because}, so no site can join or "
                "leave it, and nothing can be computed from them."
            )
        self.recovered = self._recover()

    def _refuse_unsolved(self) -> None:
        if self.config.privacy.on:
            raise UserError(
                f"{self.path} is of a differentially private run: its sums are noisy and are not kept, so its head "
                "cannot be solved again, and no site can join or leave."
            )
        head = make_head(self.config.head, 1, 2)
        if self.form(2, 1).init not in UNSOLVED:
            return
        solvable = [init for init in head.inits if init not in UNSOLVED]
        advice = (
            f"start the run with --init {solvable[0]} for that."
            if solvable
            else "sites can join and leave only runs with a linear or a cosine head."
        )
        raise UserError(
            f"The head {self.config.head!r} of {self.path} started from {self.form(2, 1).init!r}, so no sums of its "
            f"sites were taken: it cannot be solved again without a site, or with another; {advice}"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the model's classes."""
        return self.model.classes

    @property
    def gradient_round(self) -> int:
        """The round that the model is of; 0 if it was solved from sums."""
        return 0 if self.history() else self.result.kept_round

    def parts(self) -> list[Part]:
        """Return of which of their rows the sites' sums are kept."""
        held = {part for parts in self.sums.records().values() for part in parts}
        return [part for part in PARTS if part in held]

    def form(self, num_classes: int = 0, num_features: int = 0) -> HeadForm:
        """Return the form of the run's heads, perhaps for another number of classes."""
        if num_features:
            return HeadForm(self.config, num_features, self.task(num_classes))
        return HeadForm(self.config, self.model.num_features, self.task(num_classes), self.model.mapping)

    def task(self, num_classes: int = 0) -> Task:
        """Return the run's task, perhaps with another number of classes; tasks about places keep theirs."""
        if tasks[self.config.task].dense:
            return make_task(self.config.task, self.config.classes or self.classes)
        names: Sequence[str] = [str(number) for number in range(1, num_classes + 1)] if num_classes else self.classes
        if num_classes == len(self.config.classes):
            names = self.config.classes
        return make_task(self.config.task, names)

    def manifest(self, classes: tuple[str, ...]) -> Manifest:
        """Return the run's manifest for a site."""
        described = self.model.described
        return Manifest(
            run=self.path.resolve().name,
            backbone=described["backbone"],
            layer=described["layer"],
            backbone_digest=described["backbone_digest"],
            weights_digest=described["weights_digest"],
            num_features=self.model.num_features,
            classes=classes,
            head=self.config.head,
            holdout=self.config.holdout,
            seed=self.config.seed,
            local=self.config.local,
            task=self.config.task,
        )

    def backbone(self, weights: str, device: str) -> Backbone:
        """Return the run's backbone, from where it is on this machine; nothing is downloaded.

        Raises:
            UserError: if `weights` are of another one.
            FedheadError: if it is nowhere.
        """
        described, own = self.model.described, self.config.weights
        spec, layer, digest = described["backbone"], described["layer"], described["weights_digest"]
        if not weights and (self.path / BACKBONE_FILE).is_file():
            weights = str(self.path / BACKBONE_FILE)
        found = None if weights else find_backbone(spec, layer, digest)
        if found is None and (weights or own == "random" or Path(own).is_file()):
            weights = weights or own
            found = load_backbone(spec, weights=weights, layer=layer, seed=self.config.seed)
        if found is None:
            raise FedheadError(
                f"The weights of {spec} are not on this machine: looked for {weights_path(digest)}. Name their file "
                "with --weights FILE."
            )
        if found.weights_digest != digest:
            raise UserError(
                f"The weights {weights} are not those that {self.path} was run with: their digest is "
                f"{found.weights_digest[:12]}…, not {digest[:12]}…."
            )
        return found.to(pick_device(device))

    def probe(self, backbone: Backbone) -> Tensor:
        """Return `[1, d]`, the mean of the coordinator's probe features, which its sums are about.

        Sums add only if they are about the same origin to the last bit, which another machine's probe does not give.
        Projected sums are about zero; then the probe is this machine's.
        """
        origin = self.sums.origin()
        self.require_width(len(origin))
        if self.model.mapping is not None or projection_for(self.model.num_features, self.config.seed) is not None:
            return backbone.probe().mean(0, keepdim=True)
        return origin.float()[None]

    def require_width(self, found: int) -> None:
        """Refuse sums of another number of features than those of the run.

        Raises:
            UserError: if so.
        """
        mapped = self.form().num_features
        project = projection_for(mapped, self.config.seed)
        width = mapped if project is None else project.narrow
        if found != width:
            raise UserError(
                f"The sums in {self.sums.path} are of {found} features, and the head of {self.path} is solved from "
                f"those of {width}: they are of another run."
            )

    def member(self, site: str) -> Mapping[Part, Record]:
        """Return the records of a site that is in.

        Raises:
            UserError: if it is not, with the names of those that are.
        """
        records = self.sums.records()
        if site in records:
            return records[site]
        past = [line for line in self.history() if line["site"] == site and line["action"] == "leave"]
        left = f"It left at {past[-1]['when'][:19]} UTC. " if past else ""
        names = f"In it are {quoted(sorted(records))}."
        if not past and len(records) > MOST_NAMES:
            names = suggest(site, sorted(records))
        raise UserError(f"There is no site {site!r} in {self.path}. {left}{names}")

    def refuse_member(self, site: str) -> None:
        """Refuse a site that is in already, or has no name.

        Raises:
            UserError: if so.
        """
        if not site.strip():
            raise UserError("The site needs a name, as in --site hospital-north.")
        if site in self.sums.records():
            raise UserError(
                f"{site!r} is in {self.path} already. To come back with other rows or classes it leaves first: fedhead "
                f"leave {self.path} --site {shlex.quote(site)}"
            )

    def require_contrast(self, stats: FeatureStatistics, site: str) -> None:
        """Check that a head can be solved from statistics.

        Raises:
            UserError: if it has rows of fewer than two classes or, multi-label, no class that some rows have and others
                do not.
        """
        if stats.kind.real and not has_contrast(stats):
            raise UserError(f"Without {site!r} a target has one value in all rows: there is nothing left to learn.")
        if not has_contrast(stats):
            left = [name for name, count in zip(self.classes, stats.counts.tolist(), strict=True) if count]
            raise UserError(
                f"Without {site!r} all rows are of {quoted(left) or 'no class'}: there is nothing left for a head to "
                "learn."
            )

    def change(
        self,
        action: str,
        site: str,
        draft: Draft,
        *,
        rows: int,
        digests: Mapping[Part, str],
        notes: Sequence[str],
        added: tuple[str, ...] = (),
        measured: Measured | None = None,
        withheld: int = 0,
        skipped: int = 0,
    ) -> MembershipChange:
        """Solve the head of a draft, then make the draft the run's state."""
        classes = (*self.classes, *added)
        measured = measured or Measured()
        stats = total(draft.pools)
        self.require_width(stats.num_features)
        form = self.form(len(classes))
        all_rows = "held_out" in draft.pools or self.config.holdout == 0
        notes = [*self.recovered, *notes]
        if not all_rows:
            notes.append("The head is solved from training rows alone: the run has no sums of held-out rows.")
        change = MembershipChange(
            run_dir=self.path,
            action=action,
            site=site,
            when=datetime.now(UTC),
            rows=rows,
            digests=digests,
            sites=tuple(sorted(draft.records)),
            rows_before=sum(part.rows for parts in self.sums.records().values() for part in parts.values()),
            rows_after=draft.rows,
            classes=classes,
            classes_added=added,
            head=form.deliver(stats),
            head_spec=self.model.described["head"],
            method=form.init,
            statistics=stats,
            all_rows=all_rows,
            accuracy=measured.accuracy,
            task=self.task(),
            accuracy_before=measured.accuracy_before,
            rows_held_out=measured.rows,
            withheld=withheld,
            skipped=skipped,
            notes=tuple(notes),
        )
        self.sums.commit(draft, change.record())
        self._deliver(change.head, classes, change.record())
        return change

    def history(self) -> list[dict[str, Any]]:
        """Return the run's changes, oldest first."""
        path = self.path / HISTORY
        if not path.is_file():
            return []
        return [_parse_json(line, path) for line in path.read_text(encoding="utf-8").splitlines()]

    def _deliver(self, head: Head, classes: tuple[str, ...], record: Mapping[str, Any]) -> None:
        """Write the files that follow from the sums; repeating this changes nothing."""
        self.model.replace(head, classes)
        # These are about the sites before the change.
        (self.path / WORTH).unlink(missing_ok=True)
        (self.path / EXAMPLES).unlink(missing_ok=True)
        foreign_file(self.model.path).unlink(missing_ok=True)
        adaptation_file(self.model.path).unlink(missing_ok=True)
        if self.config.classes != classes:
            self.folder.write_config(self.config.changed({"classes": list(classes), "classes_from": ""}))
        self.result.after(record).write(self.path)
        lines = self.history()
        if dict(record) not in lines[-1:]:
            lines.append(dict(record))
            write_atomically(self.path / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))
        self.sums.settle()
        try:
            write_card(self.path)
        # The change is complete; the card only describes it.
        except FedheadError as problem:
            logger.warning("The model card was not written: %s", problem)

    def _recover(self) -> tuple[str, ...]:
        """Finish a change that was killed after its sums were written; say so."""
        self.sums.sweep()
        pending = self.sums.pending
        if pending is None:
            return ()
        added = [name for name in pending["classes_added"] if name not in self.classes]
        classes = (*self.classes, *added)
        head = self.form(len(classes)).deliver(total(self.sums.pools(len(classes))))
        self._deliver(head, classes, pending)
        self.model = DeliveredModel(self.model.path)
        self.config = RunConfig.from_toml(self.path / "run.toml")
        self.result = _result(self.path)
        return (f"The {pending['action']} of {pending['site']!r}, which was interrupted, was completed first.",)


@contextmanager
def opened(run_dir: Path | str) -> Iterator[FinishedRun]:
    """Open a finished run for one change, locked against other processes.

    Raises:
        UserError: if the folder holds no finished run whose sites can change.
        FedheadError: if another process is changing it.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"There is no run folder {path}." if not path.exists() else f"{path} is not a run folder.")
    with locked_folder(path):
        yield FinishedRun(path)


def _result(path: Path) -> RunSummary:
    if (found := RunSummary.read(path)) is None:
        raise UserError(f"The run in {path} is not finished, as it has no result.json; sites join and leave then.")
    return found


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object.")
    return value
