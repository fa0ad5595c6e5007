"""Closed-form heads from feature statistics alone, equal to fitting them on all sites' rows pooled.

A solver is a function of statistics, registered by name. Notation: `n_c` counts, `N` rows, `mu_c` class means,
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
from fedhead.sums.features import FeatureStatistics

solvers: Registry[Callable[..., LinearHead]] = Registry("solver")

ABSENT_MARGIN = 30.0
"""Margin of the logit of a class without rows below the largest logit: its probability is under `e^-30`."""


def solve_head(stats: FeatureStatistics, method: str = "lda", **parameters: object) -> LinearHead:
    """Solve a head from statistics with the solver `method`.

    Args:
        stats: sums over the rows of all sites.
        method: the name of a solver: `lda`, `ridge`, `nearest-mean`, or another registered one.
        parameters: the solver's own parameters.

    Returns:
        A float64 head for the original features, neither centred nor standardised.

    Raises:
        UserError: (a ValueError) if there is no such solver, it does not take these parameters, or the statistics do
            not determine a head.
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
    """Solve linear discriminant analysis with a shrunk covariance: the default head.

    Classes are modelled as Gaussian with means `mu_c` and a common covariance `S`: the within-class scatter over `N`,
    with its correlation shrunk by `shrink_correlation`. About `m`, `W_c = S^-1 (mu_c - m)` and
    `b_c = -1/2 (mu_c - m)^T S^-1 (mu_c - m) + log prior_c`, so the logits are log-odds of the classes given
    `x`, up to a term common to all classes. A feature without variance within classes has weight 0. If no feature
    has any (one row per class), each feature's variance over all rows is used instead.

    A class without rows has weight 0 and a bias `ABSENT_MARGIN` below the lowest other one. It is never predicted:
    since `sum_c n_c W_c = 0`, the largest of the other logits is never below the lowest of their biases about `m`.
    Its logit is finite, so that training can raise it.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.
        priors: `empirical` (class frequencies), `uniform`, or `[C]` positive numbers, which are normalised to sum to 1.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: for multi-label statistics, fewer than two classes with rows, or invalid priors.
    """
    present = classes_with_rows(stats, "lda")
    log_priors = _log_priors(priors, stats.counts)[present]
    within = stats.within_scatter()
    if bool((within.diagonal() <= stats.negligible_scatter()).all()):
        within = stats.scatter().diagonal().diag()
    shrunk = shrink_correlation(within, stats)
    deviations = _class_deviations(stats)[present]
    weight = shrunk.solve(deviations)
    bias = -0.5 * (weight * deviations).sum(1) + log_priors
    return discriminant_head(stats, present, weight, bias)


@solvers.register("nearest-mean")
def solve_nearest_mean(stats: FeatureStatistics) -> LinearHead:
    """Solve the nearest class mean: Gaussian classes with equal priors and equal spherical covariance.

    About `m`, `W_c = (mu_c - m) / v` and `b_c = -1/2 |mu_c - m|^2 / v`, with `v` the mean within-class variance of a
    feature (over all rows if every class has one row). The logits are log-odds if features are independent with
    equal variance. Otherwise they are overconfident, but still ordered by distance. A class without rows is never
    predicted, as in `solve_lda`.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: for multi-label statistics or fewer than two classes with rows.
    """
    present = classes_with_rows(stats, "nearest-mean")
    deviations = _class_deviations(stats)[present]
    variance = _mean_variance(stats)
    weight = deviations / variance
    bias = -0.5 * (weight * deviations).sum(1)
    return discriminant_head(stats, present, weight, bias)


