"""Comparison of a site's own head, the pooled head and the other sites' head on the site's held-out rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers import ABSENT_MARGIN, solve_head
from fedhead.sums.features import FeatureStatistics

HEADS = ("own", "pooled", "others")
"""Names of the compared heads, in the order of the axes of joint counts."""


@torch.no_grad()
def heads_to_compare(site: FeatureStatistics, others: FeatureStatistics) -> dict[str, LinearHead]:
    """Solve the heads that a site chooses from, each with the site's own class priors.

    With the pool's priors, a head that knows the site's skew would look better for that reason alone. The priors
    are the counts of the site's rows plus one pseudo-row, distributed over the classes by their shares in the pool.

    `own` is solved from the site's rows, `pooled` from all rows and `others` from all except the site's: its accuracy
    is the benefit for a site that does not contribute. A head never predicts a class without rows. With rows of one
    class it always predicts that class, and without any rows the site's commonest class.

    Args:
        site: the site's statistics.
        others: the statistics of all other participating sites, without this one.

    Returns:
        The `HEADS` by name, float64, for unstandardised features.

    Raises:
        UserError: for multi-label statistics, or if there are no rows at all.
    """
    pooled = site + others
    if pooled.rows == 0:
        raise UserError("There are no rows to compute heads from: every site was empty or withheld its rows.")
    priors = site.counts + pooled.counts.to(torch.float64) / pooled.rows
    parts = {"own": site, "pooled": pooled, "others": others}
    return {name: head_under(parts[name], priors) for name in HEADS}


def head_under(stats: FeatureStatistics, priors: Tensor) -> LinearHead:
    """Solve the discriminant head of statistics under other class priors `[C]`.

    Raises:
        UserError: for multi-label statistics.
    """
    if stats.kind.exclusive and int((stats.counts > 0).sum()) < 2:
        bias = ABSENT_MARGIN * (stats.counts > 0) + priors / priors.sum()
        return LinearHead.from_weights(torch.zeros_like(stats.sums), bias)
    return solve_head(stats, "lda", priors=priors)


def joint_counts(predictions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Count the rows that each combination of `k` heads predicts correctly.

    Args:
        predictions: of each head, `[n]`.
        labels: `[n]`.

    Returns:
        `[2, ...]`, int64, counts by right (1) or wrong (0) along one axis for each head.
    """
    right = [one == labels for one in predictions]
    cells = sum((one.to(torch.int64) << axis for axis, one in enumerate(reversed(right))), torch.zeros_like(labels))
    return torch.bincount(cells, minlength=2 ** len(right)).view([2] * len(right))


@dataclass(frozen=True)
class Comparison:
    """Results of a site's own head, the pooled head and the other sites' head on the site's held-out rows.

    Attributes:
        rows: the number of rows, at least 1.
        right: the number of rows that each of the `HEADS` predicts correctly.
        p_value: of an exact McNemar test of the own against the pooled head.
        gain: the 95 % interval of the own head's gain in accuracy over the pooled head.
        gain_over_others: the same over the others' head.
    """

    rows: int
    right: Mapping[str, int]
    p_value: float
    gain: tuple[float, float]
    gain_over_others: tuple[float, float]

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy of each of the `HEADS`; that of `others` is leave-one-site-out."""
        return {name: right / self.rows for name, right in self.right.items()}

    @property
    def own_is_worse(self) -> bool:
        """Whether the own head does worse than the pooled one."""
        return self.right["own"] < self.right["pooled"]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the accuracies as JSON types."""
        return {**asdict(self), "accuracies": self.accuracies}


def compare(joint: Tensor | Sequence[Sequence[Sequence[int]]]) -> Comparison | None:
    """Compare heads by joint counts of correct predictions.

    Args:
        joint: `[2, 2, 2]`, as `joint_counts` returns it.

    Returns:
        None if there are no rows.

    Raises:
        ValueError: if the counts have another shape, or one is negative.
    """
    counts = torch.as_tensor(joint)
    if counts.shape != (2, 2, 2) or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(f"Joint counts of {len(HEADS)} heads must be [2, 2, 2] numbers of rows, not {joint}.")
    rows = int(counts.sum())
    if rows == 0:
        return None
    own_pooled, own_others = counts.sum(2), counts.sum(1)
    better, worse = int(own_pooled[1, 0]), int(own_pooled[0, 1])
    return Comparison(
        rows=rows,
        right={name: int(counts.select(axis, 1).sum()) for axis, name in enumerate(HEADS)},
        p_value=_sign_test(better, worse),
        gain=_paired_interval(better, worse, rows),
        gain_over_others=_paired_interval(int(own_others[1, 0]), int(own_others[0, 1]), rows),
    )


def _sign_test(better: int, worse: int) -> float:
    """Return the two-sided p-value of a sign test."""
    n = torch.tensor(better + worse, dtype=torch.float64)
    k = torch.arange(max(better, worse), better + worse + 1, dtype=torch.float64)
    chances = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(1.0, 2 * float(chances.exp().sum()))


def _paired_interval(better: int, worse: int, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired proportions (Bonett & Price, JEBS, 2012)."""
    up, down, total = (better + 1) / (rows + 2), (worse + 1) / (rows + 2), rows + 2
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / total)
    return max(-1.0, up - down - half), min(1.0, up - down + half)
