"""Comparison of a site's personal head with the shared head and with the site's own, on its held-out rows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedhead.evaluation.comparison import compare
from fedhead.sums.comparison import ComparisonSums

COMPARED = ("personal", "shared", "own")
"""Names of the compared heads, in the order of the axes of joint counts."""


@dataclass(frozen=True)
class PersonalComparison:
    """Results of three heads on held-out rows.

    Attributes:
        rows: the number of rows, at least 1.
        right: the number of rows that each of `COMPARED` predicts correctly.
        gain: the 95 % interval of the personal head's gain in accuracy over the shared head.
        gain_over_own: the same over the site's own head.
        p_value: of an exact McNemar test of the personal against the shared head.
    """

    rows: int
    right: Mapping[str, int]
    gain: tuple[float, float]
    gain_over_own: tuple[float, float]
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return asdict(self)


def compare_personal(sums: ComparisonSums) -> PersonalComparison | None:
    """Compare heads by joint counts of correct predictions; None without rows."""
    compared = compare(torch.from_numpy(sums.joint))
    if compared is None:
        return None
    right = dict(zip(COMPARED, compared.right.values(), strict=True))
    return PersonalComparison(compared.rows, right, compared.gain, compared.gain_over_others, compared.p_value)


@dataclass(frozen=True)
class PersonalHeads:
    """What personal heads brought in a run.

    Attributes:
        mode: the setting `personal`.
        pooled: the comparison on the held-out rows of all sites; None without any.
        sites: the comparison at each site that has held-out rows; empty under secure summation.
    """

    mode: str
    pooled: PersonalComparison | None
    sites: Mapping[str, PersonalComparison]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return asdict(self)