@solvers.register("ridge")
def solve_ridge(stats: FeatureStatistics, penalty: float | None = None) -> LinearHead:
    """Solve ridge regression on targets or class indicators from sums alone (Hoerl & Kennard, 1970).

    Solves `(G_m + penalty * I) W^T = S_m`, with `G_m` the Gram matrix and `S_m` the sums of targets times features
    about `m`, which equals fitting `sklearn.linear_model.Ridge` with its unpenalised intercept on all rows pooled.

    Several real targets share one penalty, chosen with each target in units of its own standard deviation.

    For single-label statistics the indicators are 0 and 1: the logits estimate class probabilities and sum to 1. They
    are not log-odds, and their softmax is much too flat: predict the largest. A class without rows has logit 0, below
    the largest. For multi-label statistics the indicators are -1 and 1, as in
    `sklearn.linear_model.RidgeClassifier`, so that a logit above 0, or a sigmoid above one half, predicts the class.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes.
        penalty: `>= 0`, in units of squared feature norm; `None` selects it by `generalised_cross_validation`.
            0 is least squares, with the minimum norm if features are linearly dependent.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: if `penalty` is negative or not finite, if no class has rows both inside and outside it, or if a
            real target does not vary.
    """
    if penalty is not None and not 0 <= penalty < math.inf:
        raise UserError(f"The penalty of ridge regression must be 0 or more, not {penalty}.")
    _require_contrast(stats)
    counts = stats.target_totals
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
            energies, spread = _energies(stats, rotated)
            penalty = generalised_cross_validation(values, energies / values, spread, stats.rows, smallest)
        weight = (vectors @ (rotated / (values + penalty)[:, None])).T
    bias = counts / stats.rows - weight @ stats.mean()
    if not (stats.kind.exclusive or stats.kind.real):
        weight, bias = 2 * weight, 2 * bias - 1
    return LinearHead.from_weights(weight, bias)


def solve_prototypes(stats: FeatureStatistics, scale: Tensor | None = None) -> Tensor:
    """Return class means about the mean of all rows as unit vectors `[C, d]`, to initialise a cosine head.

    A class without rows, or with the mean of all rows, gets a fixed random direction, which in high dimension is
    nearly orthogonal to every row: at zeros the gradient of a cosine is unbounded.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes.
        scale: `[d]`, the divisor of deviations from the mean, such as `stats.scale()` for a head on standardised
            features; ones by default.

    Raises:
        UserError: if no class has rows both inside and outside it.
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
    """Covariance `S = D^1/2 R D^1/2` with `R` shrunk towards the identity.

    Attributes:
        matrix: `[d, d]`, the shrunk `R`; the identity for features that do not vary.
        inverse_deviation: `[d]`, the diagonal of `D^-1/2`; 0 for features that do not vary.
        shrinkage: the weight of the identity in `matrix`.
    """

    matrix: Tensor
    inverse_deviation: Tensor
    shrinkage: float

    def solve(self, rows: Tensor) -> Tensor:
        """Return `rows S^-1`, `[k, d]`, with the inverse taken as 0 for features that do not vary."""
        standardised = rows * self.inverse_deviation
        solved = solve_positive(self.matrix, standardised.T, self.shrinkage).T
        return solved * self.inverse_deviation


def shrink_correlation(scatter: Tensor, stats: FeatureStatistics) -> ShrunkCorrelation:
    """Shrink the correlation of a scatter by oracle approximating shrinkage, OAS (Chen et al., 2010, eq. 23).

    `(1 - a) R + a I` for the correlation `R` of the `p` features that vary, with
    `a = (t + 1) / ((N + 1) (t - 1/p))`, at most 1, and `t = tr(R^2) / p^2`: only traces are needed. Equal to
    `sklearn.covariance.OAS(assume_centered=True)` on centred and standardised rows, which also omits the terms `2/p`
    of the paper. If rows are places of items, `N` is the number of items: places of one item are alike.

    Args:
        scatter: `[d, d]`, symmetric; overwritten.
        stats: the statistics of its rows.
    """
    variance = scatter.diagonal() / stats.rows
    varies = stats.varying(scatter.diagonal())
    inverse_deviation = torch.where(varies, variance, torch.inf).rsqrt()
    correlation = scatter.mul_(inverse_deviation).mul_(inverse_deviation[:, None] / stats.rows)
    correlation.diagonal().copy_(varies)
    p = int(varies.sum())
    shrinkage = 1.0
    if p > 1:
        entries = correlation.view(-1)
        mean_square = float(entries @ entries) / p**2
        excess = (stats.independent + 1) * (mean_square - 1 / p)
        shrinkage = min((mean_square + 1) / excess, 1.0) if excess > 0 else 1.0
    correlation.mul_(1 - shrinkage).diagonal().fill_(1)
    return ShrunkCorrelation(correlation, inverse_deviation, shrinkage)


def solve_positive(matrix: Tensor, right: Tensor, smallest: float) -> Tensor:
    """Return `matrix^-1 right` for a symmetric matrix with eigenvalues of at least `smallest`.

    Uses the Cholesky factor, or if rounding has made the matrix indefinite, its eigenvalues raised to `smallest`.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse: Tensor = (vectors / values.clamp(min=smallest)) @ vectors.T
    return inverse @ right


