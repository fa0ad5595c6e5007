"""Sums of clustering: rows and their unit vectors by cluster, and likelihoods of mixtures; they add across sites."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, check_form

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_ROWS = 2**48
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Rows by cluster, for several clusterings of the same rows at once.

    Attributes:
        sizes: the number of clusters of each of the `Q` clusterings; `M` in all.
        counts: `[M]` int64, the rows of each cluster.
        sums: `[M, r]` float64, the sum of each cluster's rows, which have length 1 or 0.
    """

    sizes: tuple[int, ...]
    counts: IntArray
    sums: FloatArray

    @classmethod
    def empty(cls, sizes: tuple[int, ...], width: int) -> Self:
        """Return the sums of no rows, `r` = `width` wide."""
        return cls(sizes, np.zeros(sum(sizes), np.int64), np.zeros((sum(sizes), width)))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.counts[: self.sizes[0]].sum())

    def __add__(self, other: Self) -> Self:
        if self.sizes != other.sizes or self.sums.shape != other.sums.shape:
            raise ValueError("Sums of different clusterings cannot be added.")
        return type(self)(self.sizes, self.counts + other.counts, self.sums + other.sums)

    def parts(self) -> list[tuple[IntArray, FloatArray]]:
        """Return the counts `[K]` and sums `[K, r]` of each clustering."""
        ends = np.cumsum(self.sizes)[:-1]
        return list(zip(np.split(self.counts, ends), np.split(self.sums, ends), strict=True))

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays for the wire; both sides know the sizes."""
        return {"counts": self.counts, "sums": self.sums}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows of length 1 can have these sums.
        """
        check_form(arrays, like.to_arrays())
        found = cls(like.sizes, np.array(arrays["counts"]), np.array(arrays["sums"]))
        if (found.counts < 0).any() or (found.counts > MOST_ROWS).any():
            raise ValueError("a cluster has an impossible number of rows")
        if len({int(counts.sum()) for counts, _ in found.parts()}) > 1:
            raise ValueError("its clusterings have different numbers of rows")
        if (np.linalg.norm(found.sums, axis=1) > found.counts * (1 + _SLACK)).any():
            raise ValueError("a cluster's sum is longer than its number of rows allows")
        return found


@dataclass(frozen=True, eq=False)
class LikelihoodSums:
    """Log-likelihoods of rows under several mixtures.

    Attributes:
        count: `[1]` int64, the number of rows.
        totals: `[Q]` float64, the summed log-likelihoods.
        squares: `[Q]` float64, the sum of their squares.
    """

    count: IntArray
    totals: FloatArray
    squares: FloatArray

    @classmethod
    def empty(cls, mixtures: int) -> Self:
        """Return the sums of no rows under `Q` mixtures."""
        return cls(np.zeros(1, np.int64), np.zeros(mixtures), np.zeros(mixtures))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.count[0])

    def __add__(self, other: Self) -> Self:
        if self.totals.shape != other.totals.shape:
            raise ValueError("Likelihoods of different mixtures cannot be added.")
        return type(self)(self.count + other.count, self.totals + other.totals, self.squares + other.squares)

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {"count": self.count, "totals": self.totals, "squares": self.squares}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays(), largest=1e100)
        found = cls(*(np.array(arrays[name]) for name in ("count", "totals", "squares")))
        if not 0 <= found.rows <= MOST_ROWS:
            raise ValueError("it has an impossible number of rows")
        slack = 1 + _SLACK
        if (found.totals**2 > found.rows * found.squares * slack + _SLACK).any():
            raise ValueError("its likelihoods contradict their squares")
        return found
