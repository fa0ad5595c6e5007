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

CURVE: FloatArray = np.geomspace(0.25, 4, 17)
"""Temperatures `[K]` at which the held-out losses of tuned heads are summed, in columns after `METRICS`."""

WIDTHS = (len(METRICS), len(METRICS) + len(CURVE))
"""Numbers of columns of metrics, without and with the losses at `CURVE`."""

TABLE = "metrics"
"""Name of the metrics on the wire, `[k, len(METRICS)]`; `[len(METRICS)]` if they add as arrays."""

LARGEST = 1e15
"""Limit on the magnitude of a summed change of a parameter, or of a summed metric."""

_CHANGE = "update."


@dataclass(frozen=True, eq=False)
class HeadSums:
    """Sums over sites of trained heads times their `n` training rows, and of metrics, stored as means of the heads.

    A mean of float32 heads takes half the bytes of a sum, and no bit of a single site's head is lost. For secure
    summation, which adds arrays, `base` is set: then heads leave as sums of their changes times their training rows.

    Attributes:
        heads: by name, the mean of the trained heads, weighted by training rows, in float64 after an addition; empty
            after an evaluation.
        metrics: `[len(METRICS)]` float64; the training loss is a mean over training rows, all others are sums. Of tuned
            heads `[len(METRICS) + K]`, with the held-out losses at `CURVE`.
        counted: whether scores are numbers of rows.
        base: the head that changes are relative to, if arrays have to add; None for means.
    """

    heads: Arrays = field(default_factory=dict)
    metrics: FloatArray = field(default_factory=lambda: np.zeros(len(METRICS)))
    counted: bool = True
    base: Arrays | None = None

    @classmethod
    def unchanged(cls, base: Arrays, width: int = len(METRICS)) -> Self:
        """Return results over no rows whose arrays add; `base` is empty if heads are only evaluated."""
        return cls(dict(base), np.zeros(width), base=base)

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
    def from_sums(
        cls,
        weighted: Mapping[str, FloatArray],
        totals: FloatArray,
        *,
        counted: bool = True,
        base: Arrays | None = None,
    ) -> Self:
        """Return the results with the given `weighted()` and `totals()`; heads are 0 without training rows."""
        examples = max(float(totals[EXAMPLES]), 1.0)
        return cls({name: value / examples for name, value in weighted.items()}, mean_loss(totals), counted, base)

    def __add__(self, other: Self) -> Self:
        if self.heads.keys() != other.heads.keys() or self.counted != other.counted:
            raise ValueError("Results of heads of different forms cannot be added.")
        own, others = self.weighted(), other.weighted()
        weighted, totals = {name: own[name] + others[name] for name in own}, self.totals() + other.totals()
        return self.from_sums(weighted, totals, counted=self.counted, base=self.base)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the heads, and the metrics as `[1, len(METRICS)]`; with `base`, arrays that add."""
        if self.base is None:
            return {**self.heads, TABLE: self.metrics[None]}
        rows = float(self.metrics[EXAMPLES])
        changes = {
            f"{_CHANGE}{name}": rows * (head.astype(np.float64) - self.base[name].astype(np.float64))
            for name, head in self.heads.items()
        }
        return {**changes, TABLE: self.totals()}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: results with a head of the expected form, the expected kind of scores, and the same base if any.

        Raises:
            ValueError: for other names, shapes or types, for values that are not finite, and for impossible counts.
        """
        if like.base is not None:
            return cls._from_changes(arrays, like, like.base)
        heads = dict(arrays)
        table = heads.pop(TABLE, np.empty(0))
        check_form(heads, like.heads)
        check_metrics(table, 1, counted=like.counted, width=len(like.metrics))
        return cls(heads, np.array(table[0]), like.counted)

    @classmethod
    def _from_changes(cls, arrays: Arrays, like: Self, base: Arrays) -> Self:
        """Return results from arrays that add, whose heads have the number types of `base`; `base` without rows."""
        check_form(arrays, like.to_arrays(), LARGEST)
        totals = np.array(arrays[TABLE])
        counts = totals[[EXAMPLES, HELD_OUT]]
        if (totals < 0).any() or (counts != np.rint(counts)).any():
            raise ValueError("its metrics are negative, or its rows are not whole numbers")
        if (not totals[EXAMPLES] and totals[TRAIN_LOSS]) or (not totals[HELD_OUT] and totals[LOSS_SUM:].any()):
            raise ValueError("it has losses or scores without rows")
        examples = float(totals[EXAMPLES])
        changes = {name: arrays[f"{_CHANGE}{name}"] for name in base}
        if not examples and any(value.any() for value in changes.values()):
            raise ValueError("it changes the head without training rows")
        heads = {
            name: (value.astype(np.float64) + changes[name] / examples).astype(value.dtype) if examples else value
            for name, value in base.items()
        }
        return cls(heads, mean_loss(totals), like.counted, base)


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


def check_metrics(table: npt.NDArray[Any], sites: int, *, counted: bool = True, width: int = len(METRICS)) -> None:
    """Validate a table of `METRICS`, one row per site; with `counted`, scores are numbers of rows.

    Raises:
        ValueError: if it has another form, or impossible counts.
    """
    if table.dtype != np.float64 or table.shape != (sites, width):
        raise ValueError(f"its metrics are {table.dtype}{list(table.shape)}, not float64[{sites}, {width}]")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("its metrics are not finite or negative")
    counts = table[:, [EXAMPLES, HELD_OUT, SCORE] if counted else [EXAMPLES, HELD_OUT]]
    if (counts != np.rint(counts)).any() or (counts[:, -1] > counts[:, 1]).any():
        raise ValueError("its counts are not whole, or it counts more correct rows than held-out ones")
