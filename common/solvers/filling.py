"""Mean imputation after the fact: statistics of features with missing numbers, as if they had been filled before.

A missing number is 0 in the sums, with a flag of 1. For features `z` and flags `f`, filling with the pooled mean `m` of
the present numbers is the linear map `z + m f`, so it needs no exchange of its own: `m` and the filled statistics
follow from the sums, and a head on filled features is one on `z` and `f`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedhead.sums.features import FeatureStatistics


@dataclass(frozen=True, eq=False)
class Filling:
    """The means that replace missing numbers.

    Attributes:
        numbers: `[f]`, the positions of the features that may be missing.
        flags: `[f]`, the positions of their flags.
        means: `[f]`, float64, the pooled means of the present numbers; 0 without any.
    """

    numbers: Tensor
    flags: Tensor
    means: Tensor

    @classmethod
    def of(cls, stats: FeatureStatistics, pairs: Sequence[tuple[int, int]]) -> Self:
        """Return the means, from statistics of at least one row.

        Args:
            stats: of features with zeros in place of missing numbers.
            pairs: the position of each feature that may be missing, and of its flag.
        """
        numbers, flags = (torch.tensor([pair[one] for pair in pairs], device=stats.sums.device) for one in (0, 1))
        totals = stats.total + stats.rows * stats.origin
        # Flags are counts: rounding decides nothing.
        present = stats.rows - totals[flags].round()
        return cls(numbers, flags, totals[numbers] / present.clamp(min=1))

    def filled(self, stats: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of the filled features, about the origin mapped likewise."""
        made = stats.copy()
        gram = stats.gram()
        gram[self.numbers] += self.means[:, None] * gram[self.flags]
        gram[:, self.numbers] += self.means * gram[:, self.flags]
        made.upper = gram
        for part in (made.origin, made.total):
            part[self.numbers] += self.means * part[self.flags]
        made.sums[:, self.numbers] += self.means * made.sums[:, self.flags]
        return made

    def unfilled(self, weight: Tensor) -> Tensor:
        """Return the weight `[C, d]` on features with zeros, of one on filled features."""
        weight = weight.clone()
        weight[:, self.flags] += self.means.to(weight) * weight[:, self.numbers]
        return weight
