"""Subgroups of a site's rows, such as sexes or scanners, and the held-out rows that may be counted by them.

Counts by subgroup are beside counts of all rows, whose difference must not be about a few rows: each subgroup, and the
rows that are in none or are not counted by it, has enough rows in either half of the held-out rows, or none.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from fedhead.client.release.guard import Guard, count_people
from fedhead.data import BoolArray, IntArray, Samples


@dataclass(frozen=True)
class Subgroups:
    """The subgroup of each row of a site's data.

    Attributes:
        names: of the subgroups.
        numbers: `[N]`, the subgroup of each row, or -1.
    """

    names: tuple[str, ...]
    numbers: IntArray

    @classmethod
    def of(cls, samples: Samples) -> Self | None:
        """Return the subgroups that data names; None if it names none."""
        if samples.subgroups is None:
            return None
        names = tuple(sorted({name for name in samples.subgroups if name is not None}))
        number = {name: place for place, name in enumerate(names)}
        numbers = [-1 if name is None else number[name] for name in samples.subgroups]
        return cls(names, np.array(numbers, dtype=np.int64))

    @cached_property
    def number(self) -> dict[str, int]:
        """The number of each subgroup by name."""
        return {name: place for place, name in enumerate(self.names)}

    def positions(self, rows: IntArray, names: tuple[str, ...]) -> IntArray:
        """Return `[n]`, the position of each row's subgroup in `names`, or -1.

        Args:
            rows: `[n]`, row numbers.
            names: of some subgroups, which may be of other sites only.
        """
        # The last place is for rows without a subgroup.
        table = np.full(len(self.names) + 1, -1, dtype=np.int64)
        for place, name in enumerate(names):
            if name in self.number:
                table[self.number[name]] = place
        positions: IntArray = table[self.numbers[rows]]
        return positions


def divisible(sets: IntArray, cells: IntArray, counted: BoolArray, people: IntArray | None, enough: int) -> BoolArray:
    """Return `[n]`, the rows of those sets that have enough rows in each cell that they have rows in.

    Args:
        sets: `[n]`, the set of each row.
        cells: `[n]`, its cell, such as its subgroup.
        counted: `[n]`, which rows count.
        people: `[n]`, these are counted in place of rows; see `people_of`.
        enough: from so many on, rows are enough.
    """
    if not len(sets):
        return np.zeros(0, np.bool_)
    pairs = np.unique(np.stack([sets, cells]), axis=1, return_inverse=True)[1].reshape(-1)
    counts = count_people(pairs, counted, people)
    return ~np.isin(sets, sets[counts[pairs] < enough])


def countable(guard: Guard, numbers: IntArray, halves: BoolArray, people: IntArray | None) -> BoolArray:
    """Return `[n]`, which held-out rows a site that makes no other release may count by subgroup.

    Args:
        guard: the site's.
        numbers: `[n]`, the subgroup of each row, or -1.
        halves: `[n]`, its calibration half.
        people: `[n]`, see `people_of`.
    """
    kept = numbers.copy()
    while True:
        fit = divisible(kept, halves.astype(np.int64), np.ones(len(kept), np.bool_), people, guard.min_class_count)
        few = ~fit & (kept >= 0)
        if not few.any():
            if fit.all() or not (kept >= 0).any():
                return kept >= 0
            # The rows that are not counted are too few: so are those of the smallest subgroup from here on.
            numbered, sizes = np.unique(kept[kept >= 0], return_counts=True)
            few = kept == numbered[sizes.argmin()]
        kept[few] = -1
