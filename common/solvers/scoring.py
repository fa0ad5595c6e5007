"""Transferability scores of features, from feature statistics alone: to select a backbone before training."""

import math

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.solvers import negligible_eigenvalue, positive_spectrum, shrink_correlation
from fedhead.sums.features import FeatureStatistics

_STRIDE = 2.0
# The evidence is flat at its maximum: an error of 2^-25 in log lambda changes it by 1e-15.
_HALVINGS = 26
# Beyond these multiples of the eigenvalues the evidence does not depend on the prior's precision.
_EXTREME = 1e10


@torch.no_grad()
def transferability(stats: FeatureStatistics) -> dict[str, float]:
    """Score the features; higher is better, for each score separately.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes.

    Returns:
        `logme`, and for single-label statistics `h_score`, by name.

    Raises:
        UserError: if no class has rows both inside and outside it, or no real target varies.
    """
    if stats.kind.real:
        return {"logme": log_evidence(stats)}
    if not bool(((stats.counts > 0) & (stats.counts < stats.rows)).any()):
        raise UserError(f"A score needs rows of at least two classes, but the {stats.rows} rows have fewer.")
    scores = {"logme": log_evidence(stats)}
    if stats.kind.exclusive:
        scores["h_score"] = h_score(stats)
    return scores


def h_score(stats: FeatureStatistics) -> float:
    """Return the H-score (Bao et al., ICIP 2019), shrunk (Ibrahim et al., ECML 2022): `(1 - a) tr(S^-1 B)`.

    `S` is the covariance of all rows, with its correlation shrunk by `a` as in `shrink_correlation`, and `B` the
    covariance of the class means. The score is between 0 and the number of classes with rows minus 1. Without the
    factor `1 - a`, features of pure noise with `d > N` would exceed this bound.
    """
    shrunk = shrink_correlation(stats.scatter(), stats)
    present = stats.counts > 0
    counts = stats.counts[present].to(torch.float64)
    deviations = stats.sums[present] / counts[:, None] - stats.total / stats.rows
    distances = (shrunk.solve(deviations) * deviations).sum(1)
    return (1 - shrunk.shrinkage) * float(counts @ distances) / stats.rows


def log_evidence(stats: FeatureStatistics) -> float:
    """Return LogME (You et al., ICML 2021): the maximum log evidence per row, averaged over classes.

    Each class's indicator `y` is modelled as `F w` with noise of precision `beta` and weights of precision
    `alpha`. With `G = F^T F = V diag(s) V^T` about zero, as published, and `lambda = alpha / beta`, the
    evidence depends on the rows only through `s`, `V^T F^T y` and `|y|^2 = n_c`, and the best `beta` for a given
    `lambda` is known in closed form. Classes without rows are omitted. Real targets are standardised first, so that
    the evidence does not depend on their units; constant ones are omitted.
    """
    stats = stats.about(torch.zeros_like(stats.origin))
    if stats.kind.real:
        varies = stats.target_scatter() > 0
        if not bool(varies.any()):
            raise UserError(f"A score needs a target that varies among the {stats.rows} rows.")
        cross = stats.sums - torch.outer(stats.target_mean(), stats.total)
        products = cross[varies] / stats.target_scale()[varies, None]
        norms = torch.full_like(products[:, 0], stats.rows)
    else:
        products, norms = stats.sums[stats.counts > 0], stats.counts[stats.counts > 0].to(torch.float64)
    values, vectors = positive_spectrum(stats.gram(), negligible_eigenvalue(stats))
    energies = (vectors.T @ products.T).square() / values[:, None]
    evidence = _Evidence(values, energies, norms, stats.rows)
    return float(evidence.at(evidence.best_ratio()).mean())


class _Evidence:
    """Log evidence per row of `K` targets as a function of `lambda`.

    Args:
        values: `[r]`, positive eigenvalues `s` of the Gram matrix.
        energies: `[r, K]`, `(u_i^T y)^2` with `u_i` the features' left singular vectors.
        norms: `[K]`, `|y|^2`.
        rows: `N`.
    """

    def __init__(self, values: Tensor, energies: Tensor, norms: Tensor, rows: int) -> None:
        self.values = values[:, None]
        self.energies = energies
        self.beyond = max(rows - len(values), 0)
        unexplained = (norms - energies.sum(0)).clamp(min=0)
        # With as many directions as rows nothing is unexplained, and rounding errors would count as residual.
        self.unexplained = unexplained if self.beyond else torch.zeros_like(norms)
        self.rows = rows

    def at(self, ratio: Tensor) -> Tensor:
        """Return `[K]`, the log evidence per row at `lambda` `[K]` and the best `beta`."""
        left = ratio / (self.values + ratio)
        # |Fm - y|^2 + lambda |m|^2, which is N / beta
        loss = self.unexplained + (left * self.energies).sum(0)
        determinant = torch.log1p(self.values / ratio).sum(0)
        return -0.5 * ((2 * math.pi * math.e * loss / self.rows).log() + determinant / self.rows)

    def rises(self, ratio: Tensor) -> Tensor:
        """Return `[K]`, whether the evidence increases with `lambda`, so that the published update would raise it.

        That update, of `alpha` to `gamma / |m|^2` and `beta` to `(N - gamma) / |Fm - y|^2`, follows the sign
        of the derivative. All sums here are of positive terms.
        """
        left = ratio / (self.values + ratio)
        taken = self.values / (self.values + ratio)
        gamma, rest = taken.sum(0), self.beyond + left.sum(0)
        residual = self.unexplained + (left.square() * self.energies).sum(0)
        penalty = (left * taken * self.energies).sum(0)  # lambda |m|^2
        return gamma * residual > rest * penalty

    def best_ratio(self) -> Tensor:
        """Return `lambda` `[K]` at the fixed point of the published iteration from `alpha = beta = 1`.

        Found by geometric steps and bisection, since the iteration itself can take thousands of steps. If the evidence
        keeps increasing (features unrelated to the class, or fewer rows than features with a perfect fit), the search
        ends where the evidence no longer changes.
        """
        near = torch.zeros_like(self.unexplained)
        if not len(self.values):
            return near.exp()
        least = math.log(float(self.values.min()) / _EXTREME)
        most = math.log(float(self.values.max()) * _EXTREME)
        upwards = self.rises(near.exp())
        stride = torch.where(upwards, _STRIDE, -_STRIDE).to(near.dtype)
        far = near + stride
        onwards = torch.ones_like(upwards)
        while bool(onwards.any()):
            inside = torch.where(upwards, far < most, far > least)
            onwards = onwards & inside & (self.rises(far.exp()) == upwards)
            near = torch.where(onwards, far, near)
            far = torch.where(onwards, far + stride, far)
        for _ in range(_HALVINGS):
            middle = (near + far) / 2
            onwards = self.rises(middle.exp()) == upwards
            near = torch.where(onwards, middle, near)
            far = torch.where(onwards, far, middle)
        return ((near + far) / 2).exp()
