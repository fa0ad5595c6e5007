"""Regression sums over rows with real targets: moments of predictions and errors, and residual counts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Arrays, as_float64, check_form

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PREDICTION_BINS = 20
"""Number of bins of equal width for predictions, from `REACH` spreads below the centre to `REACH` above."""

REACH = 3.0

RESIDUAL_STEP = 0.02
RESIDUAL_BINS = 810
"""Number of bins for absolute residuals: the first ends at `LEAST_RESIDUAL` spreads, the last is open, the others are
2 % wide."""

LEAST_RESIDUAL = 1e-4

_LARGEST = 1e60
_POWERS = 6
"""Number of per-row values in the products: 1, target, error, squared target, squared error, absolute error."""


@dataclass(frozen=True, eq=False)
class RegressionSums:
    """Sums over rows of one head's predictions of `K` real targets; they add across sites.

    Targets and predictions are centred and scaled by the bins' centre and spread, which avoids cancellation.

    Attributes:
        bins: the centre and spread of each target, the same at every site.
        moments: `[K, 6, 6]`, float64, the sum of the outer products of `(1, t, e, t^2, e^2, |e|)`, with `t` the target
            and `e` the prediction minus the target.
        counts: `[K, PREDICTION_BINS]`, int64, rows by predicted value.
        predicted: `[K, PREDICTION_BINS]`, the sum of the predictions in each bin.
        observed: `[K, PREDICTION_BINS]`, the sum of the targets in each bin.
    """

    bins: ScoreBins
    moments: FloatArray
    counts: IntArray
    predicted: FloatArray
    observed: FloatArray

    @classmethod
    def zeros(cls, bins: ScoreBins) -> Self:
        """Return the sums over no rows."""
        shape = (len(bins.centre), PREDICTION_BINS)
        moments = np.zeros((len(bins.centre), _POWERS, _POWERS))
        return cls(bins, moments, np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))

    @property
    def num_targets(self) -> int:
        """`K`."""
        return len(self.moments)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.moments[0, 0, 0])

    def __add__(self, other: Self) -> Self:
        if not (
            np.array_equal(self.bins.centre, other.bins.centre) and np.array_equal(self.bins.spread, other.bins.spread)
        ):
            raise ValueError("Cannot add sums about different centres, or in different units.")
        return replace(
            self,
            moments=self.moments + other.moments,
            counts=self.counts + other.counts,
            predicted=self.predicted + other.predicted,
            observed=self.observed + other.observed,
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire; both sides know the bins."""
        return {
            "moments": self.moments,
            "counts": self.counts.astype(np.uint32),
            "predicted": self.predicted,
            "observed": self.observed,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: sums with the requested bins.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays(), _LARGEST)
        sums = replace(
            like,
            moments=np.array(arrays["moments"]),
            counts=arrays["counts"].astype(np.int64),
            predicted=np.array(arrays["predicted"]),
            observed=np.array(arrays["observed"]),
        )
        diagonal = np.sqrt(np.maximum(sums.moments.diagonal(axis1=1, axis2=2), 0))
        rows = sums.moments[:, 0, 0]
        if (rows != np.rint(rows)).any() or (rows != rows[0]).any() or rows[0] < 0:
            raise ValueError("'moments' has a row count that is not whole or differs between targets")
        if (np.abs(sums.moments) > diagonal[:, :, None] * diagonal[:, None] * (1 + 1e-6)).any():
            raise ValueError("'moments' has a sum of products larger than its sums of squares allow")
        if (sums.counts.sum(1) != rows).any():
            raise ValueError("'counts' and 'moments' count different numbers of rows")
        if (sums.predicted[sums.counts == 0] != 0).any() or (sums.observed[sums.counts == 0] != 0).any():
            raise ValueError("a bin without rows has a nonzero sum")
        return sums


def regression_sums(
    outputs: "FloatArray | Tensor",
    targets: "FloatArray | Tensor",
    owners: IntArray,
    num_sites: int,
    bins: ScoreBins,
) -> Iterator[RegressionSums]:
    """Sum the rows of many sites at once.

    Args:
        outputs: `[n, K]`, predictions in the targets' own units, of all sites' rows in any order.
        targets: `[n, K]`, real.
        owners: `[n]`, the site of each row, from 0 to `num_sites - 1`.
        num_sites: `S`.
        bins: the centre and spread of each target.

    Yields:
        The sums of sites `0` to `S - 1`.

    Raises:
        ValueError: if a shape does not fit or a prediction is not finite.
    """
    predicted, true = _standardised(outputs, targets, bins)
    error = predicted - true
    columns = [np.ones_like(true), true, error, true**2, error**2, np.abs(error)]
    powers = np.stack(columns, axis=2)
    place = np.floor((predicted + REACH) * (PREDICTION_BINS / (2 * REACH)))
    place = np.clip(place, 0, PREDICTION_BINS - 1).astype(np.int64)
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(num_sites + 1))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        rows = order[first:last]
        own = powers[rows]
        yield RegressionSums(
            bins,
            np.einsum("nki,nkj->kij", own, own),
            *(_binned(place[rows], weights) for weights in (None, predicted[rows], true[rows])),
        )


