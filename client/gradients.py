"""Full gradients: the loss of one head over a site's rows and its slope, summed in float64."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.data import IntArray
from fedhead.heads import LinearHead

BLOCK_ROWS = 2048


@dataclass(frozen=True)
class SummedGradient:
    """The loss of a linear head summed over `rows` rows, with its gradient, all float64.

    Attributes:
        rows: the number of rows.
        loss: the summed loss.
        weight: `[C, d]`, the gradient by the weight.
        bias: `[C]`, the gradient by the bias.
        largest: the largest share that one row has in the absolute residuals of an output; 0 without residuals.
    """

    rows: int
    loss: float
    weight: Tensor
    bias: Tensor
    largest: float


def sum_gradient(
    head: LinearHead, parameters: Mapping[str, Tensor], data: LabelledFeatures, sites: Sequence[SiteRows]
) -> SummedGradient:
    """Sum loss and gradient over all rows of `sites`, block by block on the CPU.

    A row's gradient is the product of its residuals (for classes: probability minus 0 or 1) and its features.

    Args:
        head: the form.
        parameters: of the head, any float type.
        data: the features and targets.
        sites: the rows to sum over; a row that several sites hold counts once for each.
    """
    exact = {name: value.detach().cpu().double() for name, value in parameters.items()}
    weight, bias = torch.zeros_like(exact["weight"]), torch.zeros_like(exact["bias"])
    largest, absolute = torch.zeros_like(bias), torch.zeros_like(bias)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in sites)])
    loss = 0.0
    with torch.no_grad():
        for features, targets in _blocks(rows, data, exact["weight"]):
            outputs = head.outputs(exact, features).mT.contiguous()
            values, residuals = data.loss.slopes(outputs, targets)
            loss += float(values.sum())
            weight += residuals @ features
            bias += residuals.sum(-1)
            sizes = residuals.abs_()
            largest = torch.maximum(largest, sizes.max(-1).values)
            absolute += sizes.sum(-1)
    shares = torch.where(absolute > 0, largest / absolute, 0.0)
    return SummedGradient(len(rows), loss, weight, bias, float(shares.max()))


def _blocks(rows: IntArray, data: LabelledFeatures, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features `[n, d]`, standardised in float64, and targets."""
    for start in range(0, len(rows), BLOCK_ROWS):
        index = torch.from_numpy(rows[start : start + BLOCK_ROWS])
        features = data.exact(index).to(like, copy=True)
        if data.standardisation is not None:
            mean, scale = (part.cpu().to(like) for part in data.standardisation)
            features.sub_(mean).div_(scale)
        yield features, data.targets(index, like)
