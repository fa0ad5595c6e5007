"""Linear discriminant analysis whose shrinkage minimises generalised cross-validation, from sums alone."""

import torch
from torch import Tensor

from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import classes_with_rows, discriminant_head, solvers
from fedhead.sums.features import FeatureStatistics

SHRINKAGES = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 2))
"""Candidate shrinkages: half decades from 1e-5 to 10^0.5, in units of a feature's variance."""


@solvers.register("lda-gcv")
def solve_cross_validated_lda(stats: FeatureStatistics) -> LinearHead:
    """Solve linear discriminant analysis, its covariance shrunk by generalised cross-validation (Golub et al., 1979).

    In units of each feature's standard deviation, with the correlation `R` of all rows, the class means `U` `[C, d]`
    about the mean and the classes' shares `P`, the covariance within classes is `R - U^T P U`. With `A = R + k I`,
    `W^T = (A - U^T P U)^-1 U^T = A^-1 U^T (I - P U A^-1 U^T)^-1`, so one Cholesky factor for each `k` gives the head,
    and also the ridge regression of the classes' indicators, `B = A^-1 U^T P`, by which `k` is chosen: it has the least
    `RSS / (1 - df / N)^2` with `RSS = 1 - |P|^2 - tr(P U B) - k |B|^2` and `df = 1 + d - k tr A^-1`.

    Where the score is flat to 1e-9, the larger `k` is taken. Classes without rows are as in `solve_lda`.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: for multi-label statistics or fewer than two classes with rows.
    """
    present = classes_with_rows(stats, "lda-gcv")
    correlation, means, inverse_deviation = _standardised(stats, present)
    shares = stats.counts[present].to(torch.float64) / stats.rows
    best, solved = torch.inf, torch.zeros_like(means)
    for shrinkage in reversed(SHRINKAGES):
        score, inner = _score(correlation, means, shares, shrinkage, stats.rows)
        if score < best * (1 - 1e-9) or not torch.isfinite(torch.tensor(best)):
            best, solved = score, inner
    # inner = A^-1 U^T, of the best shrinkage
    coupling = torch.eye(len(shares), dtype=torch.float64, device=means.device) - shares[:, None] * (means @ solved)
    weight = torch.linalg.solve(coupling, solved, left=False).T
    bias = -0.5 * (weight * means).sum(1) + shares.log()
    return discriminant_head(stats, present, weight * inverse_deviation, bias)


@torch.no_grad()
def cross_validation_error(stats: FeatureStatistics) -> float:
    """Return the least generalised cross-validation error of ridge regression on the classes' indicators.

    It is in units of the indicators' variance: 1 for features that say nothing. Unlike the error on training rows, it
    does not improve with features that only add width.

    Args:
        stats: sums over `N` rows of `d` features and `C` classes, single-label.

    Raises:
        UserError: for multi-label statistics or fewer than two classes with rows.
    """
    present = classes_with_rows(stats, "lda-gcv")
    correlation, means, _ = _standardised(stats, present)
    shares = stats.counts[present].to(torch.float64) / stats.rows
    least = min(_score(correlation, means, shares, one, stats.rows)[0] for one in SHRINKAGES)
    return least / (1 - float(shares.square().sum()))


def _standardised(stats: FeatureStatistics, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the correlation `[d, d]`, class means `[C, d]` in deviations, and the inverse deviations `[d]`.

    Features that do not vary have zeros in all three, and 1 on the correlation's diagonal.
    """
    scatter = stats.scatter()
    varies = stats.varying(scatter.diagonal())
    inverse = torch.where(varies, scatter.diagonal() / stats.rows, torch.inf).rsqrt()
    correlation = scatter.mul_(inverse).mul_(inverse[:, None] / stats.rows)
    correlation.diagonal().fill_(1)
    means = stats.sums[present] / stats.counts[present, None].to(torch.float64) - stats.total / stats.rows
    return correlation, means * inverse, inverse


def _score(correlation: Tensor, means: Tensor, shares: Tensor, shrinkage: float, rows: int) -> tuple[float, Tensor]:
    """Return the cross-validation score and `A^-1 U^T` `[d, C]`; an infinite score if rounding makes `A` indefinite."""
    shifted = correlation.clone()
    shifted.diagonal().add_(shrinkage)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed):
        return float("inf"), torch.zeros_like(means.T)
    solved = torch.cholesky_solve(means.T, factor)
    fitted = solved * shares
    # |L^-1|^2 is the trace of A^-1, and triangular solves need no second product.
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    trace = float(torch.linalg.solve_triangular(factor, identity, upper=False).square().sum())
    explained = float((means.T * shares * fitted).sum()) + shrinkage * float(fitted.square().sum())
    residual = max(1 - float(shares.square().sum()) - explained, 0.0)
    left = 1 - (1 + len(factor) - shrinkage * trace) / rows
    return (residual / left**2 if left > 0 else float("inf")), solved
