"""Sites join a finished run, leave it, and bring new classes to it, without computing anything of any other site."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.backbone import digest_tensors
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.client.app import Kept, site_statistics
from fedhead.client.guard import MIN_CLASS_COUNT, MIN_ROWS, Guard, Ledger, ledger_path
from fedhead.client.site_data import Holding, check_backbone
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, relabel, require_kind, require_labels
from fedhead.devices import pick_device
from fedhead.errors import FedheadError, UserError
from fedhead.features import FeatureStore, Progress
from fedhead.files import locked_folder, write_atomically
from fedhead.heads import Head, make_head
from fedhead.losses import loss_for
from fedhead.messages import Manifest, Payload, StatisticsRequest
from fedhead.model import BACKBONE_FILE
from fedhead.registry import suggest
from fedhead.server.report.card import write_card
from fedhead.server.run_folder import RunFolder
from fedhead.server.site_sums import PARTS, Draft, Part, Parts, Record, SiteSums, digest_of
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.simulations.simulate import SharedData, SimulatedSite
from fedhead.statistics import FeatureStatistics, projection_for

logger = logging.getLogger(__name__)

HISTORY = "membership.jsonl"
"""The file of a run folder with a line for each change."""

_ROWS = 8192
_MOST_NAMES = 20


@dataclass(frozen=True, eq=False)
class MembershipChange:
    """What became of a run when a site joined or left.

    Attributes:
        run_dir: the run folder.
        action: `join`, `leave` or `add-class`.
        site: the site's name.
        when: in UTC.
        rows: how many of the site's rows were summed.
        digests: of its sums, by part.
        sites: the names of those that are in now.
        rows_before: how many rows were summed before, of all sites.
        rows_after: how many are now.
        classes: the names of the model's classes now.
        classes_added: those among them that are new.
        head: what is delivered now, for features as they are, in float64.
        head_spec: what `make_head` builds it from.
        method: what it was solved by.
        statistics: what it was solved from.
        all_rows: whether these are all rows, held-out ones included; else the training rows.
        accuracy: of the head solved without held-out rows on the site's own; None where none are here.
        accuracy_before: the same of the model before, where it knew all the classes.
        rows_held_out: how many rows these two were measured on.
        withheld: how many of the site's rows its guard withheld. For the site's own eyes.
        skipped: how many of its rows could not be read.
        notes: sentences on what the change does not do, and what cannot be told.
    """

    run_dir: Path
    action: str
    site: str
    when: datetime
    rows: int
    digests: Mapping[Part, str]
    sites: tuple[str, ...]
    rows_before: int
    rows_after: int
    classes: tuple[str, ...]
    classes_added: tuple[str, ...]
    head: Head
    head_spec: str
    method: str
    statistics: FeatureStatistics
    all_rows: bool
    accuracy: float | None
    accuracy_before: float | None
    rows_held_out: int
    withheld: int
    skipped: int
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the line that the run folder keeps: nothing that is for the site's own eyes."""
        return {
            "when": self.when.isoformat(),
            "action": self.action,
            "site": self.site,
            "rows": self.rows,
            "digests": dict(self.digests),
            "sites": len(self.sites),
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "classes_added": list(self.classes_added),
            "head": self.head_spec,
            "method": self.method,
            "all_rows": self.all_rows,
            "accuracy": self.accuracy,
            "accuracy_before": self.accuracy_before,
            "rows_held_out": self.rows_held_out,
        }

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            **self.record(),
            "sites": list(self.sites),
            "classes": list(self.classes),
            "rows_withheld": self.withheld,
            "rows_skipped": self.skipped,
            "notes": list(self.notes),
            "run_dir": str(self.run_dir),
        }


