"""Sites on this machine join a finished run, leave it, and add classes to it, without work at any other site."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fedhead.client.backbones import check_backbone
from fedhead.client.own_sums import OwnSums, require_rows, sum_own_rows
from fedhead.client.release.guard import MIN_CLASS_COUNT, MIN_ROWS, Guard
from fedhead.client.site_data import Holding
from fedhead.data import Samples, load_samples, require_kind
from fedhead.errors import UserError
from fedhead.features.store import FeatureStore, Progress
from fedhead.heads import Head
from fedhead.server.runs.finished import FinishedRun, opened
from fedhead.server.runs.membership import Measured, MembershipChange, has_contrast, total
from fedhead.server.site_sums import Draft, Part, Parts, Record, digest_of
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import Task, make_task, tasks
from fedhead.wording import quoted

_ROWS = 8192
_ROWS_OF: Mapping[Part, str] = {"train": "the training rows", "held_out": "the held-out rows"}


class DataOptions(TypedDict, total=False):
    """How a site's data is read; each may be left out."""

    min_class_count: int
    """The site's guard withholds classes with fewer training rows; see `fedhead.client.release.guard.Guard`."""
    min_rows: int
    """The guard refuses the site if it has fewer rows."""
    weights: str
    """File of the backbone's weights, if they are not found on this machine."""
    device: str
    """Device for extracting features."""
    strict_data: bool
    """Whether to refuse data with unreadable rows instead of skipping them."""
    on_extraction: Progress
    """Called with the number of rows done and the number of all rows."""


@dataclass(frozen=True)
class _Access:
    """Data options with their defaults."""

    min_class_count: int = MIN_CLASS_COUNT
    min_rows: int = MIN_ROWS
    weights: str = ""
    device: str = "auto"
    strict_data: bool = False
    on_extraction: Progress = lambda done, total: None

    @property
    def guard(self) -> Guard:
        """The site's guard."""
        return Guard(self.min_class_count, self.min_rows)


def join(run_dir: Path | str, site: str, data: str | Samples, **options: Unpack[DataOptions]) -> MembershipChange:
    """Add a site to a finished run, and solve the statistics head as if the site had taken part from the start.

    The backbone runs once over the site's rows. The site's guard and ledger apply, as in a run.

    Args:
        run_dir: the run folder.
        site: a name that no site of the run has.
        data: its rows, as a data spec or samples in memory.
        options: `min_class_count`, `min_rows` (the site's guard), `weights` (a file, if the backbone's are not found on
            this machine), `device`, `strict_data` and `on_extraction`; see `DataOptions`.

    Raises:
        UserError: if the run, the site or its data do not allow it. Nothing has changed then.
        FedheadError: if something fails. The run folder is unchanged, or the next change completes this one first.
    """
    with opened(run_dir) as run:
        return _come(run, "join", site, (), data, _Access(**options))


