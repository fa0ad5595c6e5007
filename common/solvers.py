"""Heads from feature statistics alone, equal to fitting them on all sites' rows pooled.

A solver is a function of statistics, registered by name. With `n_c` counts, `N` rows, `mu_c` class means,
`m` the mean of all rows and `G` the Gram matrix about the origin; every solver works about `m`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.registry import Registry
from fedhead.statistics import FeatureStatistics

solvers: Registry[Callable[..., LinearHead]] = Registry("solver")

ABSENT_MARGIN = 30.0
"""How far the logit of a class without rows stays below the largest: its probability is under `e^-30`."""


def solve_head(stats: FeatureStatistics, method: str = "lda", **parameters: object) -> LinearHead:
    """Solve the head `method` for statistics.

    Args:
        stats: sums over the rows of all sites.
        method: the name of a solver: `lda`, `ridge`, `nearest-mean`, or one registered since.
        parameters: what the solver takes besides.

    Returns:
        A float64 head for features as they are, not centred or standardised.

    Raises:
        UserError: (a ValueError) if there is no such solver, it does not take these parameters, or these
            statistics do not determine a head.
    """
    solver = solvers[method]
    try:
        inspect.signature(solver).bind(stats, **parameters)
    except TypeError:
        known = [f"{name!r}" for name in list(inspect.signature(solver).parameters)[1:]]
        raise UserError(
            f"The solver {method!r} takes {', '.join(known) or 'no parameters'}, "
            f"not {', '.join(map(repr, parameters))}."
        ) from None
    with torch.no_grad():
        return solver(stats, **parameters)


@solvers.register("lda")
def solve_lda(stats: FeatureStatistics, priors: str | Sequence[float] | Tensor = "empirical") -> LinearHead:
    """Linear discriminant analysis with a shrunk covariance: the default head.

    Classes are Gaussian with means `mu_c` and one covariance `S`: the within-class scatter over `N`, its
    correlation shrunk by `shrink_correlation`. About `m`, `W_c = S^-1 (mu_c - m)` and
    `b_c = -1/2 (mu_c - m)^T S^-1 (mu_c - m) + log prior_c`, so the logits are log-odds of the classes given
    `x`, up to what all classes share. Where a feature does not vary within classes its weight is 0; where
    none does (one row per class), each feature's variance over all rows stands in.

    A class without rows has weight 0 and a bias `ABSENT_MARGIN` below the least other. It is never
    predicted, whatever the row: as `sum_c n_c W_c = 0`, the largest of the other logits is never below the
    least of their biases about `m`. Its logit is finite, so training can raise it.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.
        priors: `empirical` (the share of rows), `uniform`, or `[C]` positive numbers, which are scaled to 1.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: for multi-label statistics, fewer than two classes with rows, or other priors.
    """
    present = _classes_with_rows(stats, "lda")
    log_priors = _log_priors(priors, stats.counts)[present]
    within = stats.within_scatter()
    if bool((within.diagonal() <= stats.negligible_scatter()).all()):
        within = stats.scatter().diagonal().diag()
    shrunk = shrink_correlation(within, stats)
    deviations = _class_deviations(stats)[present]
    weight = shrunk.solve(deviations)
    bias = -0.5 * (weight * deviations).sum(1) + log_priors
    return _discriminant_head(stats, present, weight, bias)


@solvers.register("nearest-mean")
def solve_nearest_mean(stats: FeatureStatistics) -> LinearHead:
    """Nearest class mean: Gaussian classes of equal chance and equal spherical covariance.

    About `m`, `W_c = (mu_c - m) / v` and `b_c = -1/2 |mu_c - m|^2 / v`, with `v` the mean within-class
    variance of a feature (over all rows where classes have one row each). The logits are log-odds if features
    are independent and of equal variance; else they are too sure, but their order is by distance all the
    same. A class without rows is never predicted, as in `solve_lda`.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: for multi-label statistics or fewer than two classes with rows.
    """
    present = _classes_with_rows(stats, "nearest-mean")
    deviations = _class_deviations(stats)[present]
    variance = _mean_variance(stats)
    weight = deviations / variance
    bias = -0.5 * (weight * deviations).sum(1)
    return _discriminant_head(stats, present, weight, bias)


@solvers.register("ridge")
def solve_ridge(stats: FeatureStatistics, penalty: float | None = None) -> LinearHead:
    """Ridge regression on class indicators, from sums alone (Hoerl & Kennard, 1970).

    Solves `(G_m + penalty * I) W^T = S_m`, with `G_m` the Gram matrix and `S_m` the class sums about `m`,
    which equals fitting `sklearn.linear_model.Ridge` with its unpenalised intercept on all rows pooled.

    For single-label statistics the indicators are 0 and 1: the logits estimate the classes' probabilities
    and sum to 1. They are no log-odds, and a softmax of them is much too flat: predict by the largest. A
    class without rows has logit 0, below the largest. For multi-label statistics the indicators are -1 and
    1, as in `sklearn.linear_model.RidgeClassifier`, so that a logit above 0, or a sigmoid above a half, says
    yes.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes.
        penalty: `>= 0`, in units of squared feature norm; `None` is chosen by `generalised_cross_validation`.
            0 is least squares, of the least norm where features are linearly dependent.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: if `penalty` is negative or not finite, or if no class has rows both in it and outside.
    """
    if penalty is not None and not 0 <= penalty < math.inf:
        raise UserError(f"The penalty of ridge regression must be 0 or more, not {penalty}.")
    _require_contrast(stats)
    counts = stats.counts.to(torch.float64)
    gram = stats.scatter()
    cross = stats.sums - torch.outer(counts / stats.rows, stats.total)
    smallest = negligible_eigenvalue(stats)
    if penalty is not None and penalty > smallest:
        gram.diagonal().add_(penalty)
        weight = solve_positive(gram, cross.T, penalty).T
    else:
        values, vectors = positive_spectrum(gram, smallest)
        rotated = vectors.T @ cross.T
        if penalty is None:
            spread = counts.sum() - counts.square().sum() / stats.rows
            penalty = generalised_cross_validation(
                values, rotated.square().sum(1) / values, float(spread), stats.rows, smallest
            )
        weight = (vectors @ (rotated / (values + penalty)[:, None])).T
    bias = counts / stats.rows - weight @ stats.mean()
    if stats.multi_label:
        weight, bias = 2 * weight, 2 * bias - 1
    return LinearHead.from_weights(weight, bias)


def solve_prototypes(stats: FeatureStatistics, scale: Tensor | None = None) -> Tensor:
    """Return class means about the mean of all rows as unit vectors `[C, d]`: a start for a cosine head.

    A class without rows, or whose mean is the mean of all rows, has a fixed random direction, which in many
    dimensions is nearly orthogonal to every row: at zeros the gradient of a cosine is unbounded.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes.
        scale: `[d]`, what deviations from the mean are divided by first, such as `stats.scale()` for a head
            on standardised features; ones by default.

    Raises:
        UserError: if no class has rows both in it and outside.
    """
    _require_contrast(stats)
    deviations = _class_deviations(stats)
    slack = (stats.negligible_scatter() / stats.rows).sqrt()
    if scale is not None:
        deviations, slack = deviations / scale, slack / scale
    lengths = torch.linalg.vector_norm(deviations, dim=1)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(deviations.shape, generator=generator, dtype=torch.float64).to(deviations.device)
    known = lengths > torch.linalg.vector_norm(slack)
    return torch.nn.functional.normalize(torch.where(known[:, None], deviations, random), dim=1)


class ShrunkCorrelation(NamedTuple):
    """A covariance `S = D^1/2 R D^1/2` with `R` shrunk towards the identity.

    Attributes:
        matrix: `[d, d]`, the shrunk `R`; the identity where a feature does not vary.
        inverse_deviation: `[d]`, the diagonal of `D^-1/2`; 0 where a feature does not vary.
        shrinkage: the identity's share in `matrix`.
    """

    matrix: Tensor
    inverse_deviation: Tensor
    shrinkage: float

    def solve(self, rows: Tensor) -> Tensor:
        """Return `rows S^-1`, `[k, d]`, taking the inverse as 0 for features that do not vary."""
        standardised = rows * self.inverse_deviation
        solved = solve_positive(self.matrix, standardised.T, self.shrinkage).T
        return solved * self.inverse_deviation


def shrink_correlation(scatter: Tensor, stats: FeatureStatistics) -> ShrunkCorrelation:
    """Shrink the correlation of a scatter by the oracle approximation, OAS (Chen et al., 2010, eq. 23).

    `(1 - a) R + a I` for the correlation `R` of the `p` features that vary, with
    `a = (t + 1) / ((N + 1) (t - 1/p))` and `t = tr(R^2) / p^2`, at most 1: only traces are needed. Equal to
    `sklearn.covariance.OAS(assume_centered=True)` on rows that are centred and standardised, which like it
    leaves out the terms `2/p` of the paper.

    Args:
        scatter: `[d, d]`, symmetric; used up.
        stats: the statistics it is of.
    """
    variance = scatter.diagonal() / stats.rows
    varies = scatter.diagonal() > stats.negligible_scatter()
    inverse_deviation = torch.where(varies, variance, torch.inf).rsqrt()
    correlation = scatter.mul_(inverse_deviation).mul_(inverse_deviation[:, None] / stats.rows)
    correlation.diagonal().copy_(varies)
    p = int(varies.sum())
    shrinkage = 1.0
    if p > 1:
        entries = correlation.view(-1)
        mean_square = float(entries @ entries) / p**2
        excess = (stats.rows + 1) * (mean_square - 1 / p)
        shrinkage = min((mean_square + 1) / excess, 1.0) if excess > 0 else 1.0
    correlation.mul_(1 - shrinkage).diagonal().fill_(1)
    return ShrunkCorrelation(correlation, inverse_deviation, shrinkage)


def solve_positive(matrix: Tensor, right: Tensor, smallest: float) -> Tensor:
    """Return `matrix^-1 right` for a symmetric matrix whose eigenvalues are `smallest` or more.

    By Cholesky's factors, or where rounding has made the matrix indefinite by its eigenvalues, raised to
    `smallest`.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse: Tensor = (vectors / values.clamp(min=smallest)) @ vectors.T
    return inverse @ right


