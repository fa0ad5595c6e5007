"""Comparison of heads by squared error on a site's held-out rows, for real targets and for several labels per row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from fedhead.evaluation.comparison import HEADS
from fedhead.evaluation.worth import ridge_at
from fedhead.heads import LinearHead
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.paired import PairedLosses

MIN_COMPARED = 5
"""Fewest held-out rows for comparing mean losses; with fewer, their spread is unknown."""

LOSS_STEP = 2.0**-14
"""Rows' losses are rounded to multiples of this number, so that their sums do not depend on the order of rows."""


@dataclass(frozen=True)
class LossComparison:
    """Results of a site's own head, the pooled head and the other sites' head on the site's held-out rows.

    Losses are squared errors as shares of the variance of all sites' training targets, averaged over targets.

    Attributes:
        rows: the number of rows, at least `MIN_COMPARED`.
        losses: the mean loss of each of the `HEADS`.
        p_value: of a paired t test of the own against the pooled head.
        gain: the 95 % interval of the own head's reduction of the pooled head's loss.
        gain_over_others: the same of the others' head's loss.
    """

    rows: int
    losses: Mapping[str, float]
    p_value: float
    gain: tuple[float, float]
    gain_over_others: tuple[float, float]

    @property
    def own_is_worse(self) -> bool:
        """Whether the own head does worse than the pooled one."""
        return self.losses["own"] > self.losses["pooled"]

    @property
    def explained(self) -> dict[str, float]:
        """Share of the variance that each of the `HEADS` explains; that of `others` is leave-one-site-out."""
        return {name: 1 - loss for name, loss in self.losses.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "explained": self.explained}


def compare_losses(sums: PairedLosses) -> LossComparison | None:
    """Compare the `HEADS` by the sums of their losses; None for fewer than `MIN_COMPARED` rows."""
    if sums.rows < MIN_COMPARED:
        return None
    own, pooled, others = range(len(HEADS))
    mean, error = sums.gain(own, over=pooled)
    return LossComparison(
        rows=sums.rows,
        losses={name: float(loss) / sums.rows for name, loss in zip(HEADS, sums.losses, strict=True)},
        p_value=t_test(mean, error, sums.rows - 1),
        gain=t_interval(mean, error, sums.rows - 1),
        gain_over_others=t_interval(*sums.gain(own, over=others), sums.rows - 1),
    )


@torch.no_grad()
def ridge_heads(site: FeatureStatistics, pool: FeatureStatistics, penalty: float) -> dict[str, LinearHead]:
    """Solve the ridge heads that a site chooses from.

    Labels are predicted as numbers from 0 to 1, and each site's own shares of labels replace the pool's, plus one
    pseudo-row with the pool's: else a head that knows the site's skew would look better for that reason alone.

    Args:
        site: the site's statistics.
        pool: those of all sites, with at least one row.
        penalty: of all heads.

    Returns:
        The `HEADS` by name, float64, for unstandardised features. Without rows a head predicts the pool's means.
    """
    heads = {}
    for name, stats in zip(HEADS, (site, pool, pool - site), strict=True):
        weight, bias = ridge_at(stats, penalty) if stats.rows else (torch.zeros_like(pool.sums), pool.target_mean())
        if site.rows and not site.kind.real:
            missing = site.target_mean() - weight @ site.mean() - bias
            bias = bias + site.rows / (site.rows + 1) * missing
        heads[name] = LinearHead.from_weights(weight, bias)
    return heads


def loss_scale(pool: FeatureStatistics) -> Tensor:
    """Return `[C]`, the divisors of errors: each real target's deviation, or one number for all labels.

    In units of their own deviations, rare labels would weigh most.
    """
    if pool.kind.real:
        return pool.target_scale()
    share = pool.target_mean()
    return (share * (1 - share)).mean().clamp(min=1e-12).sqrt().expand(pool.num_classes)


def scaled_losses(outputs: Sequence[Tensor], targets: Tensor, scale: Tensor) -> PairedLosses:
    """Sum the losses of heads over rows, the only result that leaves a site.

    Args:
        outputs: `[n, C]`, of each head.
        targets: `[n, C]`.
        scale: `[C]`, see `loss_scale`.
    """
    losses = torch.stack([((one - targets) / scale).square().mean(1) for one in outputs]).double()
    return PairedLosses.of((losses / LOSS_STEP).round().mul(LOSS_STEP).numpy())


def t_test(mean: float, error: float, freedom: int) -> float:
    """Return the two-sided p-value of a t test (normal approximation: Wallace, Annals of Math. Statistics, 1959)."""
    if error == 0:
        return 0.0 if mean else 1.0
    z = _wallace(freedom) * math.sqrt(freedom * math.log1p((mean / error) ** 2 / freedom))
    return 2 * NormalDist().cdf(-z)


def t_interval(mean: float, error: float, freedom: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by the inverse of the same approximation."""
    z = NormalDist().inv_cdf(0.975) / _wallace(freedom)
    half = error * math.sqrt(freedom * math.expm1(z**2 / freedom))
    return mean - half, mean + half


def _wallace(freedom: int) -> float:
    return (8 * freedom + 1) / (8 * freedom + 3)