def ridge_error(stats: FeatureStatistics) -> float:
    """Return the least generalised cross-validation error of ridge regression, in units of the targets' variance.

    It is 1 for features that say nothing. Unlike the error on training rows, it does not improve with features that
    only add width.

    Args:
        stats: sums over `N` rows of `d` features.

    Raises:
        UserError: as `solve_ridge` does.
    """
    _require_contrast(stats)
    smallest = negligible_eigenvalue(stats)
    cross = stats.sums - torch.outer(stats.target_totals / stats.rows, stats.total)
    values, vectors = positive_spectrum(stats.scatter(), smallest)
    energies, spread = _energies(stats, vectors.T @ cross.T)
    if not len(values):
        return 1.0
    _, scores = _scores(values, energies / values, spread, stats.rows, smallest)
    return float(scores.min()) * (stats.rows - 1) ** 2 / spread


def _energies(stats: FeatureStatistics, rotated: Tensor) -> tuple[Tensor, float]:
    """Return the squares `[r]` of products of targets and eigenvectors, and those of the targets about their means.

    Each real target is in units of its standard deviation.

    Args:
        stats: the sums.
        rotated: `[r, C]`, the products.
    """
    counts, energies = stats.target_totals, rotated.square()
    if stats.kind.real:
        return (energies / stats.target_scale().square()).sum(1), float(len(counts) * stats.rows)
    return energies.sum(1), float(counts.sum() - counts.square().sum() / stats.rows)


def generalised_cross_validation(
    eigenvalues: Tensor, energies: Tensor, spread: float, rows: int, smallest: float
) -> float:
    """Return the ridge penalty with the lowest generalised cross-validation score (Golub et al., 1979).

    The score is `|(I - A) Y|^2 / tr(I - A)^2`, with `A` the hat matrix, intercept included, that maps the targets
    `Y` `[N, C]` to their fits. There are 101 candidates, spaced geometrically from 1e-8 to 100 times the largest
    eigenvalue. The largest one with a score within 1e-9 of the lowest is returned, so that rounding does not decide
    where the score is flat.

    Args:
        eigenvalues: `[r]`, the positive eigenvalues of the Gram matrix about the mean.
        energies: `[r]`, `|u_i^T Y|^2` for each of its left singular vectors.
        spread: `|Y|^2` about the targets' means.
        rows: `N`.
        smallest: the lower bound of the penalty: the size of eigenvalues due to rounding.
    """
    if not len(eigenvalues):
        return 1.0
    penalties, scores = _scores(eigenvalues, energies, spread, rows, smallest)
    return float(penalties[scores <= scores.min() * (1 + 1e-9)].max())


