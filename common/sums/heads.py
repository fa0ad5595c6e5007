"""Results of training or evaluating a head: they add across sites, each head weighted by its training rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, check_form

FloatArray = npt.NDArray[np.float64]

METRICS = ("examples", "train_loss", "held_out", "loss_sum", "score")
"""Columns of a site's metrics for a head, float64: training rows and their mean loss, then held-out rows and, for the
received head, the summed loss and the summed score (for classes, the number of correct rows)."""

EXAMPLES, TRAIN_LOSS, HELD_OUT, LOSS_SUM, SCORE = range(len(METRICS))

TABLE = "metrics"
"""Name of the metrics on the wire, `[k, len(METRICS)]`."""


@dataclass(frozen=True, eq=False)
class HeadSums:
    """Sums over sites of trained heads times their `n` training rows, and of metrics, stored as means of the heads.

    A mean of float32 heads takes half the bytes of a sum, and no bit of a single site's head is lost.

    Attributes:
        heads: by name, the mean of the trained heads, weighted by training rows, in float64 after an addition; empty
            after an evaluation.
        metrics: `[len(METRICS)]` float64; the training loss is a mean over training rows, all others are sums.
        counted: whether scores are numbers of rows.
    """

    heads: Arrays = field(default_factory=dict)
    metrics: FloatArray = field(default_factory=lambda: np.zeros(len(METRICS)))
    counted: bool = True

    @property
    def examples(self) -> int:
        """The number of training rows `n`."""
        return int(self.metrics[EXAMPLES])

    @property
    def rows(self) -> int:
        """The number of training and held-out rows."""
        return self.examples + int(self.metrics[HELD_OUT])

    def weighted(self) -> dict[str, FloatArray]:
        """Return, by name, the sums of trained heads times their training rows, float64."""
        return {name: np.multiply(head, self.metrics[EXAMPLES], dtype=np.float64) for name, head in self.heads.items()}

    def totals(self) -> FloatArray:
        """Return the metrics `[len(METRICS)]` as sums: the training loss is multiplied by the training rows."""
        return total_metrics(self.metrics[None])

    @classmethod
    def from_sums(cls, weighted: Mapping[str, FloatArray], totals: FloatArray, *, counted: bool = True) -> Self:
        """Return the results with the given `weighted()` and `totals()`; heads are 0 without training rows."""
        examples = max(float(totals[EXAMPLES]), 1.0)
        return cls({name: value / examples for name, value in weighted.items()}, mean_loss(totals), counted)

    def __add__(self, other: Self) -> Self:
        if self.heads.keys() != other.heads.keys() or self.counted != other.counted:
            raise ValueError("Results of heads of different forms cannot be added.")
        own, others = self.weighted(), other.weighted()
        return self.from_sums(
            {name: own[name] + others[name] for name in own}, self.totals() + other.totals(), counted=self.counted
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the heads, and the metrics as `[1, len(METRICS)]`."""
        return {**self.heads, TABLE: self.metrics[None]}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: results with a head of the expected form, and the expected kind of scores.

        Raises:
            ValueError: for other names, shapes or types, for values that are not finite, and for impossible counts.
        """
        heads = dict(arrays)
        table = heads.pop(TABLE, np.empty(0))
        check_form(heads, like.heads)
        check_metrics(table, 1, counted=like.counted)
        return cls(heads, np.array(table[0]), like.counted)


def total_metrics(table: FloatArray) -> FloatArray:
    """Return the metrics `[len(METRICS)]` over several sites as sums, from one row per site; see `HeadSums.totals`."""
    table = table.copy()
    table[:, TRAIN_LOSS] *= table[:, EXAMPLES]
    totals: FloatArray = table.sum(axis=0)
    return totals


def mean_metrics(table: FloatArray) -> FloatArray:
    """Return the metrics `[len(METRICS)]` over several sites as `HeadSums.metrics`, from one row per site."""
    return mean_loss(total_metrics(table))


def mean_loss(totals: FloatArray) -> FloatArray:
    """Return summed metrics `[len(METRICS)]` as `HeadSums.metrics`: the training loss is divided by its rows."""
    metrics = totals.copy()
    metrics[TRAIN_LOSS] /= max(metrics[EXAMPLES], 1.0)
    return metrics


def check_metrics(table: npt.NDArray[Any], sites: int, *, counted: bool = True) -> None:
    """Validate a table of `METRICS`, one row per site; with `counted`, scores are numbers of rows.

    Raises:
        ValueError: if it has another form, or impossible counts.
    """
    if table.dtype != np.float64 or table.shape != (sites, len(METRICS)):
        raise ValueError(f"its metrics are {table.dtype}{list(table.shape)}, not float64[{sites}, {len(METRICS)}]")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("its metrics are not finite or negative")
    counts = table[:, [EXAMPLES, HELD_OUT, SCORE] if counted else [EXAMPLES, HELD_OUT]]
    if (counts != np.rint(counts)).any() or (counts[:, -1] > counts[:, 1]).any():
        raise ValueError("its counts are not whole, or it counts more correct rows than held-out ones")
