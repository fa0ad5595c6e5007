"""Sub-problems of a finished run, solved again from its kept sums: other classes, priors or sites."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.files import new_folder, require_new_folder
from fedhead.heads import Head, behind
from fedhead.model import BACKBONE_FILE, MODEL_FILE
from fedhead.registry import suggest
from fedhead.server.runs.delivered import DeliveredModel
from fedhead.server.runs.finished import FinishedRun, opened
from fedhead.server.runs.membership import has_contrast, total
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.subproblem import merged, restricted
from fedhead.tasks import make_task
from fedhead.tasks.clusters import is_unnamed
from fedhead.wording import quoted

_ELSEWHERE = "give --out a new one."

RECORD = "solve.json"
"""The file that describes the sub-problem, beside its model."""

PRIORS = ("empirical", "uniform")
"""Names of priors; others are given as numbers."""

_LOG_ODDS = ("lda", "lda-gcv", "nearest-mean")
"""Solvers whose outputs are log-odds up to the priors."""


@dataclass(frozen=True)
class SubProblem:
    """A question to a finished run.

    Attributes:
        classes: the classes or targets to keep, in this order and by their names after merging; empty for all.
        merge: classes to merge, as in `mild+severe=ill`.
        priors: `empirical`, `uniform`, numbers as in `ill=0.01,well=0.99`, or empty for those of the run.
        without: sites to leave out.
        init: the closed form; empty for that of the run.
    """

    classes: str = ""
    merge: Sequence[str] = ()
    priors: str = ""
    without: Sequence[str] = ()
    init: str = ""


@dataclass(frozen=True)
class Solved:
    """The solution of a sub-problem.

    Attributes:
        run_dir: the run folder.
        out: the new folder with the model.
        classes: the classes or targets of the model.
        rows: rows of each class; for targets, of all.
        sites: the number of sites whose sums were used.
        method: the closed form.
        priors: the class priors of the head; empty if the method has none.
        temperature: the divisor of outputs, taken over from the run, or 1.
        all_rows: whether held-out rows were used, too.
        notes: sentences on the limits of the solution.
    """

    run_dir: str
    out: str
    classes: tuple[str, ...]
    rows: Mapping[str, int]
    sites: int
    method: str
    priors: Mapping[str, float]
    temperature: float
    all_rows: bool
    notes: tuple[str, ...]


def solve(run_dir: Path | str, out: Path | str, problem: SubProblem) -> Solved:
    """Solve a sub-problem of a finished run from its sums, and write its model to a new folder.

    Args:
        run_dir: the run folder; it does not change.
        out: a new or empty folder.
        problem: the question.

    Raises:
        UserError: if the run keeps too few sums for the question, or the question does not fit the run.
        FedheadError: if the folder cannot be written.
    """
    out = Path(out)
    with opened(run_dir) as run:
        require_new_folder(out, _ELSEWHERE)
        stats, sites, all_rows = _sums_without(run, tuple(problem.without))
        everything = stats.rows
        columns, stats = _columns(run, stats, problem)
        form = _form(run, columns, problem.init)
        if not has_contrast(stats):
            rows = stats.counts.tolist() if not stats.kind.real else [stats.rows] * len(columns)
            found = ", ".join(f"{name!r}: {count}" for name, count in zip(columns, rows, strict=True))
            raise UserError(f"A head needs rows of two classes, or of a target with two values ({found}).")
        solution = form.solve(stats)
        priors = _set_priors(solution, stats, columns, form.init, problem.priors)
        head = behind(run.model.mapping, solution)
        temperature = _temperature(run, form)
        solved = Solved(
            run_dir=str(run.path),
            out=str(out),
            classes=columns,
            rows=_rows(stats, columns),
            sites=sites,
            method=form.init,
            priors=priors,
            temperature=temperature,
            all_rows=all_rows,
            notes=tuple(_notes(run, form, stats, stats.rows < everything, all_rows)),
        )
        _write(run, out, head, solved, form.task.unlearned(stats))
        return solved


def _sums_without(run: FinishedRun, without: tuple[str, ...]) -> tuple[FeatureStatistics, int, bool]:
    """Return the sums of all sites but some, the number of these sites, and whether held-out rows are included."""
    members = run.sums.sites()
    for site in without:
        run.member(site)
    if without and run.sums.keep == "none":
        raise UserError(
            f"{run.path} keeps only the total of its sites' sums (keep_sums = 'none', or secure summation), so no site "
            "can be left out of it here; the site can leave the run with its own sums: fedhead leave."
        )
    if not (rest := [site for site in members if site not in without]):
        raise UserError(f"Without {quoted(sorted(set(without)))} no site of {run.path} is left.")
    pools = run.sums.pools_of(rest, len(run.classes)) if without else run.sums.pools(len(run.classes))
    stats = total(pools)
    run.require_width(stats.num_features)
    return stats, len(rest), "held_out" in pools or run.config.holdout == 0


def _columns(
    run: FinishedRun, stats: FeatureStatistics, problem: SubProblem
) -> tuple[tuple[str, ...], FeatureStatistics]:
    """Merge and choose columns; return their names and their sums."""
    names = list(run.classes)
    if problem.merge:
        if not stats.kind.exclusive:
            raise UserError("Only classes of rows with one class each can be merged; this run has other targets.")
        names, groups = merged_names(run.classes, problem.merge)
        stats = merged(stats, groups)
    if problem.classes:
        chosen = split_names(problem.classes, ",", names)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--classes names a class twice: {problem.classes}.")
        if stats.kind.of_places and len(chosen) < len(names):
            raise UserError("Places of a class that is left out would stay in the sums: name all classes in --classes.")
        stats = restricted(stats, [names.index(name) for name in chosen])
        names = chosen
    return tuple(names), stats


def merged_names(classes: Sequence[str], merges: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Return the names of classes after merging, and the former classes of each.

    Args:
        classes: the names before.
        merges: such as `mild+severe=ill`.

    Raises:
        UserError: if one does not have this form, or names an unknown class or one class twice.
    """
    target: dict[str, str] = {}
    for text in merges:
        left, equals, new = text.rpartition("=")
        if not equals or not new.strip() or not left:
            raise UserError(f"Expected CLASS+CLASS=NAME, as in mild+severe=ill, not {text!r}.")
        for name in split_names(left, "+", classes):
            if name in target:
                raise UserError(f"--merge names {name!r} twice.")
            target[name] = new.strip()
    names: list[str] = []
    groups: list[list[int]] = []
    for number, name in enumerate(classes):
        new = target.get(name, name)
        if new not in names:
            names.append(new)
            groups.append([])
        elif name not in target or any(classes[one] == new and new not in target for one in groups[names.index(new)]):
            raise UserError(f"{new!r} is a class of the run already; merge it too, or choose another name.")
        groups[names.index(new)].append(number)
    return names, groups


