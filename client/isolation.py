"""A check of features: do they single rows out, so that sums over many rows spell out one?

One-hot features do: where one row alone has a word, the word's row of the Gram matrix is this row. Natural networks are
sparse too, after a ReLU, so the bars are between the values measured for these and those of encodings of words and
hashes. The check sees no isolation that is spread over all columns by a rotation, and cannot replace the choice of a
backbone that the site trusts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhead.data import BoolArray, IntArray

FEW = 4
"""Rows that are few: one less than the guard's usual limit for a class."""
MOST_COLUMNS = 0.4
"""Share of columns that few rows may carry. Measured: networks to 0.23, one-hot words and buckets from 0.63."""
MOST_ROWS = (60, 0.15)
"""Number and further share of rows that may carry a column alone. Measured of 200, 400 and 2,000 rows: networks to 70,
69 and 2; one-hot words, also beside thousands of other features, 116, 170 and 384."""
MOST_SPREAD = 0.7
"""Evenness of directions, of `ROWS_TO_SPREAD` or more rows. Networks to 0.52, hashes from 0.98."""
ROWS_TO_SPREAD = 50

CARRIES = 0.99
"""Share of a column's squared deviations from its median that rows have which carry it."""
_SAMPLE = 1000
_NUMBERS = 2**22
"""Features that are in memory at a time."""


Features = Callable[[Tensor], Tensor]
"""Returns the features `[k, d]` of rows `[k]`, on the CPU."""


@dataclass(frozen=True)
class Isolation:
    """How far features single rows out.

    Attributes:
        num_rows: rows that were looked at.
        columns: share of the varying columns that `FEW` rows carry.
        rows: share of rows that carry a column alone.
        spread: participation ratio of the covariance over that of independent normal features; 1 where every row has
            a direction of its own. 0 with many more rows than features.
    """

    num_rows: int
    columns: float
    rows: float
    spread: float

    def fault(self) -> str:
        """Return why sums of these features would show single rows; empty if they would not."""
        if self.columns > MOST_COLUMNS:
            carried, bar = (f"{100 * share:.0f} %" for share in (self.columns, MOST_COLUMNS))
            return f"{FEW} rows or fewer carry {carried} of the features (bar: {bar})"
        most = MOST_ROWS[0] / max(self.num_rows, 1) + MOST_ROWS[1]
        if self.rows > most:
            return f"{100 * self.rows:.0f} % of the rows carry a feature alone (bar: {100 * most:.0f} %)"
        if self.num_rows >= ROWS_TO_SPREAD and self.spread > MOST_SPREAD:
            return f"rows are as unlike each other as random codes ({self.spread:.2f}; bar: {MOST_SPREAD})"
        return ""


def isolation(features: Features, width: int, rows: IntArray) -> Isolation:
    """Measure how far features single rows out; takes one pass.

    Args:
        features: returns the features `[k, d]` of rows `[k]`, on the CPU.
        width: `d`.
        rows: `[n]`, the rows to look at.
    """
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE, max(4 * _NUMBERS // width, 16))).astype(int)]
    sampled = features(torch.from_numpy(sample))
    centre = sampled.median(dim=0).values.double()
    total, top = torch.zeros(width, dtype=torch.float64), torch.zeros(FEW, width, dtype=torch.float64)
    first = torch.full((width,), -1)
    for block in torch.split(torch.from_numpy(rows), max(_NUMBERS // width, 1)):
        energy = (features(block).double() - centre).square()
        total += energy.sum(dim=0)
        largest, position = energy.max(dim=0)
        first = torch.where(largest > top[0], block[position], first)
        top = torch.cat([top, energy.topk(min(FEW, len(energy)), dim=0).values]).topk(FEW, dim=0).values
    varying = total > 0
    carried = (top.sum(dim=0) > CARRIES * total) & varying
    alone = set(first[(top[0] > CARRIES * total) & varying].tolist())
    return Isolation(
        num_rows=len(rows),
        columns=float(carried.sum() / varying.sum().clamp_min(1)),
        rows=len(alone) / max(len(rows), 1),
        spread=_spread(sampled) if 4 * width >= len(sample) > 1 else 0.0,
    )


def commonly_marked(marks: BoolArray, least: int, people: IntArray | None = None) -> BoolArray:
    """Return which rows `[n]` are left once none has, or lacks, a mark as one of fewer than `least`.

    The Gram matrix has the sum of all features over the rows with a mark, and by subtraction over those without.

    Args:
        marks: `[n, m]`, the marks that each row has.
        least: a number of rows.
        people: `[n]`, a number for each row's group, such as its patient; groups are counted in place of rows.
    """
    kept = np.ones(len(marks), np.bool_)
    while True:
        have, lack = (_by_mark(one[kept], None if people is None else people[kept]) for one in (marks, ~marks))
        rare = (marks & (have < least)) | (~marks & (lack < least) & (have > 0))
        if not (lost := kept & rare.any(axis=1)).any():
            return kept
        kept &= ~lost


def _by_mark(marks: BoolArray, people: IntArray | None) -> IntArray:
    """Return `[m]`, how many rows, or people, have each mark."""
    if people is None:
        found = marks
    else:
        _, inverse = np.unique(people, return_inverse=True)
        found = np.zeros((int(inverse.max(initial=-1)) + 1, marks.shape[1]), np.bool_)
        np.logical_or.at(found, inverse, marks)
    have: IntArray = found.sum(axis=0)
    return have


def _spread(features: Tensor) -> float:
    """Return the participation ratio of the covariance of `[n, d]` over its value for independent normal features."""
    n, d = features.shape
    centred = (features - features.mean(dim=0)).double()
    gram = centred @ centred.T if n <= d else centred.T @ centred
    trace, squares = float(gram.trace()), float(gram.square().sum())
    return trace**2 / squares * (1 / (n - 1) + 1 / d) if squares else 0.0
