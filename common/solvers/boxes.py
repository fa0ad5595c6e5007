"""Closed-form heads of detection: objectness, classes and boxes, each from the sums of its own places."""

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import ABSENT_MARGIN, solve_ridge, solvers
from fedhead.solvers.shares import solve_share_lda
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import PLACES

SHAPE = 4
"""Numbers that describe a box."""


@solvers.register("boxes")
def solve_boxes(stats: FeatureStatistics) -> LinearHead:
    """Solve the head of a detector: three linear maps, of which two see only the places that find a box.

    With the objectness `o` of a place, `p` whether it finds a box, and that box's class `y` and shape `t`, the targets
    of a place are `(p y, o, p y t^T, p x)`. The products `p x` make the Gram matrix of the places with a box a part of
    the sums. Objectness is linear discriminant analysis of shares `o` and `1 - o` over all places, and classes are the
    same over places with a box. Shapes are ridge regression over these, with slopes that all classes share and an
    intercept for each class: large and small kinds of objects differ in more than their features say linearly.

    Args:
        stats: sums over places of `d` features and `5 C + 1 + d` targets.

    Returns:
        A head with weight `[5 C + 1, d]` and bias `[5 C + 1]`: logits of the classes and of objectness, then the shape
        of a box of each class.

    Raises:
        UserError: if no place finds a box, or all do.
    """
    classes, rest = divmod(stats.num_classes - stats.num_features - 1, 1 + SHAPE)
    if classes < 1 or rest:
        raise ValueError(f"{stats.num_classes} targets of {stats.num_features} features are not those of boxes.")
    if not bool((stats.counts[:classes] > 0).any()):
        raise UserError("A detector needs boxes, but the sites' images have none that may be learned from.")
    parts = [_classes(stats, classes), _objectness(stats, classes), _shape(stats, classes)]
    weight, bias = (torch.cat(some) for some in zip(*parts, strict=True))
    return LinearHead.from_weights(weight, bias)


def with_boxes(stats: FeatureStatistics, classes: int) -> FeatureStatistics:
    """Return the statistics of the places that find a box, with the targets `p y` of `C` classes.

    Args:
        stats: as `solve_boxes` takes them.
        classes: `C`.
    """
    total = stats.sums[:classes].sum(0)
    products = stats.sums[(1 + SHAPE) * classes + 1 :] - torch.outer(stats.origin, total)
    gram = (products + products.T) / 2
    gram.diagonal().clamp_(min=0)
    return FeatureStatistics(
        stats.origin,
        round(float(stats.counts[:classes].sum())),
        stats.counts[:classes].clone(),
        stats.sums[:classes].clone(),
        total,
        gram.triu(),
        PLACES,
        stats.squares[:classes].clone(),
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
    count, total = stats.counts[classes : classes + 1], stats.sums[classes : classes + 1]
    shares = FeatureStatistics(
        stats.origin,
        stats.rows,
        torch.cat([count, stats.rows - count]),
        torch.cat([total, stats.total - total]),
        stats.total,
        stats.upper,
        PLACES,
        torch.cat([count, stats.rows - count]),
        stats.items,
    )
    head = solve_share_lda(shares)
    return head.weight.detach()[:1] - head.weight.detach()[1:], head.bias.detach()[:1] - head.bias.detach()[1:]


def _shape(stats: FeatureStatistics, classes: int) -> tuple[Tensor, Tensor]:
    own = with_boxes(stats, classes)
    columns = slice(classes + 1, (1 + SHAPE) * classes + 1)
    present = own.counts > 0
    counts = own.counts[present]
    totals = stats.counts[columns].view(classes, SHAPE)[present]
    sums, squares = stats.sums[columns].view(classes, SHAPE, -1).sum(0), stats.squares[columns].view(classes, SHAPE)
    centre, mean = own.sums[present] / counts[:, None], totals / counts[:, None]
    gram = own.gram() - (centre * counts[:, None]).T @ centre
    gram.diagonal().clamp_(min=0)
    spread = squares.sum(0) - (totals * mean).sum(0)
    varying = spread > 1e-9 * squares.sum(0)
    slopes = torch.zeros_like(sums)
    if bool(varying.any()):
        zeros = torch.zeros(int(varying.sum())).to(sums)
        slopes[varying] = solve_ridge(
            FeatureStatistics(
                torch.zeros_like(own.origin),
                own.rows,
                zeros,
                (sums - totals.T @ centre)[varying],
                torch.zeros_like(own.total),
                gram.triu(),
                PLACES,
                spread[varying],
                own.items,
            )
        ).weight.detach()
    # Classes without boxes get the mean intercept; their scores are negligible.
    intercepts = mean - (centre + own.origin) @ slopes.T
    bias = ((intercepts * counts[:, None]).sum(0) / counts.sum()).repeat(classes, 1)
    bias[present] = intercepts
    return slopes.repeat(classes, 1), bias.flatten()