def split_names(text: str, separator: str, known: Sequence[str]) -> list[str]:
    """Split a list of known names, which may themselves contain the separator.

    Raises:
        UserError: naming the first part that is not known.
    """
    parts = text.split(separator)
    names: list[str] = []
    while parts:
        for end in range(len(parts), 0, -1):
            name = separator.join(parts[:end]).strip()
            if name in known:
                names.append(name)
                parts = parts[end:]
                break
        else:
            raise UserError(
                f"There is no class {parts[0].strip()!r} here. {suggest(parts[0].strip(), list(known))}".strip()
            )
    return names


def _form(run: FinishedRun, columns: tuple[str, ...], init: str) -> HeadForm:
    form = HeadForm(
        run.config.changed({"init": init}) if init else run.config,
        run.model.num_features,
        make_task(run.config.task, columns),
        run.model.mapping,
    )
    if form.init in UNSOLVED:
        raise UserError(f"{form.init!r} is not solved from sums; give --init another closed form.")
    return form


def _set_priors(
    head: Head, stats: FeatureStatistics, columns: tuple[str, ...], method: str, wanted: str
) -> dict[str, float]:
    """Change a head of log-odds to other class priors, by adding the difference of their logarithms to the bias."""
    affine = head.affine()
    possible = stats.kind.exclusive and method in _LOG_ODDS and affine is not None
    if wanted and not possible:
        raise UserError(
            f"Priors belong to the closed forms {' and '.join(_LOG_ODDS)} of a linear head for one class per row; this "
            f"one is {method!r}."
        )
    if not possible:
        return {}
    present = stats.counts > 0
    own = torch.ones(len(columns), dtype=torch.float64) if method == "nearest-mean" else stats.counts.double()
    new = own if not wanted else priors_of(wanted, columns, stats.counts)
    if wanted:
        assert affine is not None
        shift = torch.where(present, (new / new[present].sum()).log() - (own / own[present].sum()).log(), 0.0)
        head.assign({"weight": affine[0], "bias": affine[1] + shift.to(affine[1].dtype)})
    normalised = torch.where(present, new, 0.0) / new[present].sum()
    return dict(zip(columns, normalised.tolist(), strict=True))


