"""Discrete-time proportional hazards from sums, by one step of Newton's method from the model without features."""

import torch

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import shrink_correlation, solvers
from fedhead.sums.features import FeatureStatistics


@solvers.register("hazards")
def solve_hazards(stats: FeatureStatistics) -> LinearHead:
    """Solve hazards `P(event in bin k | at risk in k) = sigmoid(b_k + w . x)` from sums over events and rows at risk.

    With `d_k` events among `n_k` rows at risk, `h_k = d_k / n_k`, and the sums `e_k` and `r_k` of their features, the
    score at `w = 0` is `U = sum_k (e_k - h_k r_k)`, and the information `sum_k n_k h_k (1 - h_k) S` if all bins share
    the covariance `S` of the features, shrunk as in `solve_lda`. One step from `w = 0` gives
    `w = S^-1 U / sum_k d_k (1 - h_k)`: linear discriminant analysis within each bin with one direction (Efron, JASA
    1975; Cox, JRSS B 1972). `b_k = logit h_k - w . r_k / n_k - (1/2 - h_k) w^T S w`, with half an event added to `d_k`
    and one row to `n_k`, so that bins without events stay finite.

    Args:
        stats: sums over rows of `d` features and `2 B` marks of 0 or 1: an event in each bin, then at risk in it.

    Returns:
        A head with weight `[2 B, d]` and bias `[2 B]`, whose last `B` outputs are 0.

    Raises:
        UserError: if there are no events, or none among rows that are otherwise at risk.
    """
    counts, bins = stats.target_totals, stats.num_classes // 2
    events, risk = counts[:bins], counts[bins:]
    information = float((events * (1 - events / risk.clamp(min=1))).sum())
    if not information:
        raise UserError(
            f"The sites' rows have {int(events.sum())} events, and no rows without an event to compare them with: "
            "hazards cannot be estimated."
        )
    centre = stats.total / stats.rows
    marks = stats.sums - torch.outer(counts, centre)
    score = (marks[:bins] - (events / risk.clamp(min=1))[:, None] * marks[bins:]).sum(0)
    covariance = shrink_correlation(stats.scatter(), stats)
    direction = covariance.solve(score[None])[0] / information
    hazard = (events + 0.5) / (risk + 1)
    spread = float(direction @ score) / information
    means = marks[bins:] / risk.clamp(min=1)[:, None]
    bias = hazard.logit() - means @ direction - (0.5 - hazard) * spread - direction @ (stats.origin + centre)
    weight = torch.cat([direction.expand(bins, -1), torch.zeros_like(marks[bins:])])
    return LinearHead.from_weights(weight, torch.cat([bias, torch.zeros_like(bias)]))
