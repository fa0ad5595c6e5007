"""A head of a site's own: discriminant analysis on pooled sums with the site's own sums counted more often.

With `kappa = 0` it is the pooled head under the site's class shares, and for large `kappa` the site's own head. The
site chooses between them by its exact leave-one-out loss.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import ABSENT_MARGIN, shrink_correlation, solve_positive
from fedhead.sums.calibration import TemperatureSums
from fedhead.sums.features import FeatureStatistics

WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, math.inf)
"""Candidates for `kappa`; infinity is the site's own head."""

_BLOCK_ROWS = 2048


@dataclass(frozen=True, eq=False)
class WeightedDiscriminant:
    """Linear discriminant analysis of weighted rows, about the mean `m` of all of them.

    Attributes:
        weights: `[C]`, the summed weights of each class's rows.
        row: the weight of each of the site's own rows.
        means: `[C, d]`, the class means minus `m`; zeros for classes without rows.
        centre: `[d]`, `m`, for features as they are.
        inverse: `[d, d]`, the inverse of the shrunk within-class scatter (not divided by the weights).
        kept: the share of the scatter that shrinkage leaves.
        priors: `[C]`, the site's rows of each class plus one row in all, distributed as in the pool.
    """

    weights: Tensor
    row: float
    means: Tensor
    centre: Tensor
    inverse: Tensor
    kept: float
    priors: Tensor

    def head(self) -> LinearHead:
        """Return the head for features as they are, float64; a class without rows is never predicted."""
        present = self.weights > 0
        weight = self.weights.sum() * (self.means @ self.inverse)
        bias = -0.5 * (weight * self.means).sum(1) + (self.priors / self.priors.sum()).log()
        bias = torch.where(present, bias, float(bias[present].min()) - ABSENT_MARGIN)
        return LinearHead.from_weights(weight, bias - weight @ self.centre)

    def left_out(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return logits `[n, C]` of the site's own rows, each by the discriminant without that row.

        Without row `x` of class `c`, weighing `w` of the class's `W_c`, the class mean moves by `w / (W_c - w)` of the
        row's deviation, and the scatter loses `w W_c / (W_c - w)` times the deviation's outer product (Sherman and
        Morrison, 1950). Scales and shrinkage are those of all rows.

        Args:
            features: `[n, d]`, as they are.
            labels: `[n]`.
        """
        parts = [
            self._left_out(features[start : start + _BLOCK_ROWS], labels[start : start + _BLOCK_ROWS])
            for start in range(0, len(features), _BLOCK_ROWS)
        ]
        return torch.cat(parts) if parts else features.new_zeros(0, len(self.weights), dtype=torch.float64)

    def _left_out(self, features: Tensor, labels: Tensor) -> Tensor:
        rows = features.to(torch.float64) - self.centre
        solved = rows @ self.inverse
        products, sizes = solved @ self.means.T, (solved * rows).sum(1)
        between = self.means @ self.inverse @ self.means.T
        own = labels[:, None]
        rest = self.weights[labels] - self.row
        alone = rest <= 1e-9 * self.weights[labels]
        rest = rest.clamp(min=self.row * 1e-6)
        to_own, norms = products.gather(1, own)[:, 0], between.diagonal()
        # With delta = x - mu_c: x'B delta, mu_k'B delta, delta'B delta.
        row_delta = sizes - to_own
        mean_delta = products - between[labels]
        delta = sizes - 2 * to_own + norms[labels]
        lost = self.kept * self.row * self.weights[labels] / rest
        factor = lost / (1 - lost * delta).clamp(min=1e-12)
        moved = self.row / rest
        dots = products + factor[:, None] * row_delta[:, None] * mean_delta
        squares = norms + factor[:, None] * mean_delta.square()
        grown = 1 + factor * delta
        own_dot = dots.gather(1, own)[:, 0] - moved * row_delta * grown
        own_square = squares.gather(1, own)[:, 0] - 2 * moved * mean_delta.gather(1, own)[:, 0] * grown
        own_square = own_square + moved.square() * delta * grown
        dots = dots.scatter(1, own, own_dot[:, None])
        squares = squares.scatter(1, own, own_square[:, None])
        priors = self.priors.expand(len(rows), -1).clone()
        priors.scatter_add_(1, own, torch.full_like(own, -1, dtype=torch.float64))
        total = self.weights.sum() - self.row
        logits = total * (dots - squares / 2) + priors.clamp(min=1e-12).log()
        lowest = logits.min(1, keepdim=True).values - ABSENT_MARGIN
        absent = (self.weights <= 0).expand_as(logits).clone()
        absent.scatter_(1, own, alone[:, None])
        return torch.where(absent, lowest, logits)


def weighted_discriminant(pooled: FeatureStatistics, site: FeatureStatistics, kappa: float) -> WeightedDiscriminant:
    """Return the discriminant of `pooled + kappa site`.

    Shrinkage is OAS with the effective number of rows, `(sum w)^2 / sum w^2`.

    Args:
        pooled: the sums of all sites, this one included.
        site: its own sums, about the same origin.
        kappa: how many times more the site's rows count; 0 or more, infinity for the site alone.

    Raises:
        UserError: if fewer than two classes have rows.
    """
    alone = math.isinf(kappa)
    share, extra = (0.0, 1.0) if alone else (1.0, kappa)
    weights = share * pooled.counts + extra * site.counts
    present = weights > 0
    if int(present.sum()) < 2:
        raise UserError("A head of the site's own needs rows of two classes.")
    total = weights.sum()
    sums = share * pooled.sums + extra * site.sums
    whole = share * pooled.total + extra * site.total
    means = torch.where(present[:, None], sums / weights.clamp(min=1e-300)[:, None], 0.0)
    upper = share * pooled.upper + extra * site.upper
    gram = torch.triu(upper) + torch.triu(upper, 1).T
    within = gram - means.T @ (weights[:, None] * means)
    source = site if alone else pooled
    if bool((within.diagonal() <= source.negligible_scatter()).all()):
        within = (gram - torch.outer(whole, whole) / total).diagonal().diag()
    row = 1.0 if alone else 1.0 + kappa
    others = max(pooled.rows - site.rows, 0)
    effective = site.rows if alone else (others + row * site.rows) ** 2 / (others + row**2 * site.rows)
    rows = max(round(effective), 1)
    shrunk = shrink_correlation(within, replace(source, rows=rows))
    inverse = solve_positive(shrunk.matrix, torch.eye(len(within), dtype=torch.float64), shrunk.shrinkage)
    scale = shrunk.inverse_deviation / math.sqrt(rows)
    inverse = inverse * scale * scale[:, None]
    centre = whole / total
    return WeightedDiscriminant(
        weights=weights.to(torch.float64),
        row=row,
        means=torch.where(present[:, None], means - centre, 0.0),
        centre=centre + pooled.origin,
        inverse=inverse,
        kept=1 - shrunk.shrinkage,
        priors=site.counts + pooled.counts.to(torch.float64) / max(pooled.rows, 1),
    )


@dataclass(frozen=True)
class PersonalHead:
    """The head that a site chose for itself.

    Attributes:
        head: for features as they are, float64.
        kappa: how many times more the site's rows count than the others', minus one; infinity for the site alone.
        temperature: the divisor of its logits.
        loss: the leave-one-out log-loss per row at this temperature.
    """

    head: LinearHead
    kappa: float
    temperature: float
    loss: float


@torch.no_grad()
def choose_personal(
    pooled: FeatureStatistics, site: FeatureStatistics, features: Tensor, labels: Tensor
) -> PersonalHead:
    """Choose among the heads of `WEIGHTS` by the exact leave-one-out loss of the site's rows.

    Losses are compared at each head's own temperature; errors alone are too coarse for small sites.

    Args:
        pooled: the training sums of all sites, this one included.
        site: its own training sums, about the same origin.
        features: `[n, d]`, the rows of `site`.
        labels: `[n]`.

    Raises:
        UserError: if the sums cover fewer than two classes, or no rows can have them.
    """
    chosen: PersonalHead | None = None
    for kappa in WEIGHTS:
        if math.isinf(kappa) and int((site.counts > 0).sum()) < 2:
            continue
        made = weighted_discriminant(pooled, site, kappa)
        logits = made.left_out(features, labels)
        temperatures = TemperatureSums.from_logits(logits, labels)
        loss = float(temperatures.losses.min()) / max(len(labels), 1)
        if math.isfinite(loss) and (chosen is None or loss < chosen.loss):
            chosen = PersonalHead(made.head(), kappa, temperatures.best(), loss)
    if chosen is None:
        raise UserError("No head of the site's own can be solved: the pooled sums are not those of any rows.")
    return chosen
