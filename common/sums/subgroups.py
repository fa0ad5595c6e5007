"""Evaluation counts of one head in each of several subgroups of rows, such as sexes or scanners."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.sums import Arrays


@dataclass(frozen=True, eq=False)
class SubgroupSums:
    """Evaluation counts by subgroup; they add across sites.

    Attributes:
        parts: the counts of each subgroup, one or more.
    """

    parts: Sequence[EvaluationSums]

    @property
    def rows(self) -> int:
        """The number of rows of all subgroups; a row has one at most."""
        return sum(part.rows for part in self.parts)

    def __add__(self, other: Self) -> Self:
        if len(self.parts) != len(other.parts):
            raise ValueError(f"Cannot add counts of {len(self.parts)} and {len(other.parts)} subgroups.")
        return type(self)([one + two for one, two in zip(self.parts, other.parts, strict=True)])

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire, with a leading dimension of subgroups."""
        parts = [part.to_arrays() for part in self.parts]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: sums of the expected number of subgroups, classes and kind.

        Raises:
            ValueError: if names, shapes or types differ, or counts contradict each other.
        """
        count = len(like.parts)
        if wrong := [name for name, array in arrays.items() if array.shape[:1] != (count,)]:
            raise ValueError(f"{wrong[0]!r} does not hold {count} subgroups")
        received = [{name: array[place] for name, array in arrays.items()} for place in range(count)]
        return cls([EvaluationSums.from_arrays(one, form) for one, form in zip(received, like.parts, strict=True)])