def join(
    run_dir: Path | str,
    site: str,
    data: str | Samples,
    *,
    min_class_count: int = MIN_CLASS_COUNT,
    min_rows: int = MIN_ROWS,
    weights: str = "",
    device: str = "auto",
    strict_data: bool = False,
    on_extraction: Progress = lambda done, total: None,
) -> MembershipChange:
    """Add a site to a finished run, and solve the statistics head again, as if the site had been in from the start.

    Its rows become features under the run's backbone, once; its guard and its ledger apply, as at any site.

    Args:
        run_dir: the run folder.
        site: a name that no site of the run has.
        data: its rows, as a data spec or samples in memory.
        min_class_count: the site's guard; see `fedhead.client.guard.Guard`.
        min_rows: the same.
        weights: the backbone's, where they are not found on this machine.
        device: where features are extracted.
        strict_data: refuse data with unreadable rows instead of skipping them.
        on_extraction: called with rows done and rows in all.

    Raises:
        UserError: if the run, the site or its data do not allow it. Nothing has changed then.
        FedheadError: if something fails. The run folder is as it was, or the next change
            brings it to its new state first.
    """
    guard = Guard(min_class_count, min_rows)
    access = _Access(guard, weights, device, strict_data, on_extraction)
    with _opened(run_dir) as run:
        return _come(run, "join", site, (), data, access)


def add_class(
    run_dir: Path | str,
    name: str | Sequence[str],
    site: str,
    data: str | Samples,
    *,
    min_class_count: int = MIN_CLASS_COUNT,
    min_rows: int = MIN_ROWS,
    weights: str = "",
    device: str = "auto",
    strict_data: bool = False,
    on_extraction: Progress = lambda done, total: None,
) -> MembershipChange:
    """Add a class, or several, to a finished run, with a site that has rows of it, and solve the head again.

    The site joins; its data may also hold rows of classes that the run knows. A site that is in must leave first, and
    comes back with all of its rows: were new rows added to a site's sums, nothing could tell which of them were in.

    Args:
        run_dir: the run folder.
        name: of the class; it becomes the last of the model's.
        site: see `join`.
        data: see `join`.
        min_class_count: see `join`.
        min_rows: see `join`.
        weights: see `join`.
        device: see `join`.
        strict_data: see `join`.
        on_extraction: see `join`.

    Raises:
        UserError: if the run, the class, the site or its data do not allow it. Nothing has changed then.
        FedheadError: as `join` does.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    guard = Guard(min_class_count, min_rows)
    access = _Access(guard, weights, device, strict_data, on_extraction)
    with _opened(run_dir) as run:
        _check_names(names, run)
        return _come(run, "add-class", site, names, data, access)


def leave(
    run_dir: Path | str,
    site: str,
    *,
    sums: Sequence[Path | str] = (),
    data: str | Samples | None = None,
    min_class_count: int = MIN_CLASS_COUNT,
    min_rows: int = MIN_ROWS,
    weights: str = "",
    device: str = "auto",
    strict_data: bool = False,
    on_extraction: Progress = lambda done, total: None,
) -> MembershipChange:
    """Take a site out of a finished run, and solve the statistics head again, as if it had never been in.

    A run that keeps its sites' sums needs nothing else. One that does not (`keep_sums = "none"`) needs the site's
    again, and takes them only if they are, to the last bit, those that are in: from files, or from its data, with the
    limits that its guard had then.

    Args:
        run_dir: the run folder.
        site: one that is in.
        sums: files that `FeatureStatistics.save` wrote, of its training rows and of its held-out rows.
        data: its rows, instead.
        min_class_count: see `join`.
        min_rows: see `join`.
        weights: see `join`.
        device: see `join`.
        strict_data: see `join`.
        on_extraction: see `join`.

    Raises:
        UserError: if the run or the site do not allow it. Nothing has changed then.
        FedheadError: as `join` does.
    """
    guard = Guard(min_class_count, min_rows)
    access = _Access(guard, weights, device, strict_data, on_extraction)
    with _opened(run_dir) as run:
        records = run.member(site)
        if len(run.sums.sites()) == 1:
            raise UserError(
                f"{site!r} is the only site of {run.path}: without it no rows are left. Remove the run folder instead."
            )
        if run.sums.keep == "folder":
            if sums or data is not None:
                raise UserError(f"{run.path} keeps the sums of {site!r}: leave needs neither its sums nor its data.")
            parts: Parts = {}
        else:
            parts = _sent_again(run, site, records, sums, data, access)
        draft = run.sums.left(site, parts, len(run.classes))
        run.require_contrast(_total(draft.pools), site)
        notes = [f"Models that were handed out before still hold what they learned from {site!r}."]
        if run.config.rounds:
            notes.append(
                f"Gradient rounds are not unlearned: what they learned from {site!r} is in every head since. None of "
                f"these is delivered any more, but the statistics head ({run.form().init}), solved from the sums of "
                "the other sites alone."
            )
        notes.append("How accurate the new head is cannot be told here, because no site's rows are at hand.")
        return run.change(
            "leave",
            site,
            draft,
            rows=sum(record.rows for record in records.values()),
            digests={part: record.digest for part, record in records.items()},
            notes=notes,
        )


@dataclass(frozen=True)
class _Access:
    """How a site's data is read."""

    guard: Guard
    weights: str
    device: str
    strict_data: bool
    on_extraction: Progress


