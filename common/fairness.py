"""Group fairness: a model's metrics and calibration in each group of rows, from counts that add across sites."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fedhead.data import Samples
from fedhead.data.samples import require_kind
from fedhead.drift import head_digest, read_counts
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.metrics import EvaluationReport, reliability, report, wilson_interval
from fedhead.features.store import FeatureStore, Progress
from fedhead.files import write_atomically
from fedhead.model import TransferModel
from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.score_bins import ScoreBins
from fedhead.wording import one_line, percent

MOST_GROUPS = 100
"""Largest number of groups; a column with more values is not a group of people or devices."""

_FORMAT = "fedhead-groups-1"
_ROWS = 8192
_MOST_CHARACTERS = 200


@dataclass(frozen=True, eq=False)
class GroupCounts:
    """Evaluation counts by group; all that `fedhead fairness` writes, and nothing about a single row.

    Attributes:
        model: the digest of the model's head.
        classes: the model's classes.
        groups: the counts of each group, in the default `ScoreBins`.
        withheld: the number of groups with too few rows.
    """

    model: str
    classes: tuple[str, ...]
    groups: Mapping[str, EvaluationSums]
    withheld: int = 0

    def __add__(self, other: Self) -> Self:
        if self.model != other.model or self.classes != other.classes:
            raise UserError("These counts are of different models, so they do not add.")
        groups = dict(self.groups)
        for name, sums in other.groups.items():
            groups[name] = groups[name] + sums if name in groups else sums
        return type(self)(self.model, self.classes, groups, self.withheld + other.withheld)

    def save(self, path: Path) -> None:
        """Write a JSON file.

        Raises:
            UserError: if it cannot be written.
        """
        groups = {
            name: {key: array.tolist() for key, array in sums.to_arrays().items()} for name, sums in self.groups.items()
        }
        values = {
            "format": _FORMAT,
            "model": self.model,
            "classes": list(self.classes),
            "groups": groups,
            "withheld": self.withheld,
        }
        write_atomically(path, json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: Path, model: TransferModel) -> "GroupCounts":
        """Read a file of `save`, validating everything: it may come from another site.

        Args:
            path: of the file.
            model: the counts must be of this one.

        Raises:
            UserError: if it is missing or damaged, or of another model.
        """

        def parse(values: Mapping[str, Any]) -> "GroupCounts":
            if values["model"] != head_digest(model) or tuple(values["classes"]) != model.classes:
                raise UserError(f"The counts in {path} are of another model than the given one.")
            like = EvaluationSums.zeros(len(model.classes), kind=model.task.kind)
            groups = {_checked_name(name): _read(arrays, like) for name, arrays in dict(values["groups"]).items()}
            withheld = values["withheld"]
            if len(groups) > MOST_GROUPS or not isinstance(withheld, int) or not 0 <= withheld <= 2**31:
                raise ValueError("it has too many groups, or a wrong number of withheld ones")
            return cls(values["model"], model.classes, groups, withheld)

        return read_counts(path, _FORMAT, parse)


@dataclass(frozen=True)
class GroupReport:
    """Metrics of one group.

    Attributes:
        name: of the group.
        metrics: its figures, with 95 % intervals.
        calibration_error: the expected calibration error.
        difference: its accuracy minus that of all other groups' rows; None for an only group.
        low: lower limit of the difference's 95 % interval (Newcombe, Statistics in Medicine 1998).
        high: upper limit.
        threshold: the probability from which the last class is predicted, if thresholds were asked for.
        sensitivity: the share of the last class's rows at or above the threshold.
        specificity: the share of the other rows below it.
    """

    name: str
    metrics: EvaluationReport
    calibration_error: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        found = {
            "name": self.name,
            **self.metrics.to_dict(),
            "calibration_error": self.calibration_error,
            "difference": None if self.difference is None else [self.difference, self.low, self.high],
        }
        if self.threshold is not None:
            found |= {
                "threshold": self.threshold,
                "sensitivity": self.sensitivity,
                "specificity": self.specificity,
            }
        return found


def count_groups(
    model: TransferModel,
    samples: Samples,
    *,
    min_class_count: int = 5,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> GroupCounts:
    """Evaluate a model in each group of labelled rows at a site.

    Args:
        model: a classifier.
        samples: labelled rows with groups, as from a data spec with `group=COLUMN`; those without a group are left out.
        min_class_count: groups with fewer rows are withheld. The counts have no total, so nothing can be subtracted.
        strict: whether to stop at unreadable rows.
        progress: called with the number of rows done and of all.

    Raises:
        UserError: if the model is no classifier, or the data has no groups or too many.
        FedheadError: if all groups are withheld.
    """
    if model.task.family != "classification":
        raise UserError("Groups are compared for classifiers; this model predicts numbers.")
    if model.task.divides_items:
        raise UserError(f"Groups are compared for classifiers of whole inputs, not for the task {model.task.name!r}.")
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    if samples.groups is None:
        raise UserError(
            "The data has no groups; name their column in the data spec, as in csv:FILE?label=...&group=sex."
        )
    targets = torch.from_numpy(model.task.encode(samples))
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = [row for row in store.readable().tolist() if samples.groups[row] is not None]
    names = sorted({str(samples.groups[row]) for row in rows})
    if len(names) > MOST_GROUPS:
        raise UserError(f"The data has {len(names):,} groups; groups to compare are {MOST_GROUPS} at most.")
    number = {name: place for place, name in enumerate(names)}
    owners = np.array([number[str(samples.groups[row])] for row in rows], np.int64)
    head, index = model.head.to("cpu"), torch.tensor(rows, dtype=torch.int64)
    with torch.inference_mode():
        parts = [head(store.features[block].cpu()).double() for block in torch.split(index, _ROWS)]
    logits = (
        torch.cat([torch.empty(0, len(model.classes), dtype=torch.float64), *parts]) / model.calibration.temperature
    )
    if len(logits):
        logits = logits.where(~model.unlearned_mask, logits.min() - 50)
    counted = model.task.count(
        logits, targets[index], owners, max(len(names), 1), ScoreBins.default(len(model.classes))
    )
    found = dict(zip(names, counted, strict=False))
    kept = {_checked_name(name): sums for name, sums in found.items() if sums.rows >= max(min_class_count, 1)}
    if not kept:
        raise FedheadError(f"Nothing is counted: no group has {max(min_class_count, 1)} rows or more.")
    return GroupCounts(head_digest(model), model.classes, kept, len(found) - len(kept))


def compare_groups(counts: GroupCounts, sensitivity: float | None = None) -> list[GroupReport]:
    """Compare groups; the worst by accuracy is first.

    Args:
        counts: of any number of sites, added.
        sensitivity: for models of two classes: the sensitivity to the last class that each group's own threshold is to
            reach.

    Raises:
        UserError: if thresholds are asked for of other models, or for an impossible sensitivity.
    """
    if sensitivity is not None and len(counts.classes) != 2:
        raise UserError(f"Thresholds are for models of two classes; this one has {len(counts.classes)}.")
    if sensitivity is not None and not 0 < sensitivity < 1:
        raise UserError(f"The sensitivity must be between 0 and 1, not {sensitivity:g}.")
    found = []
    for name, sums in counts.groups.items():
        others = [one for other, one in counts.groups.items() if other != name]
        difference = _difference(sums, others)
        chosen = (None, None, None) if sensitivity is None else _threshold(sums, sensitivity)
        metrics = report(sums, counts.classes)
        found.append(GroupReport(name, metrics, reliability(sums).error, *difference, *chosen))
    return sorted(found, key=lambda one: (one.metrics.accuracy.value or 0.0, one.name))


def worst_group(groups: Sequence[GroupReport]) -> str:
    """Return the finding about the worst group in a sentence."""
    worst = groups[0]
    value, low, high = worst.metrics.accuracy.to_list()[:3]
    said = f"The worst group is {worst.name!r}: accuracy {percent(value)} ({percent(low)} to {percent(high)})"
    if worst.difference is None or worst.low is None or worst.high is None:
        return f"{said}; there is no other group."
    limits = f"{100 * worst.low:+.1f} to {100 * worst.high:+.1f}"
    verdict = "lower than" if worst.high < 0 else "not clearly different from"
    return f"{said}, {verdict} the other groups' ({100 * worst.difference:+.1f} points, {limits})."


def _difference(sums: EvaluationSums, others: Iterable[EvaluationSums]) -> tuple[float | None, ...]:
    """Return the difference of the accuracies, and the limits of its interval from the Wilson limits of both."""
    rest = list(others)
    right, rows = sum(one.correct for one in rest), sum(one.rows for one in rest)
    if not rows or not sums.rows:
        return None, None, None
    shares = np.array([sums.correct / sums.rows, right / rows])
    low, high = wilson_interval(np.array([sums.correct, right]), np.array([sums.rows, rows]))
    difference = float(shares[0] - shares[1])
    down = math.hypot(float(shares[0] - low[0]), float(high[1] - shares[1]))
    up = math.hypot(float(high[0] - shares[0]), float(shares[1] - low[1]))
    return difference, difference - down, difference + up


def _threshold(sums: EvaluationSums, sensitivity: float) -> tuple[float | None, ...]:
    """Return the highest threshold at a bin's edge that reaches a sensitivity, with sensitivity and specificity."""
    rest, own = (counts[::-1].cumsum() for counts in sums.scores[1])
    if not own[-1]:
        return None, None, None
    place = int(np.searchsorted(own, sensitivity * own[-1] - 1e-9))
    edge = ScoreBins.default(2).lower_edge(1, len(own) - 1 - place)
    specificity = float(1 - rest[place] / rest[-1]) if rest[-1] else None
    return 1 / (1 + math.exp(-edge)) if edge > -700 else 0.0, float(own[place] / own[-1]), specificity


def _checked_name(name: str) -> str:
    if not name or one_line(name, _MOST_CHARACTERS) != name:
        raise UserError(f"A group's name is empty, too long or holds control characters: {one_line(name, 40)!r}.")
    return name


def _read(arrays: Mapping[str, Any], like: EvaluationSums) -> EvaluationSums:
    types = {name: array.dtype for name, array in like.to_arrays().items()}
    made = {}
    for name, values in dict(arrays).items():
        if types.get(name, np.dtype(np.float64)).kind == "f":
            made[name] = np.array(values, np.float64)
        else:
            whole = np.array(values)
            if whole.dtype.kind not in "iu" or (whole < 0).any() or (whole >= 2**32).any():
                raise ValueError(f"{name!r} does not hold counts")
            made[name] = whole.astype(np.uint32)
    return EvaluationSums.from_arrays(made, like)