def add_class(
    run_dir: Path | str, name: str | Sequence[str], site: str, data: str | Samples, **options: Unpack[DataOptions]
) -> MembershipChange:
    """Add a class, or several, to a finished run, with a joining site that has rows of it, and solve the head again.

    The data may also hold rows of known classes. A site that takes part already must leave first and then joins with
    all of its rows: new rows cannot be distinguished from those in the site's sums.

    Args:
        run_dir: the run folder.
        name: of the class; it becomes the last of the model's.
        site: see `join`.
        data: see `join`.
        options: see `join`.

    Raises:
        UserError: if the run, the class, the site or its data do not allow it. Nothing has changed then.
        FedheadError: as `join` does.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    with opened(run_dir) as run:
        _check_names(names, run)
        return _come(run, "add-class", site, names, data, _Access(**options))


def leave(
    run_dir: Path | str,
    site: str,
    *,
    sums: Sequence[Path | str] = (),
    data: str | Samples | None = None,
    **options: Unpack[DataOptions],
) -> MembershipChange:
    """Remove a site from a finished run, and solve the statistics head as if the site had never taken part.

    A run that keeps its sites' sums needs nothing else. A run that does not (`keep_sums = "none"`) needs the site's
    sums again, from files or from its data under the guard's limits of that time. They must equal the recorded ones to
    the last bit.

    Args:
        run_dir: the run folder.
        site: one that takes part.
        sums: files that `FeatureStatistics.save` wrote, of its training rows and of its held-out rows.
        data: its rows, instead.
        options: see `join`.

    Raises:
        UserError: if the run or the site do not allow it. Nothing has changed then.
        FedheadError: as `join` does.
    """
    with opened(run_dir) as run:
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
            parts = _sent_again(run, site, records, sums, data, _Access(**options))
        draft = run.sums.left(site, parts, len(run.classes))
        run.require_contrast(total(draft.pools), site)
        return run.change(
            "leave",
            site,
            draft,
            rows=sum(record.rows for record in records.values()),
            digests={part: record.digest for part, record in records.items()},
            notes=_left_notes(run, site),
        )


def _left_notes(run: FinishedRun, site: str) -> list[str]:
    notes = [f"Models that were handed out before still hold what they learned from {site!r}."]
    if run.config.rounds:
        notes.append(
            f"Gradient rounds are not unlearned: what they learned from {site!r} is in every head since. None of "
            f"these is delivered any more, but the statistics head ({run.form().init}), solved from the sums of "
            "the other sites alone."
        )
    notes.append("The new head's accuracy is unknown here, because this machine has no site's rows.")
    return notes


def _come(
    run: FinishedRun, action: str, site: str, added: tuple[str, ...], data: str | Samples, access: _Access
) -> MembershipChange:
    """Let a site in, with classes that may be new."""
    run.refuse_member(site)
    classes = (*run.classes, *added)
    samples = _load(run, data)
    if unknown := make_task(run.config.task, classes).unknown(samples):
        flags = " ".join(f"--name {shlex.quote(name)}" for name in unknown)
        raise UserError(
            f"{samples.spec} has rows of {quoted(unknown)}, which this run does not know; its classes are "
            f"{quoted(classes)}. To add what is new: fedhead add-class {run.path} {flags} --site {shlex.quote(site)} "
            f"--data {shlex.quote(samples.spec)}"
        )
    site_rows = _sum_site(run, site, samples, classes, run.parts(), access)
    for number, name in enumerate(added, start=len(run.classes)):
        if not any(stats.counts[number] for stats in site_rows.parts.values()):
            raise UserError(
                f"No rows of class {name!r} come from {site!r}: its data has none of it that its guard lets pass "
                f"(--min-class-count {access.min_class_count})."
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
    elsewhere = "Its accuracy at the other sites is unknown here, because this machine does not have their rows."
    if measured.accuracy is None:
        elsewhere = "The new head's accuracy is unknown here, because this machine has no held-out rows."
    return run.change(
        action,
        site,
        draft,
        added=added,
        rows=sum(stats.independent for stats in site_rows.parts.values()),
        digests={part: digest_of(stats) for part, stats in site_rows.parts.items()},
        measured=measured,
        withheld=site_rows.withheld,
        skipped=site_rows.skipped,
        notes=[*notes, elsewhere],
    )


def _sum_site(
    run: FinishedRun,
    site: str,
    samples: Samples,
    classes: tuple[str, ...],
    wanted: Sequence[Part],
    access: _Access,
) -> OwnSums:
    """Compute a site's sums under the run's backbone; refuse a site that cannot take part before its rows are read."""
    task = make_task(run.config.task, classes)
    targets = task.encode(samples)
    require_rows(site, access.guard, targets, task)
    backbone = run.backbone(access.weights, access.device)
    require_kind(backbone.spec, backbone.kind, samples.kind)
    manifest, probe = run.manifest(classes), run.probe(backbone)
    check_backbone(backbone, backbone.probe().mean(0, keepdim=True), manifest, probe)
    store = FeatureStore.open(backbone, samples, strict=access.strict_data, progress=access.on_extraction)
    mapping = run.model.mapping
    origin = None if mapping is None else run.sums.origin()
    return sum_own_rows(site, samples, store, targets, backbone, manifest, probe, access.guard, wanted, mapping, origin)


def _sent_again(
    run: FinishedRun,
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
                    f"{digest_of(stats)[:12]}…, recorded is {needed[part].digest[:12]}…. {stats.independent} rows "
                    f"were summed now, {needed[part].rows} then. It must be the same data, in the same order, on the "
                    "same machine, with the same --min-class-count and --min-rows."
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
                f"The sums in {file}, of {stats.independent} rows, are not those that {site!r} sent: their digest is "
                f"{digest[:12]}…, recorded are {recorded}."
            )
        sent[by_digest[digest]] = stats
    if missing := [part for part in needed if part not in sent]:
        raise UserError(
            f"The sums of {' and '.join(_ROWS_OF[part] for part in missing)} of {site!r} are missing; give each file "
            "with --sums."
        )
    return sent


def _load(run: FinishedRun, data: str | Samples) -> Samples:
    samples = data if isinstance(data, Samples) else load_samples(data)
    tasks[run.config.task].require(samples)
    return samples


def _check_names(names: tuple[str, ...], run: FinishedRun) -> None:
    if tasks[run.config.task].dense:
        raise UserError(
            "The annotations of the sites lack a new class, so its places count as others in their sums: start a run "
            "with all classes."
        )
    if tasks[run.config.task].family != "classification":
        raise UserError(
            "This run predicts numbers and has no classes to add; a site with its targets joins: fedhead join."
        )
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise UserError("Name each class to add, once, as in --name mollusc.")
    if known := [name for name in names if name in run.classes]:
        raise UserError(
            f"{quoted(known)} is known to {run.path} already; its classes are {quoted(run.classes)}. A site with "
            "rows of known classes only joins: fedhead join."
        )


def _measure(run: FinishedRun, draft: Draft, holding: Holding, known: bool) -> Measured:
    """Evaluate the head that has seen no held-out row, and the one before, on a site's held-out rows."""
    rows = torch.from_numpy(holding.held_out.rows)
    train = draft.pools["train"]
    if not len(rows) or not has_contrast(train):
        return Measured()
    head = run.form(train.num_classes).deliver(train).float()
    task = run.task(train.num_classes)
    before = _score(run.model.head, holding, rows, task) if known else None
    return Measured(_score(head, holding, rows, task), before, len(rows))


@torch.inference_mode()
def _score(head: Head, holding: Holding, rows: Tensor, task: Task) -> float | None:
    if (places := holding.data.places) is not None:
        return places.task.score_of(places.evaluate(head, holding.data.features, rows.numpy()))
    head = head.to(holding.data.features.device)
    outputs = torch.cat([head(holding.data.features[block]).cpu() for block in torch.split(rows, _ROWS)])
    return task.score_on(outputs, holding.data.labels[rows].cpu())
