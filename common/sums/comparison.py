"""Counts of the held-out rows that each combination of heads predicts correctly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, check_form


@dataclass(frozen=True)
class ComparisonSums:
    """Joint counts of three heads' correct predictions.

    Attributes:
        joint: `[2, 2, 2]` int64, rows by wrong (0) or right (1), with one axis per head.
    """

    joint: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls) -> Self:
        """Return the counts of no rows."""
        return cls(np.zeros((2, 2, 2), np.int64))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.joint.sum())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.joint + other.joint)

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {"joint": self.joint}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if the array has another name, type or shape, or a count is negative or beyond 2**31.
        """
        check_form(arrays, like.to_arrays())
        joint = arrays["joint"]
        if (joint < 0).any() or (joint > 2**31).any():
            raise ValueError("it contains an impossible number of rows")
        return cls(joint)