def generalised_cross_validation(
    eigenvalues: Tensor, energies: Tensor, spread: float, rows: int, smallest: float
) -> float:
    """Return the ridge penalty with the least generalised cross-validation score (Golub et al., 1979).

    The score is `N |(I - A) Y|^2 / tr(I - A)^2`, with `A` the matrix, intercept included, that takes the
    targets `Y` `[N, C]` to their fits. Of 101 penalties, from 1e-8 to 100 times the largest eigenvalue in
    equal ratios, the largest is taken whose score is the least to a share of 1e-9: where the score is flat,
    rounding must not decide.

    Args:
        eigenvalues: `[r]`, the positive ones of the Gram matrix about the mean.
        energies: `[r]`, `|u_i^T Y|^2` for each of its left singular vectors.
        spread: `|Y|^2` about the targets' means.
        rows: `N`.
        smallest: what no penalty may be below: the size of an eigenvalue that rounding can make.
    """
    if not len(eigenvalues):
        return 1.0
    beyond = max(rows - 1 - len(eigenvalues), 0)
    # With as many directions as rows nothing is unexplained, and even rounding would count.
    unexplained = max(spread - float(energies.sum()), 0.0) if beyond else 0.0
    ratios = torch.logspace(-8, 2, 101, dtype=torch.float64, device=eigenvalues.device)
    penalties = (ratios * eigenvalues.max()).clamp(min=smallest)
    # Sums of positive terms only, which stay accurate where the fit is perfect and both tend to 0.
    left = penalties[:, None] / (eigenvalues + penalties[:, None])
    residual = unexplained + left.square() @ energies
    freedom = beyond + left.sum(1)
    scores = residual / freedom.square()
    return float(penalties[scores <= scores.min() * (1 + 1e-9)].max())


