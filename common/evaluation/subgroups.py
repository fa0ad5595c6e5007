"""Comparison of groups of rows, such as sexes or scanners, by a model's counts in each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhead.errors import UserError
from fedhead.evaluation.metrics import EvaluationReport, reliability, report, wilson_interval
from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.score_bins import ScoreBins
from fedhead.wording import percent, signed


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


def compare_groups(
    groups: Mapping[str, EvaluationSums], classes: Sequence[str], sensitivity: float | None = None
) -> list[GroupReport]:
    """Compare groups; the worst by accuracy is first.

    Args:
        groups: the counts of each group in the default `ScoreBins`, of any number of sites, added.
        classes: of the model.
        sensitivity: for models of two classes: the sensitivity to the last class that each group's own threshold is to
            reach.

    Raises:
        UserError: if thresholds are asked for of other models, or for an impossible sensitivity.
    """
    if sensitivity is not None and len(classes) != 2:
        raise UserError(f"Thresholds are for models of two classes; this one has {len(classes)}.")
    if sensitivity is not None and not 0 < sensitivity < 1:
        raise UserError(f"The sensitivity must be between 0 and 1, not {sensitivity:g}.")
    found = []
    for name, sums in groups.items():
        others = [one for other, one in groups.items() if other != name]
        difference = _difference(sums, others)
        chosen = (None, None, None) if sensitivity is None else _threshold(sums, sensitivity)
        metrics = report(sums, classes)
        found.append(GroupReport(name, metrics, reliability(sums).error, *difference, *chosen))
    return sorted(found, key=lambda one: (one.metrics.accuracy.value or 0.0, one.name))


def worst_group(groups: Sequence[GroupReport]) -> str:
    """Return the finding about the worst group in a sentence."""
    worst = groups[0]
    value, low, high = worst.metrics.accuracy.to_list()[:3]
    said = f"The worst group is {worst.name!r}: accuracy {percent(value)} ({percent(low)} to {percent(high)})"
    if worst.difference is None or worst.low is None or worst.high is None:
        return f"{said}; there is no other group."
    limits = f"{signed(100 * worst.low, 1)} to {signed(100 * worst.high, 1)}"
    verdict = "lower than" if worst.high < 0 else "not clearly different from"
    return f"{said}, {verdict} the other groups' ({signed(100 * worst.difference, 1)} points, {limits})."


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
