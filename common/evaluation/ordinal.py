"""Metrics of ordered classes with 95 % intervals, from a confusion matrix that adds across sites."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.metrics import Estimate, EvaluationReport, as_json, report
from fedhead.sums.evaluation import EvaluationSums

FloatArray = npt.NDArray[np.float64]

_Z = 1.959963984540054
_NO_ROWS = "There are no rows."
_ONE_LEVEL = "All rows and predictions have one level."


@dataclass(frozen=True)
class OrdinalReport(EvaluationReport):
    """Metrics of a head on ordered classes.

    Attributes:
        mae: the mean distance in levels between the predicted and the true level.
        quadratic_kappa: Cohen's kappa with quadratic weights.
    """

    mae: Estimate
    quadratic_kappa: Estimate

    def to_dict(self) -> dict[str, Any]:
        figures = {"mae": self.mae, "quadratic_kappa": self.quadratic_kappa}
        return {**super().to_dict(), **as_json(figures)}


def ordinal_report(sums: EvaluationSums, classes: Sequence[str]) -> OrdinalReport:
    """Compute metrics with intervals.

    Args:
        sums: the sums of one site, or of several added.
        classes: the names of the levels, the lowest first.
    """
    plain = report(sums, classes)
    confusion = sums.confusion.astype(np.float64)
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return OrdinalReport(**values, mae=mean_distance(confusion), quadratic_kappa=quadratic_kappa(confusion))


def mean_distance(confusion: FloatArray) -> Estimate:
    """Return the mean distance between predicted and true level, given rows by true and predicted level `[C, C]`."""
    rows = float(confusion.sum())
    if not rows:
        return Estimate.undefined(_NO_ROWS)
    places = np.arange(len(confusion))
    distance = np.abs(places[:, None] - places)
    mean = float((confusion * distance).sum() / rows)
    square = float((confusion * distance**2).sum() / rows)
    error = math.sqrt(max(square - mean**2, 0.0) / max(rows - 1, 1))
    return Estimate(mean, max(mean - _Z * error, 0.0), mean + _Z * error)


def quadratic_kappa(confusion: FloatArray) -> Estimate:
    """Return Cohen's kappa with quadratic weights (Cohen, Psychological Bulletin, 1968).

    The standard error is that of large samples (Fleiss, Cohen & Everitt, Psychological Bulletin, 1969).

    Args:
        confusion: `[C, C]`, rows by true and predicted level.
    """
    rows = float(confusion.sum())
    if not rows:
        return Estimate.undefined(_NO_ROWS)
    shares = confusion / rows
    places = np.arange(len(confusion))
    agreement = 1 - ((places[:, None] - places) / (len(places) - 1)) ** 2
    true, predicted = shares.sum(1), shares.sum(0)
    expected = float(true @ agreement @ predicted)
    if expected >= 1 - 1e-12:
        return Estimate.undefined(_ONE_LEVEL)
    kappa = (float((shares * agreement).sum()) - expected) / (1 - expected)
    margins = (agreement @ predicted)[:, None] + agreement.T @ true
    inner = float((shares * (agreement - margins * (1 - kappa)) ** 2).sum())
    variance = max(inner - (kappa - expected * (1 - kappa)) ** 2, 0.0)
    error = math.sqrt(variance / rows) / (1 - expected)
    return Estimate(kappa, max(kappa - _Z * error, -1.0), min(kappa + _Z * error, 1.0))
