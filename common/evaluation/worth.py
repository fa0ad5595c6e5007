"""Value of each site's rows for the shared head: Shapley values and leave-one-out differences, from sums alone.

The ridge head of any coalition of sites follows from their added sums, and its squared error on held-out rows from the
sums of these. So every coalition is evaluated exactly, without a row and without an exchange. The value of a coalition
is the share of the held-out targets' variance that its head explains (R2): 0 for their mean, and for no sites.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.solvers.closed_form import (
    generalised_cross_validation,
    negligible_eigenvalue,
    positive_spectrum,
    solve_positive,
)
from fedhead.sums.features import FeatureStatistics

EXACT_SITES = 12
"""Largest number of sites whose `2^n` coalitions are all evaluated; beyond, orders of the sites are sampled."""

PERMUTATIONS = 100
"""Default number of sampled orders."""

LEAST_PERMUTATIONS = 40
"""With fewer, a normal interval would be too narrow."""

_NORMAL = 1.959964

Progress = Callable[[int, int], None]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SiteWorth:
    """The value of one site.

    Attributes:
        site: its name.
        rows: its training rows.
        rows_held_out: its held-out rows.
        shapley: its mean gain in R2 over all orders in which the sites could join; these add up to the R2 of all.
        low: lower limit of the 95 % interval from sampling orders; equal to `shapley` if it is exact.
        high: upper limit.
        alone: R2 of the head from its rows alone.
        leave_one_out: the loss of R2 without it.
        leave_one_out_elsewhere: the same on the other sites' held-out rows; None if they have none that vary.
    """

    site: str
    rows: int
    rows_held_out: int
    shapley: float
    low: float
    high: float
    alone: float
    leave_one_out: float
    leave_one_out_elsewhere: float | None


@dataclass(frozen=True)
class Worth:
    """The value of all sites.

    Attributes:
        sites: one entry per site, by name.
        value: R2 of the head of all sites on all held-out rows.
        rows: training rows.
        rows_held_out: held-out rows.
        penalty: of ridge regression, by generalised cross-validation on all sites' training rows.
        permutations: the number of sampled orders; 0 if the values are exact.
    """

    sites: tuple[SiteWorth, ...]
    value: float
    rows: int
    rows_held_out: int
    penalty: float
    permutations: int


def worth_of_sites(
    names: Sequence[str],
    train: Sequence[FeatureStatistics],
    held_out: Sequence[FeatureStatistics | None],
    *,
    permutations: int = 0,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Worth:
    """Return the value of each site for the pooled ridge head (Ghorbani & Zou, ICML 2019; Shapley, 1953).

    Args:
        names: of the sites.
        train: sums over each site's training rows.
        held_out: sums over each site's held-out rows, if it has any.
        permutations: the number of sampled orders of the sites, each followed by its reverse; 0 for exact values up to
            `EXACT_SITES` sites and for `PERMUTATIONS` beyond.
        seed: of the orders.
        progress: called with the number of coalitions done and of all.

    Raises:
        UserError: if there are no held-out rows, or their targets do not vary.
    """
    judges = [one for one in held_out if one is not None and one.rows]
    if not judges:
        raise UserError("The value of a site is measured on held-out rows, and no sums of any are kept.")
    judge = sum(judges[1:], start=judges[0].copy())
    weights = _weights(judge)
    if weights is None:
        raise UserError("The held-out rows have one class or one value only, so nothing can be explained.")
    everyone = sum(train[1:], start=train[0].copy())
    penalty = ridge_penalty(everyone)
    value = partial(_explained, judge=judge, weights=weights, penalty=penalty)
    exact = not permutations and len(names) <= EXACT_SITES
    orders = 0 if exact else max(permutations or PERMUTATIONS, LEAST_PERMUTATIONS)
    if exact:
        shapley = shapley_values(_all_coalitions(train, value, progress), len(names))
        low = high = shapley
    else:
        shapley, spread = _sampled(train, value, orders, seed, progress)
        low, high = shapley - _NORMAL * spread, shapley + _NORMAL * spread
    whole = value(everyone)
    found = []
    for number, name in enumerate(names):
        others = everyone - train[number]
        found.append(
            SiteWorth(
                site=name,
                rows=train[number].rows,
                rows_held_out=_rows(held_out[number]),
                shapley=float(shapley[number]),
                low=float(low[number]),
                high=float(high[number]),
                alone=value(train[number]),
                leave_one_out=whole - value(others),
                leave_one_out_elsewhere=_elsewhere(everyone, others, judge, held_out[number], penalty),
            )
        )
    return Worth(tuple(found), whole, everyone.rows, judge.rows, penalty, orders)


def ridge_penalty(stats: FeatureStatistics) -> float:
    """Return the penalty of ridge regression that `fedhead.solvers.closed_form.solve_ridge` selects."""
    cross = _cross(stats)
    smallest = negligible_eigenvalue(stats)
    values, vectors = positive_spectrum(stats.scatter(), smallest)
    energies = (vectors.T @ cross.T).square()
    totals = stats.target_totals
    spread = float(totals.sum() - totals.square().sum() / stats.rows)
    if stats.kind.real:
        energies, spread = energies / stats.target_scale().square(), float(len(totals) * stats.rows)
    return generalised_cross_validation(values, energies.sum(1) / values, spread, stats.rows, smallest)


def ridge_at(stats: FeatureStatistics, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weight `[C, d]` and intercept `[C]` of ridge regression on targets or indicators of 0 and 1.

    Unlike a head, it exists for rows of one class too: it then predicts that class.

    Args:
        stats: sums over at least one row.
        penalty: above 0.
    """
    gram = stats.scatter()
    gram.diagonal().add_(penalty)
    weight = solve_positive(gram, _cross(stats).T, penalty).T
    return weight, stats.target_totals / stats.rows - weight @ stats.mean()