def priors_of(text: str, classes: Sequence[str], counts: Tensor) -> Tensor:
    """Return priors `[C]`, positive and not normalised, from a name or from numbers such as `ill=0.01,well=0.99`.

    Args:
        text: as given by a user.
        classes: the class names.
        counts: `[C]`, the rows of each class.

    Raises:
        UserError: if a class with rows has no positive number, or another one is named.
    """
    if text == "empirical":
        return counts.double()
    if text == "uniform":
        return torch.ones(len(classes), dtype=torch.float64)
    given: dict[str, float] = {}
    parts = text.split(",")
    while parts:
        # A class name may contain commas.
        for end in range(len(parts), 0, -1):
            name, equals, number = ",".join(parts[:end]).rpartition("=")
            if equals and name.strip() in classes and name.strip() not in given:
                break
        else:
            raise UserError(
                f"--priors takes {', '.join(PRIORS)} or a number for each class, as in "
                f"{classes[0]}=0.2,{classes[1]}=0.8, not {parts[0]!r}."
            )
        given[name.strip()] = _positive(number, name.strip())
        parts = parts[end:]
    if missing := [name for name, rows in zip(classes, counts.tolist(), strict=True) if rows and name not in given]:
        raise UserError(f"--priors gives no number for {quoted(missing)}.")
    return torch.tensor([given.get(name, 1.0) for name in classes], dtype=torch.float64)


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"The prior of {name!r} must be a positive number, not {text!r}.")
    return value


def _temperature(run: FinishedRun, form: HeadForm) -> float:
    """Return the run's temperature if it was chosen for a head of the same closed form, else 1."""
    same = form.init == run.form().init and run.gradient_round == 0 and form.task.scales_outputs
    return float(run.model.described.get("temperature", 1.0)) if same else 1.0


def _rows(stats: FeatureStatistics, columns: tuple[str, ...]) -> dict[str, int]:
    rows = [stats.rows] * len(columns) if stats.kind.real else stats.counts.tolist()
    return dict(zip(columns, rows, strict=True))


def _notes(run: FinishedRun, form: HeadForm, stats: FeatureStatistics, fewer: bool, all_rows: bool) -> list[str]:
    notes = []
    if fewer and stats.kind.exclusive:
        notes.append(
            "The covariance within classes is that of all classes' rows, as sums of single classes do not contain it."
        )
    if run.gradient_round:
        notes.append(
            f"The run delivers the head of round {run.gradient_round}; this one is solved from sums ({form.init})."
        )
    calibrated = run.config.task != "clusters"
    if form.task.scales_outputs and (form.init != run.form().init or run.gradient_round or not calibrated):
        notes.append("Its probabilities are not calibrated, as this machine has no held-out rows.")
    elif form.task.scales_outputs:
        notes.append("The temperature is that of the run, chosen on held-out rows of all of its sites.")
    if not all_rows:
        notes.append("The head is solved from training rows alone: the run has no sums of held-out rows.")
    notes.append(
        "The new head's accuracy is not known here, because this machine has no site's rows; measure it with fedhead "
        "evaluate."
    )
    return notes


def _write(run: FinishedRun, out: Path, head: Head, solved: Solved, unlearned: Sequence[str]) -> None:
    """Write the folder: all of it, or nothing."""
    changes: dict[str, Any] = {
        "temperature": solved.temperature,
        "scores": [],
        "residuals": [],
        "spread": [],
        "unlearned": list(unlearned),
    }
    if run.config.task == "clusters" and not is_unnamed(run.classes, solved.classes):
        changes["task"] = "classification"
    with new_folder(out, _ELSEWHERE) as temporary:
        run.model.write(temporary / MODEL_FILE, head, solved.classes, changes)
        DeliveredModel(temporary / MODEL_FILE)
        (temporary / RECORD).write_text(json.dumps(asdict(solved), indent=1) + "\n", encoding="utf-8")
        if (run.path / BACKBONE_FILE).is_file():
            shutil.copyfile(run.path / BACKBONE_FILE, temporary / BACKBONE_FILE)