def _binned(place: IntArray, weights: FloatArray | None) -> Any:
    """Return `[K, PREDICTION_BINS]`, the number of rows in each bin, or the sums of their weights `[n, K]`."""
    columns = [
        np.bincount(place[:, k], None if weights is None else weights[:, k], PREDICTION_BINS)
        for k in range(place.shape[1])
    ]
    return np.stack(columns).astype(np.int64 if weights is None else np.float64)


@dataclass(frozen=True, eq=False)
class ResidualSums:
    """Counts of rows by absolute residual, for prediction intervals; they add across sites.

    Attributes:
        spread: `[K]`, the unit of each target's bins.
        counts: `[K, RESIDUAL_BINS]`, int64.
    """

    spread: FloatArray
    counts: IntArray

    @classmethod
    def zeros(cls, bins: ScoreBins) -> Self:
        """Return the counts of no rows."""
        return cls(bins.spread, np.zeros((len(bins.spread), RESIDUAL_BINS), np.int64))

    @classmethod
    def from_outputs(cls, outputs: "FloatArray | Tensor", targets: "FloatArray | Tensor", bins: ScoreBins) -> Self:
        """Count rows with predictions `[n, K]` and targets `[n, K]`.

        Raises:
            ValueError: if a shape does not fit or a prediction is not finite.
        """
        predicted, true = _standardised(outputs, targets, bins)
        places = residual_bins(np.abs(predicted - true))
        counts = [np.bincount(places[:, k], minlength=RESIDUAL_BINS) for k in range(places.shape[1])]
        return cls(bins.spread, np.stack(counts).astype(np.int64))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.counts[0].sum())

    def __add__(self, other: Self) -> Self:
        if not np.array_equal(self.spread, other.spread):
            raise ValueError("Cannot add residuals in different units.")
        return replace(self, counts=self.counts + other.counts)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the counts, for the wire; both sides know the units."""
        return {"counts": self.counts.astype(np.uint32)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or targets have different numbers of rows.
        """
        check_form(arrays, like.to_arrays(), _LARGEST)
        counts = arrays["counts"].astype(np.int64)
        if (counts.sum(1) != counts[0].sum()).any():
            raise ValueError("'counts' has different numbers of rows for different targets")
        return cls(like.spread, counts)


def residual_bins(sizes: FloatArray) -> IntArray:
    """Return the bins of absolute residuals, in spreads; a value on an edge belongs to the lower bin."""
    with np.errstate(divide="ignore"):
        steps = np.log(sizes / LEAST_RESIDUAL) / RESIDUAL_STEP
    # Rounding up slightly keeps a bin's values below its upper edge as computed.
    places = np.ceil(steps * (1 + 1e-12) + 1e-9)
    return np.clip(places, 0, RESIDUAL_BINS - 1).astype(np.int64)


def upper_edge(place: int) -> float:
    """Return the upper edge of a residual bin, in spreads; infinite for the last."""
    return math.inf if place >= RESIDUAL_BINS - 1 else LEAST_RESIDUAL * math.exp(place * RESIDUAL_STEP)


def _standardised(
    outputs: "FloatArray | Tensor", targets: "FloatArray | Tensor", bins: ScoreBins
) -> tuple[FloatArray, FloatArray]:
    predicted, true = as_float64(outputs), as_float64(targets)
    columns = len(bins.centre)
    if predicted.ndim != 2 or predicted.shape[1] != columns or predicted.shape != true.shape:
        raise ValueError(
            f"Predictions and targets must both be [n, {columns}], not {list(predicted.shape)} and {list(true.shape)}."
        )
    if not np.isfinite(predicted).all() or (np.abs((predicted - bins.centre) / bins.spread) > _LARGEST**0.25).any():
        raise ValueError("The head produces predictions that are not finite or far beyond the targets.")
    return (predicted - bins.centre) / bins.spread, (true - bins.centre) / bins.spread