def positive_spectrum(gram: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[r]` of a Gram matrix above `smallest`, and their vectors `[d, r]`."""
    values, vectors = torch.linalg.eigh(gram)
    positive = values > smallest
    return values[positive], vectors[:, positive]


def negligible_eigenvalue(stats: FeatureStatistics) -> float:
    """Return the eigenvalue of a scatter, or of the Gram matrix, that rounding alone can make.

    Rounding errors of what is the same in all rows add up with `N`, the others with its root.
    """
    unit: float = torch.finfo(torch.float64).eps
    common = float(stats.total.square().sum()) / max(stats.rows, 1)
    everything = float(stats.upper.diagonal().sum())
    return 2 * unit * ((stats.rows + 16) * common + (math.sqrt(stats.rows) + 16) * everything)


def _classes_with_rows(stats: FeatureStatistics, method: str) -> Tensor:
    if stats.multi_label:
        raise UserError(f"The solver {method!r} needs rows of one class each; for multi-label rows use 'ridge'.")
    _require_contrast(stats)
    return stats.counts > 0


def _require_contrast(stats: FeatureStatistics) -> None:
    if not bool(((stats.counts > 0) & (stats.counts < stats.rows)).any()):
        present = int((stats.counts > 0).sum())
        raise UserError(
            f"A head needs rows of at least two classes, but the {stats.rows} rows here are of {present}."
            if not stats.multi_label
            else f"A head needs a class that some but not all of the {stats.rows} rows have."
        )


def _class_deviations(stats: FeatureStatistics) -> Tensor:
    """Return `mu_c - m`, `[C, d]`; zeros for classes without rows."""
    present = (stats.counts > 0)[:, None]
    means = stats.sums / stats.counts.clamp(min=1)[:, None]
    return torch.where(present, means - stats.total / stats.rows, 0.0)


def _mean_variance(stats: FeatureStatistics) -> Tensor:
    """Return the within-class variance averaged over features; over all rows where classes do not vary; or 1."""
    negligible = stats.negligible_scatter().sum()
    diagonal = stats.upper.diagonal().sum()
    counts = stats.counts.clamp(min=1)
    within = diagonal - (stats.sums.square().sum(1) / counts).sum()
    overall = diagonal - stats.total.square().sum() / stats.rows
    scatter = within if within > negligible else overall
    variance = scatter / (stats.rows * stats.num_features)
    return variance if scatter > negligible else torch.ones_like(variance)


def _log_priors(priors: str | Sequence[float] | Tensor, counts: Tensor) -> Tensor:
    if isinstance(priors, str):
        choices = {"empirical": counts.to(torch.float64), "uniform": torch.ones_like(counts, dtype=torch.float64)}
        if priors not in choices:
            raise UserError(f"The priors must be 'empirical', 'uniform' or a number per class, not {priors!r}.")
        chances = choices[priors]
    else:
        chances = torch.as_tensor(priors, dtype=torch.float64, device=counts.device)
    needed = chances[counts > 0] if chances.shape == counts.shape else chances
    if chances.shape != counts.shape or not bool(((needed > 0) & needed.isfinite()).all()):
        raise UserError(f"The priors must be a positive number for each of the {len(counts)} classes.")
    return chances.log() - needed.sum().log()


def _discriminant_head(stats: FeatureStatistics, present: Tensor, weight: Tensor, bias: Tensor) -> LinearHead:
    """Return the head on features as they are for one about the mean, with the classes without rows added."""
    all_weights = torch.zeros_like(stats.sums)
    all_biases = torch.full_like(stats.sums[:, 0], float(bias.min()) - ABSENT_MARGIN)
    all_weights[present] = weight
    all_biases[present] = bias - weight @ stats.mean()
    return LinearHead.from_weights(all_weights, all_biases)