@dataclass(frozen=True)
class _SiteRows:
    """A site's rows under the run's backbone, and their sums."""

    parts: Parts
    holding: Holding
    withheld: int
    skipped: int


@dataclass(frozen=True)
class _Measured:
    """How heads do on a site's held-out rows."""

    accuracy: float | None = None
    accuracy_before: float | None = None
    rows: int = 0


def _come(
    run: "_Run", action: str, site: str, added: tuple[str, ...], data: str | Samples, access: _Access
) -> MembershipChange:
    """Let a site in, with classes that may be new."""
    run.refuse_member(site)
    classes = (*run.classes, *added)
    samples = _load(run, data)
    if unknown := _unknown(samples, classes):
        flags = " ".join(f"--name {shlex.quote(name)}" for name in unknown)
        raise UserError(
            f"{samples.spec} has rows of {_listed(unknown)}, which this run does not know; its classes are "
            f"{_listed(classes)}. To add what is new: fedhead add-class {run.path} {flags} --site {shlex.quote(site)} "
            f"--data {shlex.quote(samples.spec)}"
        )
    site_rows = _sum_site(run, site, samples, classes, run.parts(), access)
    for number, name in enumerate(added, start=len(run.classes)):
        if not any(stats.counts[number] for stats in site_rows.parts.values()):
            raise UserError(
                f"No rows of class {name!r} come from {site!r}: its data has none of it that its guard lets pass "
                f"(--min-class-count {access.guard.min_class_count})."
            )
    try:
        draft = run.sums.joined(site, site_rows.parts, len(classes))
    except ValueError as error:
        raise UserError(f"The sums of {site!r} do not add to those in {run.sums.path}: {error}") from None
    measured = _measure(run, draft, site_rows.holding, known=not added)
    notes = []
    if run.gradient_round:
        notes.append(
            f"The model was of round {run.gradient_round}. It is replaced by the statistics head ({run.form().init}), "
            "which gradient rounds have not touched; to train further, start a run with all the sites."
        )
    elsewhere = "How it does at the other sites cannot be told here, because their rows are not at hand."
    if measured.accuracy is None:
        elsewhere = "How accurate the new head is cannot be told here, because no held-out rows are at hand."
    return run.change(
        action,
        site,
        draft,
        added=added,
        rows=sum(stats.rows for stats in site_rows.parts.values()),
        digests={part: digest_of(stats) for part, stats in site_rows.parts.items()},
        measured=measured,
        withheld=site_rows.withheld,
        skipped=site_rows.skipped,
        notes=[*notes, elsewhere],
    )


