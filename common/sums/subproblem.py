"""Statistics of a sub-problem, from those of the whole: some of the classes or targets, or classes merged."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedhead.sums.features import FeatureStatistics


def merged(stats: FeatureStatistics, groups: Sequence[Sequence[int]]) -> FeatureStatistics:
    """Return the statistics of the same rows with classes merged; they equal those of relabelled rows.

    Args:
        stats: sums over rows of one class each.
        groups: the former classes of each new class; every class occurs once.

    Raises:
        ValueError: if rows can have several classes, or a class is missing or occurs twice.
    """
    if not stats.kind.exclusive:
        raise ValueError("Only classes of rows with one class each can be merged.")
    if sorted(number for group in groups for number in group) != list(range(stats.num_classes)):
        raise ValueError(f"Each of the {stats.num_classes} classes must be in one group.")
    owner = torch.empty(stats.num_classes, dtype=torch.int64)
    for place, group in enumerate(groups):
        owner[list(group)] = place
    counts = stats.counts.new_zeros(len(groups)).index_add_(0, owner, stats.counts)
    sums = stats.sums.new_zeros(len(groups), stats.num_features).index_add_(0, owner, stats.sums)
    return replace(stats.copy(), counts=counts, sums=sums)


def restricted(stats: FeatureStatistics, columns: Sequence[int]) -> FeatureStatistics:
    """Return the statistics for some of the classes or targets.

    Targets, and labels of which a row can have several, are separate problems on the same rows, and the result is
    exact. The rows of one class each are only those of the chosen classes. Their Gram matrix is not among the sums: its
    part about the class means is taken from all classes, in proportion to the rows. That is the assumption of linear
    discriminant analysis, whose head for some classes is then the head for all of them without the others' rows.

    Args:
        stats: sums over all rows.
        columns: the classes or targets to keep, in their new order.

    Raises:
        ValueError: if one occurs twice or does not exist.
    """
    chosen = torch.tensor(list(columns), dtype=torch.int64)
    if len(set(columns)) < len(columns) or not all(0 <= one < stats.num_classes for one in columns):
        raise ValueError(f"Cannot restrict {stats.num_classes} columns to {list(columns)}.")
    counts, sums = stats.counts[chosen], stats.sums[chosen]
    if not stats.kind.exclusive:
        squares = stats.squares[chosen] if stats.kind.real else stats.squares.clone()
        return replace(stats.copy(), counts=counts, sums=sums, squares=squares)
    if len(chosen) == stats.num_classes:
        return replace(stats.copy(), counts=counts, sums=sums)
    rows = int(counts.sum())
    share = rows / stats.rows if stats.rows else 0.0
    upper = stats.within_scatter().mul_(share) + _between(counts, sums)
    return FeatureStatistics(stats.origin.clone(), rows, counts, sums, sums.sum(0), upper, stats.kind)


def _between(counts: Tensor, sums: Tensor) -> Tensor:
    present = counts > 0
    scaled = sums[present] / counts[present, None].to(torch.float64).sqrt()
    return scaled.T @ scaled
