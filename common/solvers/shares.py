"""Linear discriminant analysis on shares: rows that belong to several classes in parts, such as cells of an image."""

from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import discriminant_head, shrink_correlation, solvers
from fedhead.sums.features import FeatureStatistics


@solvers.register("lda-shares")
def solve_share_lda(stats: FeatureStatistics) -> LinearHead:
    """Solve linear discriminant analysis on rows whose targets are shares of classes that sum to 1.

    Equal to `solve_lda` on rows that are repeated for each class with their share as weight: with `n_c` the summed
    shares and `mu_c` the weighted means, the scatter within classes is `G - sum_c n_c mu_c mu_c^T`. It is shrunk by the
    number of items rather than of places.

    Args:
        stats: sums over rows of `d` features and the shares of `C` classes.

    Returns:
        A head with weight `[C, d]` and bias `[C]`.

    Raises:
        UserError: if fewer than two classes have a share of any row.
    """
    counts = stats.target_totals
    present = counts > 0
    if int(present.sum()) < 2:
        raise UserError(f"A head needs places of at least two classes, but all {stats.rows} are of one.")
    means = stats.sums[present] / counts[present, None]
    within = stats.gram() - (means * counts[present, None]).T @ means
    within = (within + within.T) / 2
    if bool((within.diagonal() <= stats.negligible_scatter()).all()):
        within = stats.scatter().diagonal().diag()
    deviations: Tensor = means - stats.total / stats.rows
    weight = shrink_correlation(within, stats).solve(deviations)
    bias = -0.5 * (weight * deviations).sum(1) + (counts[present] / counts.sum()).log()
    return discriminant_head(stats, present, weight, bias)