def squared_errors(stats: FeatureStatistics, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `[C]`, the sum over the rows of statistics of `(y - W x - b)^2` for each target or indicator.

    Args:
        stats: sums over rows of features and targets.
        weight: `[C, d]`, float64.
        bias: `[C]`, float64.
    """
    about = bias + weight @ stats.origin
    mixed = (weight * stats.sums).sum(1) + about * stats.target_totals
    squares = ((weight @ stats.gram()) * weight).sum(1)
    squares += 2 * about * (weight @ stats.total) + stats.rows * about.square()
    return (stats.target_squares - 2 * mixed + squares).clamp(min=0)


def _cross(stats: FeatureStatistics) -> Tensor:
    return stats.sums - torch.outer(stats.target_totals / stats.rows, stats.total)


def _rows(stats: FeatureStatistics | None) -> int:
    return 0 if stats is None else stats.rows


def _weights(judge: FeatureStatistics) -> Tensor | None:
    """Return `[C]`, the weight of each target's squared errors in `1 - R2`; None if no target varies.

    Indicators of classes share their variance; real targets count equally, each in its own units.
    """
    scatter = judge.target_scatter()
    if not bool((scatter > 0).any()):
        return None
    if judge.kind.real:
        varying = scatter > 0
        return torch.where(varying, 1 / scatter, 0.0) / varying.sum()
    return torch.ones_like(scatter) / scatter.sum()


def _explained(coalition: FeatureStatistics, judge: FeatureStatistics, weights: Tensor, penalty: float) -> float:
    """Return R2 on the rows of `judge` of the head of `coalition`; 0 for no rows."""
    if coalition.rows == 0:
        return 0.0
    return 1 - float(weights @ squared_errors(judge, *ridge_at(coalition, penalty)))


def _elsewhere(
    everyone: FeatureStatistics,
    others: FeatureStatistics,
    judge: FeatureStatistics,
    own: FeatureStatistics | None,
    penalty: float,
) -> float | None:
    rest = judge if own is None else judge - own
    if rest.rows == 0 or (weights := _weights(rest)) is None:
        return None
    return _explained(everyone, rest, weights, penalty) - _explained(others, rest, weights, penalty)


def _all_coalitions(
    train: Sequence[FeatureStatistics], value: Callable[[FeatureStatistics], float], progress: Progress
) -> FloatArray:
    """Return `[2^n]`, the value of each coalition, whose members are the binary digits of its index."""
    values = np.zeros(2 ** len(train))
    nobody = train[0] - train[0]
    for done, (index, sums) in enumerate(_coalitions(train, nobody, 0, 0), start=1):
        values[index] = value(sums) if index else 0.0
        progress(done, len(values))
    return values


def _coalitions(
    train: Sequence[FeatureStatistics], sums: FeatureStatistics, site: int, index: int
) -> Iterator[tuple[int, FeatureStatistics]]:
    """Yield all coalitions with a given choice among the first sites; at most `n` sums exist at a time."""
    if site == len(train):
        yield index, sums
        return
    yield from _coalitions(train, sums, site + 1, index)
    yield from _coalitions(train, sums + train[site], site + 1, index | 1 << site)


def shapley_values(values: FloatArray, sites: int) -> FloatArray:
    """Return `[n]`, the Shapley values of a game.

    Args:
        values: `[2^n]`, the value of each coalition, whose members are the binary digits of its index.
        sites: `n`.
    """
    indices = np.arange(len(values))
    members = ((indices[:, None] >> np.arange(sites)) & 1).sum(1)
    found = np.zeros(sites)
    for site in range(sites):
        outside = indices[(indices >> site) & 1 == 0]
        sizes = members[outside]
        chances = np.array([1 / (sites * math.comb(sites - 1, size)) for size in range(sites)])
        found[site] = chances[sizes] @ (values[outside | 1 << site] - values[outside])
    return found


def _sampled(
    train: Sequence[FeatureStatistics],
    value: Callable[[FeatureStatistics], float],
    orders: int,
    seed: int,
    progress: Progress,
) -> tuple[FloatArray, FloatArray]:
    """Return the mean gain `[n]` of each site over sampled orders, and its standard error.

    Each order is followed by its reverse, because gains of early and late sites vary oppositely.
    """
    generator = random.Random(seed)
    pairs = -(-orders // 2)
    gains = np.zeros((pairs, len(train)))
    for pair in range(pairs):
        order = list(range(len(train)))
        generator.shuffle(order)
        for turn, joining in enumerate((order, order[::-1])):
            sums, before = train[joining[0]].copy(), 0.0
            for place, site in enumerate(joining):
                if place:
                    sums += train[site]
                after = value(sums)
                gains[pair, site] += (after - before) / 2
                before = after
            progress(2 * pair + turn + 1, 2 * pairs)
    return gains.mean(0), gains.std(0, ddof=1) / math.sqrt(pairs)
