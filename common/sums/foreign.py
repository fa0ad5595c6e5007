"""Counts of rows by their distance from the rows that a model was solved on; they add across sites."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, check_form

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]

DISTANCES = ("class", "background")
"""The distances of a row: from the nearest class, and from all rows."""

BINS = 640
"""Number of bins of a distance. They have equal width in its logarithm, 2.2 %."""

LEAST = 1e-2
MOST = 1e4
_STEP = math.log(MOST / LEAST) / BINS


@dataclass(frozen=True, eq=False)
class DistanceSums:
    """Rows counted by distance.

    Attributes:
        counts: `[2, BINS]` int64, rows by each of `DISTANCES`; the first and the last bin include all beyond.
    """

    counts: IntArray = field(default_factory=lambda: np.zeros((len(DISTANCES), BINS), np.int64))

    @classmethod
    def from_distances(cls, distances: "Tensor") -> Self:
        """Count rows with `distances` `[n, 2]`, of `DISTANCES`, at least 0.

        Raises:
            ValueError: if a distance is not a number.
        """
        values = distances.double().cpu().numpy()
        if np.isnan(values).any():
            raise ValueError("A distance is not a number.")
        places = (np.log(np.clip(values, LEAST, MOST)) - math.log(LEAST)) / _STEP
        index = np.clip(places.astype(np.int64), 0, BINS - 1)
        return cls(np.stack([np.bincount(column, minlength=BINS) for column in index.T]))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.counts[0].sum())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.counts + other.counts)

    def thresholds(self, share: float) -> tuple[float, ...]:
        """Return limits of `DISTANCES` that at most a share of rows like these exceeds, in either distance.

        Split-conformal (Vovk et al., 2005): each distance may exceed its limit for half of the share. Infinite where
        too few rows were counted for that.

        Args:
            share: between 0 and 1.

        Raises:
            ValueError: if the share is not.
        """
        if not 0 < share < 1:
            raise ValueError(f"A share must be between 0 and 1, not {share:g}.")
        needed = math.ceil((self.rows + 1) * (1 - share / len(DISTANCES)))
        if needed > self.rows:
            return tuple(math.inf for _ in DISTANCES)
        bins = [int(np.searchsorted(np.cumsum(row), needed)) for row in self.counts]
        return tuple(math.inf if place == BINS - 1 else LEAST * math.exp((place + 1) * _STEP) for place in bins)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {"counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self | None = None) -> Self:
        """Undo `to_arrays`, validating everything; `like` is ignored.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these counts.
        """
        check_form(arrays, cls().to_arrays())
        counts = np.array(arrays["counts"])
        if (counts < 0).any() or (counts > 2**48).any() or len(set(counts.sum(1).tolist())) > 1:
            raise ValueError("its counts are impossible")
        return cls(counts)

    @classmethod
    def from_lists(cls, counts: Sequence[Sequence[int]]) -> Self:
        """Read counts from JSON.

        Raises:
            ValueError: as `from_arrays` does.
        """
        try:
            array = np.array(counts, dtype=np.int64)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"its counts are not whole numbers: {error}") from None
        return cls.from_arrays({"counts": array})