def _scores(eigenvalues: Tensor, energies: Tensor, spread: float, rows: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Return the candidates of `generalised_cross_validation` and their scores, `[101]` each."""
    beyond = max(rows - 1 - len(eigenvalues), 0)
    # With as many directions as rows nothing is unexplained, and rounding errors would count as residual.
    unexplained = max(spread - float(energies.sum()), 0.0) if beyond else 0.0
    ratios = torch.logspace(-8, 2, 101, dtype=torch.float64, device=eigenvalues.device)
    penalties = (ratios * eigenvalues.max()).clamp(min=smallest)
    # Sums of positive terms only, which remain accurate for a perfect fit, where both tend to 0.
    left = penalties[:, None] / (eigenvalues + penalties[:, None])
    residual = unexplained + left.square() @ energies
    freedom = beyond + left.sum(1)
    return penalties, residual / freedom.square()


def positive_spectrum(gram: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[r]` of a Gram matrix above `smallest`, and the eigenvectors `[d, r]`."""
    values, vectors = torch.linalg.eigh(gram)
    positive = values > smallest
    return values[positive], vectors[:, positive]


def negligible_eigenvalue(stats: FeatureStatistics) -> float:
    """Return the largest eigenvalue of a scatter, or of the Gram matrix, that rounding alone can cause.

    Rounding errors from components common to all rows grow with `N`, the others with its square root.
    """
    unit: float = torch.finfo(torch.float64).eps
    common = float(stats.total.square().sum()) / max(stats.rows, 1)
    everything = float(stats.upper.diagonal().sum())
    return 2 * unit * ((stats.rows + 16) * common + (math.sqrt(stats.rows) + 16) * everything)


class ConstantTargetError(UserError):
    """A target with the same value in all rows.

    Args:
        column: its position among the targets.
        rows: the number of rows.
        name: its name, if known.
    """

    def __init__(self, column: int, rows: int, name: str = "") -> None:
        target = f"Target {name!r}" if name else f"Target {column + 1}"
        super().__init__(f"{target} cannot be predicted: it has the same value in all {rows} rows.")
        self.column, self.rows = column, rows


def classes_with_rows(stats: FeatureStatistics, method: str) -> Tensor:
    """Return `[C]`, bool: the classes with rows.

    Raises:
        UserError: for statistics of other targets, or fewer than two classes with rows.
    """
    if not stats.kind.exclusive:
        what = "real targets" if stats.kind.real else "multi-label rows"
        raise UserError(f"The solver {method!r} needs rows of one class each; for {what} use 'ridge'.")
    _require_contrast(stats)
    return stats.counts > 0


def _require_contrast(stats: FeatureStatistics) -> None:
    if stats.kind.real:
        constant = (stats.target_scatter() == 0).nonzero()[:, 0].tolist()
        if constant:
            raise ConstantTargetError(constant[0], stats.rows)
        return
    if not bool(((stats.counts > 0) & (stats.counts < stats.rows)).any()):
        present = int((stats.counts > 0).sum())
        raise UserError(
            f"A head needs rows of at least two classes, but the {stats.rows} rows cover {present}."
            if stats.kind.exclusive
            else f"A head needs a class that some but not all of the {stats.rows} rows have."
        )


def _class_deviations(stats: FeatureStatistics) -> Tensor:
    """Return `mu_c - m`, `[C, d]`; zeros for classes without rows."""
    present = (stats.counts > 0)[:, None]
    means = stats.sums / stats.counts.clamp(min=1)[:, None]
    return torch.where(present, means - stats.total / stats.rows, 0.0)


def _mean_variance(stats: FeatureStatistics) -> Tensor:
    """Return the within-class variance averaged over features; over all rows if classes do not vary; else 1."""
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
            raise UserError(f"The priors must be 'empirical', 'uniform' or one number per class, not {priors!r}.")
        chances = choices[priors]
    else:
        chances = torch.as_tensor(priors, dtype=torch.float64, device=counts.device)
    needed = chances[counts > 0] if chances.shape == counts.shape else chances
    if chances.shape != counts.shape or not bool(((needed > 0) & needed.isfinite()).all()):
        raise UserError(f"The priors must be a positive number for each of the {len(counts)} classes.")
    return chances.log() - needed.sum().log()


def discriminant_head(stats: FeatureStatistics, present: Tensor, weight: Tensor, bias: Tensor) -> LinearHead:
    """Return the head for the original features from one about the mean, with the classes without rows added."""
    all_weights = torch.zeros_like(stats.sums)
    all_biases = torch.full_like(stats.sums[:, 0], float(bias.min()) - ABSENT_MARGIN)
    all_weights[present] = weight
    all_biases[present] = bias - weight @ stats.mean()
    return LinearHead.from_weights(all_weights, all_biases)
