"""Survival sums: events and rows at risk by time bin and predicted risk, for concordance, calibration and curves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, added, check_form

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RISK_BINS = 160
"""Number of bins of the logarithm of the cumulative hazard, from `LEAST_RISK` to `LARGEST_RISK`; both ends are open."""

LEAST_RISK, LARGEST_RISK = -10.0, 3.0

_LARGEST = 1e12


@dataclass(frozen=True, eq=False)
class SurvivalSums:
    """Counts of rows of one head's predicted hazards in `B` time bins; they add across sites.

    A row is at risk in a bin if it had no event before, and was followed to its end or to an event in it. Hazards are
    summed over all rows at risk: a row is often alone in a bin of risk, where a sum would be its own hazards.

    Attributes:
        rows: the number of rows.
        events: `[B, RISK_BINS]`, int64, events by time bin and by predicted risk at the last edge.
        at_risk: `[B, RISK_BINS]`, int64, rows at risk, likewise.
        expected: `[B]`, the sum of the predicted hazards of the rows at risk.
        loss_sum: the summed negative log-likelihood in nats.
    """

    rows: int
    events: IntArray
    at_risk: IntArray
    expected: FloatArray
    loss_sum: float

    @property
    def lost(self) -> IntArray:
        """`[B]`, the rows without an event that were last seen within each bin."""
        events, risk = self.events.sum(1), self.at_risk.sum(1)
        lost: IntArray = np.concatenate([[self.rows], (risk - events)[:-1]]) - risk
        return lost

    @classmethod
    def zeros(cls, bins: int) -> Self:
        """Return the sums over no rows."""
        shape = (bins, RISK_BINS)
        return cls(0, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(bins), 0.0)

    def __add__(self, other: Self) -> Self:
        if self.events.shape != other.events.shape:
            raise ValueError("Cannot add counts of different time bins.")
        return added(self, other)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire."""
        return {
            "rows": np.array([self.rows], np.uint32),
            "events": self.events.astype(np.uint32),
            "at_risk": self.at_risk.astype(np.uint32),
            "expected": self.expected,
            "loss_sum": np.array([self.loss_sum]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays(), _LARGEST)
        sums = cls(
            int(arrays["rows"][0]),
            arrays["events"].astype(np.int64),
            arrays["at_risk"].astype(np.int64),
            np.array(arrays["expected"]),
            float(arrays["loss_sum"][0]),
        )
        left = sums.at_risk - sums.events
        if (left < 0).any() or (sums.at_risk[1:] > left[:-1]).any() or sums.at_risk[:1].sum() > sums.rows:
            raise ValueError("'events' and 'at_risk' contradict each other")
        rows = sums.at_risk.sum(1)
        slack = 1e-9 * (1 + rows)
        if (sums.expected < -slack).any() or (sums.expected > rows + slack).any() or sums.loss_sum < 0:
            raise ValueError("'expected' or 'loss_sum' is out of range")
        return sums


def survival_sums(logits: "Tensor", marks: "Tensor", owners: IntArray, num_sites: int) -> Iterator[SurvivalSums]:
    """Sum the rows of many sites.

    Args:
        logits: `[n, B]`, of the hazards.
        marks: `[n, 2 B]`, 1 for the bin of an event, then 1 for each bin at risk; else 0.
        owners: `[n]`, the site of each row, below `num_sites`.
        num_sites: `S`.

    Yields:
        The sums of sites `0` to `S - 1`.

    Raises:
        ValueError: if a logit is not finite.
    """
    values = logits.detach().cpu().double().numpy()
    table = marks.detach().cpu().numpy().astype(np.int64)
    bins = values.shape[1]
    if not np.isfinite(values).all():
        raise ValueError("The head produces hazards that are not finite.")
    event, risk = table[:, :bins], table[:, bins:]
    # log(1 + e^x) is the negative logarithm of the survival of a bin.
    softplus = np.logaddexp(0, values)
    losses = ((softplus - values * event) * risk).sum(1)
    places = risk_bins(softplus.sum(1))
    hazards = np.exp(values - softplus)
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(num_sites + 1))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        rows = order[first:last]
        marked = np.zeros((len(rows), RISK_BINS))
        marked[np.arange(len(rows)), places[rows]] = 1
        yield SurvivalSums(
            len(rows),
            np.rint(event[rows].T @ marked).astype(np.int64),
            np.rint(risk[rows].T @ marked).astype(np.int64),
            (hazards[rows] * risk[rows]).sum(0),
            float(losses[rows].sum()),
        )


def risk_bins(cumulative: FloatArray) -> IntArray:
    """Return the bins of cumulative hazards."""
    with np.errstate(divide="ignore"):
        logarithm = np.log(cumulative)
    step = (LARGEST_RISK - LEAST_RISK) / RISK_BINS
    return np.clip(np.floor((np.maximum(logarithm, LEAST_RISK) - LEAST_RISK) / step), 0, RISK_BINS - 1).astype(np.int64)
