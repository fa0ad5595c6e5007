"""Metrics of real targets with 95 % intervals: R2 and errors, from sums that add across sites.

Intervals use the delta method and treat rows as independent draws. With grouped rows they are too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.metrics import Estimate, as_json
from fedhead.sums.regression import PREDICTION_BINS, REACH, RegressionSums, ResidualSums, upper_edge

FloatArray = npt.NDArray[np.float64]

COVERAGES = (0.5, 0.8, 0.9, 0.95)
"""Nominal coverages of the prediction intervals in a report."""

_Z = 1.959963984540054
_NO_ROWS = "There are no rows."
_ONE_VALUE = "This target has the same value in all rows."
_NO_TARGET = "No target varies among the rows."
_FEW_ROWS = "There is only one row."

_TARGET, _ERROR, _TARGET_SQUARED, _ERROR_SQUARED, _SIZE = range(1, 6)


@dataclass(frozen=True)
class TargetReport:
    """Metrics of one target; errors are in the target's own units.

    Attributes:
        name: the name of the target.
        rows: the number of rows.
        r2: the explained share of the target's variance among these rows; below 0, the mean predicts better.
        mae: the mean absolute error.
        rmse: the root mean squared error.
        bias: the mean of prediction minus target.
        deviation: the target's standard deviation among the rows; None without rows.
    """

    name: str
    rows: int
    r2: Estimate
    mae: Estimate
    rmse: Estimate
    bias: Estimate
    deviation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        figures = {"r2": self.r2, "mae": self.mae, "rmse": self.rmse, "bias": self.bias}
        return {"name": self.name, "rows": self.rows, **as_json(figures), "deviation": self.deviation}


@dataclass(frozen=True)
class RegressionReport:
    """Metrics of a head on the targets of one site's rows, or of all sites' rows pooled.

    Attributes:
        rows: the number of rows.
        loss: half the mean squared error, in units of the targets' pooled standard deviations; None without rows.
        r2: the mean of the targets' R2.
        targets: a report for each target.
    """

    rows: int
    loss: float | None
    r2: Estimate
    targets: tuple[TargetReport, ...]

    @property
    def score(self) -> Estimate:
        """R2."""
        return self.r2

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        targets = [each.to_dict() for each in self.targets]
        return {"rows": self.rows, "loss": self.loss, **as_json({"r2": self.r2}), "targets": targets}


def regression_report(sums: RegressionSums, names: Sequence[str]) -> RegressionReport:
    """Compute metrics with intervals.

    Args:
        sums: the sums of one site, or of several added.
        names: the names of the `K` targets.
    """
    units = sums.bins.spread.tolist()
    targets = tuple(
        _target(name, moments, unit) for name, moments, unit in zip(names, sums.moments, units, strict=True)
    )
    loss = float(sums.moments[:, 0, _ERROR_SQUARED].mean()) / 2 / sums.rows if sums.rows else None
    return RegressionReport(sums.rows, loss, _mean_r2([one.r2 for one in targets], sums.rows), targets)


def _target(name: str, sums: FloatArray, unit: float) -> TargetReport:
    rows = int(sums[0, 0])
    if rows == 0:
        none = Estimate.undefined(_NO_ROWS)
        return TargetReport(name, 0, none, none, none, none, None)
    means, covariance = sums[0] / rows, sums / rows
    covariance = covariance - np.outer(means, means)
    variance = max(float(covariance[_TARGET, _TARGET]), 0.0)
    errors = covariance * (rows / max(rows - 1, 1) / rows)
    rmse = math.sqrt(means[_ERROR_SQUARED])
    return TargetReport(
        name=name,
        rows=rows,
        r2=_r2(means, errors, variance, rows),
        mae=_estimate(means[_SIZE] * unit, _root(errors[_SIZE, _SIZE]) * unit, rows, least=0.0),
        rmse=_estimate(
            rmse * unit,
            _root(errors[_ERROR_SQUARED, _ERROR_SQUARED]) / (2 * rmse) * unit if rmse else 0.0,
            rows,
            least=0.0,
        ),
        bias=_estimate(means[_ERROR] * unit, _root(errors[_ERROR, _ERROR]) * unit, rows),
        deviation=math.sqrt(variance) * unit,
    )


def _r2(means: FloatArray, errors: FloatArray, variance: float, rows: int) -> Estimate:
    """Return `1 - mean(e^2) / (mean(t^2) - mean(t)^2)`, with the variance of its first-order expansion."""
    floor = 4 * np.finfo(np.float64).eps * rows * float(means[_TARGET_SQUARED])
    if variance <= floor:
        return Estimate.undefined(_ONE_VALUE)
    unexplained = float(means[_ERROR_SQUARED]) / variance
    gradient = np.zeros(len(means))
    gradient[_ERROR_SQUARED] = -1 / variance
    gradient[_TARGET_SQUARED] = unexplained / variance
    gradient[_TARGET] = -2 * means[_TARGET] * unexplained / variance
    return _estimate(1 - unexplained, _root(float(gradient @ errors @ gradient)), rows, most=1.0)


def _estimate(value: float, error: float, rows: int, *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    if rows < 2:
        return Estimate(float(value), None, None, _FEW_ROWS)
    reach = _Z * error
    return Estimate(float(value), float(max(value - reach, least)), float(min(value + reach, most)))


def _mean_r2(each: Sequence[Estimate], rows: int) -> Estimate:
    """Return the mean, with the mean distance of the limits, since one row's targets may be dependent in any way."""
    known = [one for one in each if one.value is not None]
    if not known:
        return Estimate.undefined(_NO_TARGET if rows else _NO_ROWS)
    if any(one.low is None for one in known):
        return Estimate(_average([one.value for one in known]), None, None, _FEW_ROWS)
    return Estimate(
        _average([one.value for one in known]),
        _average([one.low for one in known]),
        _average([one.high for one in known]),
    )


