"""Metrics of survival models from sums: concordance with an interval, Kaplan-Meier curves and calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.metrics import Estimate, as_json
from fedhead.sums.survival import SurvivalSums

FloatArray = npt.NDArray[np.float64]

LEAST_CELL = 5
"""Rows at risk below which a curve ends: a point would rest on few rows."""

_Z = 1.959963984540054
_NO_PAIRS = "No two rows can be compared: there are no events, or no rows at risk after them."


@dataclass(frozen=True)
class SurvivalReport:
    """Metrics of a head on the rows of one site, or of all sites pooled.

    Attributes:
        rows: the number of rows.
        events: the number of events up to the last edge.
        loss: the mean negative log-likelihood in nats; None without rows.
        concordance: the share of comparable pairs of rows in which the row with the earlier event has the higher risk.
        expected: the ratio of expected to observed events; None without events.
        edges: the upper edge of each time bin.
        curve: the actuarial estimate of survival at each edge, with its interval; None from the first bin with fewer
            than `LEAST_CELL` rows at risk.
        predicted: the survival by the mean predicted hazards, likewise.
    """

    rows: int
    events: int
    loss: float | None
    concordance: Estimate
    expected: float | None
    edges: tuple[float, ...]
    curve: tuple[tuple[float, float, float] | None, ...]
    predicted: tuple[float | None, ...]

    @property
    def score(self) -> Estimate:
        """Concordance."""
        return self.concordance

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        return {
            "rows": self.rows,
            "events": self.events,
            "loss": self.loss,
            **as_json({"concordance": self.concordance}),
            "expected_to_observed": self.expected,
            "edges": list(self.edges),
            "survival": [None if one is None else list(one) for one in self.curve],
            "predicted_survival": list(self.predicted),
        }


def survival_report(sums: SurvivalSums, edges: Sequence[float]) -> SurvivalReport:
    """Compute metrics with intervals from the sums of one site, or of several added."""
    observed = int(sums.events.sum())
    return SurvivalReport(
        rows=sums.rows,
        events=observed,
        loss=sums.loss_sum / sums.rows if sums.rows else None,
        concordance=concordance(sums),
        expected=float(sums.expected.sum()) / observed if observed else None,
        edges=tuple(edges),
        curve=kaplan_meier(sums.events.sum(1), sums.at_risk.sum(1), sums.lost),
        predicted=_predicted(sums),
    )


def concordance(sums: SurvivalSums) -> Estimate:
    """Return Harrell's C (JAMA, 1982) on binned times and risks, ties of risk counting one half.

    A pair is comparable if one row has its event in a bin through which the other is followed without an event. The
    interval is that of the infinitesimal jackknife, whose terms follow from the counts exactly.
    """
    events = sums.events.astype(np.float64)
    left = (sums.at_risk - sums.events).astype(np.float64)
    below = np.cumsum(left, axis=1) - left / 2
    above = events.sum(1, keepdims=True) - np.cumsum(events, axis=1) + events / 2
    pairs = float((events * left.sum(1, keepdims=True)).sum())
    if not pairs:
        return Estimate.undefined(_NO_PAIRS)
    value = float((events * below).sum()) / pairs
    # Each row's excess of concordant pairs, as the one with the event and as the one without.
    own = below - value * left.sum(1, keepdims=True)
    others = np.cumsum(above - value * events.sum(1, keepdims=True), axis=0)
    earlier = np.vstack([np.zeros((1, others.shape[1])), others[:-1]])
    lost = left - np.vstack([sums.at_risk[1:], np.zeros((1, left.shape[1]))])
    squares = (events * (own + earlier) ** 2).sum() + (lost * others**2).sum()
    error = math.sqrt(float(squares)) / pairs
    return Estimate(value, max(value - _Z * error, 0.0), min(value + _Z * error, 1.0))


def kaplan_meier(events: Any, at_risk: Any, lost: Any = 0) -> tuple[tuple[float, float, float] | None, ...]:
    """Return survival at the end of each bin with 95 % limits (Kaplan & Meier, 1958; Greenwood's variance, log-log).

    A row last seen within a bin is at risk for half of it, as in actuarial life tables (Cutler & Ederer, 1958).

    Args:
        events: `[B]`, events in each bin.
        at_risk: `[B]`, rows followed through each bin, or to an event in it.
        lost: `[B]`, the other rows without an event before the bin: those last seen within it.
    """
    points: list[tuple[float, float, float] | None] = []
    survival, variance, ended = 1.0, 0.0, False
    exposed = np.asarray(at_risk) + np.asarray(lost) / 2
    columns = np.asarray(events).tolist(), np.asarray(at_risk).tolist(), exposed.tolist()
    for happened, followed, rows in zip(*columns, strict=True):
        ended = ended or followed < LEAST_CELL
        if ended:
            points.append(None)
            continue
        survival *= 1 - happened / rows
        variance += happened / (rows * (rows - happened)) if rows > happened else math.inf
        points.append((survival, *_limits(survival, variance)))
    return tuple(points)


def _limits(survival: float, variance: float) -> tuple[float, float]:
    if not 0 < survival < 1 or not math.isfinite(variance):
        return survival, survival
    width = _Z * math.sqrt(variance) / abs(math.log(survival))
    return survival ** math.exp(width), survival ** math.exp(-width)


def _predicted(sums: SurvivalSums) -> tuple[float | None, ...]:
    points: list[float | None] = []
    survival, ended = 1.0, False
    for expected, rows in zip(sums.expected.tolist(), sums.at_risk.sum(1).tolist(), strict=True):
        ended = ended or rows < LEAST_CELL
        survival *= 1 - expected / rows if rows else 1.0
        points.append(None if ended else survival)
    return tuple(points)


def time_bins(sums: SurvivalSums, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Return rows at risk, and events expected and observed, in each time bin, as JSON types.

    Bins from the first one with fewer than `LEAST_CELL` rows at risk on are left out.
    """
    found: list[dict[str, Any]] = []
    columns = sums.at_risk.sum(1).tolist(), sums.expected.tolist(), sums.events.sum(1).tolist()
    for until, rows, expected, observed in zip(edges, *columns, strict=True):
        if rows < LEAST_CELL:
            break
        found.append({"until": until, "rows": rows, "expected": expected, "observed": observed})
    return found