def _sum_site(
    run: "_Run",
    site: str,
    samples: Samples,
    classes: tuple[str, ...],
    wanted: Sequence[Part],
    access: _Access,
) -> _SiteRows:
    """Make a site's sums of its rows, as the site itself does in a run."""
    labels = relabel(samples, classes)
    guard = access.guard
    every = np.arange(len(samples))
    _refuse_if_withheld(guard.allowed_rows(every, labels, np.zeros(len(every), np.bool_), classes).refusal)
    backbone = run.backbone(access.weights, access.device)
    require_kind(backbone.spec, backbone.kind, samples.kind)
    manifest = run.manifest(classes)
    probe = run.probe(backbone)
    check_backbone(backbone, backbone.probe().mean(0, keepdim=True), manifest, probe)
    store = FeatureStore.open(backbone, samples, strict=access.strict_data, progress=access.on_extraction)
    present = SimulatedSite(site, store.readable(), SharedData(backbone, store, labels, guard))
    present.ledger = Ledger(ledger_path(site), guard.min_class_count)
    holding = present.open(manifest)
    _refuse_if_withheld(holding.guarded.refusal)
    parts: dict[Part, FeatureStatistics] = {}
    for part in wanted:
        content = site_statistics(present, Kept(manifest, probe, None), StatisticsRequest(rows=part))
        arrays = Payload.from_content(content).arrays
        parts[part] = FeatureStatistics.from_tensors(
            {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        )
    return _SiteRows(parts, holding, present.num_rows - holding.guarded.num_rows, len(store.skipped))


def _sent_again(
    run: "_Run",
    site: str,
    records: Mapping[Part, Record],
    files: Sequence[Path | str],
    data: str | Samples | None,
    access: _Access,
) -> Parts:
    """Return the sums that a site sent once more, after making sure that they are those that are in."""
    if files and data is not None:
        raise UserError("Give the site's sums or its data, not both.")
    needed = {part: record for part, record in records.items() if record.rows}
    recorded = " and ".join(f"{record.digest[:12]}… of {_ROWS_OF[part]}" for part, record in needed.items())
    if data is not None:
        # Classes that the run learned later were not told apart then.
        classes = run.classes[: records["train"].classes]
        made = _sum_site(run, site, _load(run, data), classes, list(needed), access).parts
        for part, stats in made.items():
            if digest_of(stats) != needed[part].digest:
                raise UserError(
                    f"These rows do not give the sums that {site!r} sent: those of {_ROWS_OF[part]} have the digest "
                    f"{digest_of(stats)[:12]}…, recorded is {needed[part].digest[:12]}…. {stats.rows} rows were summed "
                    f"now, {needed[part].rows} then. It must be the same data, in the same order, on the same machine, "
                    "with the same --min-class-count and --min-rows."
                )
        return made
    if not files:
        raise UserError(
            f"{run.path} keeps no site's sums (keep_sums = 'none'), so {site!r} must send its own again: --sums FILE, "
            f"once for each part, or --data SPEC to make them anew. They are checked against the recorded digests, "
            f"{recorded}."
        )
    by_digest: dict[str, Part] = {record.digest: part for part, record in needed.items()}
    sent: dict[Part, FeatureStatistics] = {}
    for file in files:
        stats = FeatureStatistics.load(file)
        digest = digest_of(stats)
        if digest not in by_digest:
            raise UserError(
                f"The sums in {file}, of {stats.rows} rows, are not those that {site!r} sent: their digest is "
                f"{digest[:12]}…, recorded are {recorded}."
            )
        sent[by_digest[digest]] = stats
    if missing := [part for part in needed if part not in sent]:
        raise UserError(
            f"The sums of {' and '.join(_ROWS_OF[part] for part in missing)} of {site!r} are missing; give each file "
            "with --sums."
        )
    return sent


_ROWS_OF: Mapping[Part, str] = {"train": "the training rows", "held_out": "the held-out rows"}


def _load(run: "_Run", data: str | Samples) -> Samples:
    samples = data if isinstance(data, Samples) else load_samples(data)
    require_labels(samples, run.config.multi_label)
    return samples


def _unknown(samples: Samples, classes: Sequence[str]) -> list[str]:
    present = np.flatnonzero(samples.labels.any(0)) if samples.multi_label else np.unique(samples.labels)
    held = {samples.classes[label] for label in present}
    return sorted(held - set(classes))


def _refuse_if_withheld(refusal: str) -> None:
    if refusal:
        raise UserError(refusal)


def _check_names(names: tuple[str, ...], run: "_Run") -> None:
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise UserError("Name each class to add, once, as in --name mollusc.")
    if known := [name for name in names if name in run.classes]:
        raise UserError(
            f"{_listed(known)} is known to {run.path} already; its classes are {_listed(run.classes)}. A site with "
            "rows of known classes only joins: fedhead join."
        )


def _measure(run: "_Run", draft: Draft, holding: Holding, known: bool) -> _Measured:
    """Evaluate the head that has seen no held-out row, and the one before, on a site's held-out rows."""
    rows = torch.from_numpy(holding.held_out.rows)
    train = draft.pools["train"]
    if not len(rows) or not _can_be_told_apart(train):
        return _Measured()
    head = run.form(train.num_classes).solve(train).float()
    before = _share_right(run.model.head, holding, rows) if known else None
    return _Measured(_share_right(head, holding, rows), before, len(rows))


@torch.inference_mode()
def _share_right(head: Head, holding: Holding, rows: Tensor) -> float:
    head = head.to(holding.data.features.device)
    right = 0
    for block in torch.split(rows, _ROWS):
        logits, labels = head(holding.data.features[block]), holding.data.labels[block]
        right += int(loss_for(logits, labels).correct(logits, labels).sum())
    return right / len(rows)


class _ModelFile:
    """A delivered model, read and written without its backbone: a site can leave where the backbone is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.described: dict[str, Any] = json.loads((file.metadata() or {})["model"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.classes: tuple[str, ...] = tuple(self.described["classes"])
            self.num_features = next(value.shape[1] for value in tensors.values() if value.ndim == 2)
            self.head = make_head(self.described["head"], self.num_features, len(self.classes))
            self.head.load_state_dict(tensors)
            whole = digest_tensors(tensors) == self.described["head_digest"]
        except FileNotFoundError:
            raise UserError(f"There is no {path}: the run did not finish.") from None
        except (OSError, SafetensorError, ValueError, KeyError, StopIteration, TypeError, RuntimeError) as error:
            raise UserError(f"The model {path} is damaged, or none that this version reads: {error}.") from None
        if not whole:
            raise UserError(f"The model {path} is damaged: its weights are not those that were saved.")

    def replace(self, head: Head, classes: Sequence[str]) -> None:
        """Write the same model with another head, in the precision that models have."""
        tensors = {name: value.detach().float().contiguous() for name, value in head.state_dict().items()}
        described = {**self.described, "classes": list(classes), "head_digest": digest_tensors(tensors)}
        write_atomically(self.path, save(tensors, {"model": json.dumps(described)}))


class _Run:
    """A finished run, open for one change.

    Its sums' index says what the state is; model, configuration, result and history follow from it. Where a process
    was killed before all of them did, they are made to follow when the run is opened next.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "run.toml").is_file():
            raise UserError(f"{path} is not a run folder: it has no run.toml.")
        if not (path / "result.json").is_file():
            raise UserError(f"The run in {path} is not finished, as it has no result.json; sites join and leave then.")
        self.path = path
        self.folder = RunFolder(path)
        self.config = RunConfig.from_toml(path / "run.toml")
        self.sums: SiteSums = self.folder.sums
        self._refuse_unsolved()
        self.model = _ModelFile(path / "model.safetensors")
        self.result = _read_json(path / "result.json")
        if not self.sums.exists() or not self.sums.sites():
            raise UserError(
                f"{path} holds no sums of its sites (nothing in {self.sums.path}), so no site can join or leave it."
            )
        self.recovered = self._recover()

    def _refuse_unsolved(self) -> None:
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
        return 0 if self.history() else int(self.result.get("kept_round", 0))

    def parts(self) -> list[Part]:
        """Return of which of their rows the sites' sums are kept."""
        held = {part for parts in self.sums.records().values() for part in parts}
        return [part for part in PARTS if part in held]

    def form(self, num_classes: int = 0, num_features: int = 0) -> HeadForm:
        """Return the form of the run's heads, perhaps for another number of classes."""
        return HeadForm(self.config, num_features or self.model.num_features, num_classes or len(self.classes))

    def manifest(self, classes: tuple[str, ...]) -> Manifest:
        """Return what a site is told of the run."""
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
            multi_label=self.config.multi_label,
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
        self._require_width(len(origin))
        if projection_for(self.model.num_features, self.config.seed) is not None:
            return backbone.probe().mean(0, keepdim=True)
        return origin.float()[None]

    def _require_width(self, found: int) -> None:
        project = projection_for(self.model.num_features, self.config.seed)
        width = self.model.num_features if project is None else project.narrow
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
        names = f"In it are {_listed(sorted(records))}."
        if not past and len(records) > _MOST_NAMES:
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
        """Refuse what no head can be solved from.

        Raises:
            UserError: if it has rows of fewer than two classes or, multi-label, no class that some rows have and others
                do not.
        """
        if not _can_be_told_apart(stats):
            left = [name for name, count in zip(self.classes, stats.counts.tolist(), strict=True) if count]
            raise UserError(
                f"Without {site!r} all rows are of {_listed(left) or 'no class'}: there is nothing left for a head to "
                "tell apart."
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
        measured: _Measured | None = None,
        withheld: int = 0,
        skipped: int = 0,
    ) -> MembershipChange:
        """Solve the head of a draft, then make the draft the run's state."""
        classes = (*self.classes, *added)
        measured = measured or _Measured()
        stats = _total(draft.pools)
        self._require_width(stats.num_features)
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
            head=form.solve(stats),
            head_spec=self.config.head,
            method=form.init,
            statistics=stats,
            all_rows=all_rows,
            accuracy=measured.accuracy,
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
        """Write what follows from the sums; to do so twice changes nothing."""
        self.model.replace(head, classes)
        if self.config.classes != classes:
            self.folder.write_config(self.config.changed({"classes": list(classes), "classes_from": ""}))
        self.folder.write_result({**self.result, "membership": dict(record)})
        lines = self.history()
        if dict(record) not in lines[-1:]:
            lines.append(dict(record))
            write_atomically(self.path / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))
        self.sums.settle()
        try:
            write_card(self.path)
        # The change is made, and the card only tells of it.
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
        head = self.form(len(classes)).solve(_total(self.sums.pools(len(classes))))
        self._deliver(head, classes, pending)
        self.model = _ModelFile(self.model.path)
        self.config = RunConfig.from_toml(self.path / "run.toml")
        self.result = _read_json(self.path / "result.json")
        return (f"The {pending['action']} of {pending['site']!r}, which was interrupted, was completed first.",)


@contextmanager
def _opened(run_dir: Path | str) -> Iterator[_Run]:
    """Open a finished run for one change; another process that wants to change it is turned away."""
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"There is no run folder {path}." if not path.exists() else f"{path} is not a run folder.")
    with locked_folder(path):
        yield _Run(path)


def _total(pools: Parts) -> FeatureStatistics:
    first, *others = (pools[part] for part in PARTS if part in pools)
    return sum(others, start=first.copy())


def _can_be_told_apart(stats: FeatureStatistics) -> bool:
    return bool(((stats.counts > 0) & (stats.counts < stats.rows)).any())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse_json(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object.")
    return value


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(repr, names[:_MOST_NAMES])) + more