def _average(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


def prediction_curve(sums: RegressionSums) -> list[dict[str, list[Any]]]:
    """Return the mean observed value by predicted value for each target, in the target's own units.

    Each entry has `rows`, `predicted` and `observed`, `PREDICTION_BINS` values each; the means of an empty bin are
    None.
    """
    curves = []
    for place in range(sums.num_targets):
        centre, spread = float(sums.bins.centre[place]), float(sums.bins.spread[place])
        counts = sums.counts[place].tolist()
        curve: dict[str, list[Any]] = {"rows": counts}
        for name, totals in (("predicted", sums.predicted[place]), ("observed", sums.observed[place])):
            curve[name] = [
                centre + spread * total / count if count else None
                for total, count in zip(totals.tolist(), counts, strict=True)
            ]
        curves.append(curve)
    return curves


def bin_edges(centre: float, spread: float) -> list[float]:
    """Return the `PREDICTION_BINS + 1` edges of a target's bins; the first and last bins are open."""
    return [centre + spread * (2 * REACH * place / PREDICTION_BINS - REACH) for place in range(PREDICTION_BINS + 1)]


def half_width(counts: Sequence[int], spread: float, coverage: float) -> float:
    """Return the half-width of a prediction interval that contains a new row's target with probability `coverage`.

    Split-conformal prediction (Vovk, Gammerman & Shafer, 2005; Lei et al., JASA 2018): the guarantee holds for rows
    from the distribution of the counted ones, on average over all of them and not for each site.

    Args:
        counts: `RESIDUAL_BINS`, rows by absolute residual.
        spread: the unit of the bins.
        coverage: between 0 and 1.

    Returns:
        Infinity if too few rows were counted to guarantee a finite width.

    Raises:
        ValueError: if `coverage` is not between 0 and 1, or no rows were counted.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"A coverage must be between 0 and 1, not {coverage:g}.")
    rows = sum(counts)
    if rows == 0:
        raise ValueError("Prediction intervals need held-out rows, but none were counted.")
    needed = math.ceil((rows + 1) * coverage)
    if needed > rows:
        return math.inf
    return upper_edge(int(np.searchsorted(np.cumsum(counts), needed))) * spread


def interval_coverage(chosen: ResidualSums, judged: ResidualSums) -> list[list[dict[str, float | None]]]:
    """Return the coverage on `judged` of each target's intervals from `chosen`, for each of `COVERAGES`.

    Each entry has the nominal `coverage`, the `half_width` in the target's own units (None if unbounded) and the
    actual coverage `held`.
    """
    targets = []
    for place, (made, tested) in enumerate(zip(chosen.counts.tolist(), judged.counts.tolist(), strict=True)):
        spread = float(chosen.spread[place])
        lines: list[dict[str, float | None]] = []
        for coverage in COVERAGES:
            width = half_width(made, 1.0, coverage)
            held = sum(count for bin_, count in enumerate(tested) if upper_edge(bin_) <= width) / max(sum(tested), 1)
            finite = math.isfinite(width)
            lines.append(
                {"coverage": coverage, "half_width": width * spread if finite else None, "held": held if finite else 1}
            )
        targets.append(lines)
    return targets
