"""Closed-form heads of detection: objectness, classes and boxes, each from the sums of its own places."""

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import ABSENT_MARGIN, solve_positive, solvers
from fedhead.solvers.shares import solve_share_lda
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import PLACES

SHAPE = 4
"""Numbers that describe a box."""

PENALTY = 0.01
"""Penalty of the ridge regression of shapes, in units of a feature's mean scatter.

Cross-validation from sums would take the places of one item as independent, and choose hardly any.
"""


@solvers.register("boxes")
def solve_boxes(stats: FeatureStatistics) -> LinearHead:
    """Solve the head of a detector: linear maps of which those of classes and shapes see only places that find a box.

    With the weight `w` of a place that finds a box (0 for others), its objectness `o`, and that box's class `y` and
    shape `t`, the targets of a place are `(w y, o y, w y t^T, w x)`. The products `w x` make the weighted Gram matrix
    of the places with a box a part of the sums.

    - The objectness of a class is the mean of two logits of linear discriminant analysis on shares, over all places:
      this class against places without an object, among the shares `o y` and `1 - o`, and objects of any class, the
      shares `o` and `1 - o`. The second shrinks the first towards what all classes have in common: a class of small
      objects has few places.
    - Classes are linear discriminant analysis over places with a box.
    - Shapes are ridge regression over these, with slopes that all classes share and an intercept for each class: large
      and small kinds of objects differ in more than their features say linearly.

    Args:
        stats: sums over places of `d` features and `6 C + d` targets.

    Returns:
        A head with weight `[6 C, d]` and bias `[6 C]`: logits of the classes, of the objectness of each class, and the
        shape of a box of each class.

    Raises:
        UserError: if no place finds a box, or all do.
    """
    classes, rest = divmod(stats.num_classes - stats.num_features, 2 + SHAPE)
    if classes < 1 or rest:
        raise ValueError(f"{stats.num_classes} targets of {stats.num_features} features are not those of boxes.")
    if not bool((stats.counts[:classes] > 0).any()):
        raise UserError("A detector needs boxes, but the sites' images have none that may be learned from.")
    parts = [_classes(stats, classes), _objectness(stats, classes), _shape(stats, classes)]
    weight, bias = (torch.cat(some) for some in zip(*parts, strict=True))
    return LinearHead.from_weights(weight, bias)


def with_boxes(stats: FeatureStatistics, classes: int) -> FeatureStatistics:
    """Return the statistics of the places that find a box, with the targets `w y` of `C` classes.

    Their weights are divided by their mean over a whole number of rows.

    Args:
        stats: as `solve_boxes` takes them.
        classes: `C`.
    """
    counts = stats.counts[:classes]
    rows = max(1, round(float(counts.sum())))
    scale = rows / float(counts.sum())
    total = stats.sums[:classes].sum(0)
    products = stats.sums[(2 + SHAPE) * classes :] - torch.outer(stats.origin, total)
    gram = (products + products.T) * (scale / 2)
    gram.diagonal().clamp_(min=0)
    sums = stats.sums[:classes] * scale
    return FeatureStatistics(
        stats.origin,
        rows,
        counts * scale,
        sums,
        sums.sum(0),
        gram.triu(),
        PLACES,
        counts * scale,
        stats.items,
    )


def _classes(stats: FeatureStatistics, classes: int) -> tuple[Tensor, Tensor]:
    own = with_boxes(stats, classes)
    if int((own.counts > 0).sum()) > 1:
        head = solve_share_lda(own)
        return head.weight.detach(), head.bias.detach()
    bias = torch.where(own.counts > 0, 0.0, -ABSENT_MARGIN).to(own.sums)
    return torch.zeros_like(own.sums), bias


def _objectness(stats: FeatureStatistics, classes: int) -> tuple[Tensor, Tensor]:
    counts, sums = (one[classes : 2 * classes] for one in (stats.counts, stats.sums))
    own = _against_rest(stats, counts, sums)
    shared = _against_rest(stats, counts.sum(0, keepdim=True), sums.sum(0, keepdim=True))
    return (own[0] + shared[0]) / 2, (own[1] + shared[1]) / 2


def _against_rest(stats: FeatureStatistics, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-odds of kinds of places, of summed shares `[k]` and features `[k, d]`, against all others."""
    shares = FeatureStatistics(
        stats.origin,
        stats.rows,
        torch.cat([counts, (stats.rows - counts.sum())[None]]),
        torch.cat([sums, (stats.total - sums.sum(0))[None]]),
        stats.total,
        stats.upper,
        PLACES,
        torch.zeros(len(counts) + 1).to(sums),
        stats.items,
    )
    head = solve_share_lda(shares)
    weight, bias = head.weight.detach(), head.bias.detach()
    return weight[:-1] - weight[-1], bias[:-1] - bias[-1]


def _shape(stats: FeatureStatistics, classes: int) -> tuple[Tensor, Tensor]:
    own = with_boxes(stats, classes)
    present = own.counts > 0
    counts = own.counts[present]
    scale = own.rows / float(stats.counts[:classes].sum())
    columns = slice(2 * classes, (2 + SHAPE) * classes)
    totals = scale * stats.counts[columns].view(classes, SHAPE)[present]
    sums = scale * stats.sums[columns].view(classes, SHAPE, -1).sum(0)
    centre, mean = own.sums[present] / counts[:, None], totals / counts[:, None]
    gram = own.gram() - (centre * counts[:, None]).T @ centre
    gram.diagonal().clamp_(min=0)
    slopes = torch.zeros_like(sums)
    penalty = PENALTY * float(gram.diagonal().mean())
    if penalty > float(own.negligible_scatter().max()):
        gram.diagonal().add_(penalty)
        slopes = solve_positive(gram, (sums - totals.T @ centre).T, penalty).T
    # Classes without boxes get the mean intercept; their scores are negligible.
    intercepts = mean - (centre + own.origin) @ slopes.T
    bias = ((intercepts * counts[:, None]).sum(0) / counts.sum()).repeat(classes, 1)
    bias[present] = intercepts
    return slopes.repeat(classes, 1), bias.flatten()
