"""Head updates: what sites' training changes in a head, weighted by rows, with metrics; they add across sites."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.heads import (
    EXAMPLES,
    HELD_OUT,
    LOSS_SUM,
    METRICS,
    TABLE,
    TRAIN_LOSS,
    FloatArray,
    mean_loss,
    total_metrics,
)
from fedhead.sums.sums import Arrays, check_form

LARGEST = 1e15
"""Limit on the magnitude of a summed change of a parameter, or of a metric."""

_UPDATE = "update."


@dataclass(frozen=True, eq=False)
class HeadUpdates:
    """Trained heads minus the head that was sent, each times the site's training rows, and summed metrics.

    Attributes:
        changes: float64, by parameter; empty if the head was only evaluated.
        totals: `[len(METRICS)]` float64, all of them sums; see `total_metrics`.
    """

    changes: Arrays
    totals: FloatArray = field(default_factory=lambda: np.zeros(len(METRICS)))

    @classmethod
    def zeros(cls, head: Arrays) -> Self:
        """Return the sums over no rows; `head` is empty if it is only evaluated."""
        return cls({name: np.zeros(array.shape) for name, array in head.items()})

    @classmethod
    def of(cls, head: Arrays, trained: Arrays, metrics: FloatArray) -> Self:
        """Return the update of one site.

        Args:
            head: the head that was sent.
            trained: the trained head; empty if the head was only evaluated.
            metrics: `[len(METRICS)]`, as in `HeadSums`.
        """
        changes = {
            name: float(metrics[EXAMPLES]) * (value.astype(np.float64) - head[name].astype(np.float64))
            for name, value in trained.items()
        }
        return cls(changes, total_metrics(metrics[None]))

    @property
    def examples(self) -> float:
        """The number of training rows."""
        return float(self.totals[EXAMPLES])

    @property
    def rows(self) -> int:
        """The number of rows."""
        return round(float(self.totals[EXAMPLES] + self.totals[HELD_OUT]))

    def __add__(self, other: Self) -> Self:
        if self.changes.keys() != other.changes.keys():
            raise ValueError("Updates of different heads cannot be added.")
        changes = {name: value + other.changes[name] for name, value in self.changes.items()}
        return type(self)(changes, self.totals + other.totals)

    def metrics(self) -> FloatArray:
        """Return `[len(METRICS)]`, the metrics as of one site: the training loss is a mean."""
        return mean_loss(self.totals)

    def applied(self, head: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return `head` plus the mean update, in the head's number types; `head` itself without training rows."""
        if not self.examples:
            return dict(head)
        return {
            name: (value.astype(np.float64) + self.changes[name] / self.examples).astype(value.dtype)
            for name, value in head.items()
        }

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire."""
        return {
            **{f"{_UPDATE}{name}": value for name, value in self.changes.items()},
            TABLE: self.totals,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays(), LARGEST)
        totals = np.array(arrays[TABLE])
        counts = totals[[EXAMPLES, HELD_OUT]]
        if (totals < 0).any() or (counts != np.rint(counts)).any():
            raise ValueError("its metrics are negative, or its rows are not whole numbers")
        if (not totals[EXAMPLES] and totals[TRAIN_LOSS]) or (not totals[HELD_OUT] and totals[LOSS_SUM:].any()):
            raise ValueError("it has losses or scores without rows")
        changes = {name: np.array(arrays[f"{_UPDATE}{name}"]) for name in like.changes}
        if not totals[EXAMPLES] and any(value.any() for value in changes.values()):
            raise ValueError("it changes the head without training rows")
        return cls(changes, totals)
