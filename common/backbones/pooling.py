"""From a map or a sequence for each row to one vector."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.registry import Registry

Pooling = Callable[[Tensor, Tensor | None], Tensor]
"""What a pooling registers: a function of `[n, length, d]` and a mask `[n, length]` of 0 and 1, or None for all."""

poolings: Registry[Pooling] = Registry("pooling")

OF_SEQUENCES = ("cls", "last")
"""Poolings for which it matters where in a sequence something stands."""


def pool(output: Tensor, pooling: str, mask: Tensor | None = None) -> Tensor:
    """Return one vector per row.

    Args:
        output: vectors `[n, d]`, which are returned as they are; sequences `[n, length, d]`; or maps, `[n, d, height,
            width]` or `[n, height, width, d]`: what makes them square are the places, or else the last two.
        pooling: a name in `poolings`.
        mask: `[n, length]`, 1 where a sequence is no padding.

    Raises:
        UserError: if there is no such pooling, or maps are pooled by a place in a sequence.
    """
    if output.ndim == 4:
        if pooling in OF_SEQUENCES:
            raise UserError(f"The pooling {pooling!r} is for sequences; the layer gives maps {list(output.shape[1:])}.")
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        output = output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    return poolings[pooling](output, mask) if output.ndim == 3 else output


@poolings.register("mean")
def mean(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the places; zeros where all is padding."""
    if mask is None:
        return sequences.mean(1)
    real = mask.unsqueeze(-1) == 1
    return sequences.where(real, 0).sum(1) / real.sum(1).clamp_min(1)


@poolings.register("max")
def largest(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the largest value of each feature over the places; zeros where all is padding."""
    if mask is None:
        return sequences.amax(1)
    real = mask.unsqueeze(-1) == 1
    return sequences.where(real, -torch.inf).amax(1).where(real.any(1), 0)


@poolings.register("cls")
def first(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the first place: the class token, where a model has one."""
    return sequences[:, 0]


@poolings.register("last")
def last(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last place that is no padding: the one that has seen all, in a model that reads forwards."""
    if mask is None:
        return sequences[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    return sequences[torch.arange(len(sequences), device=mask.device), (mask * places).argmax(1)]


@poolings.register("flatten")
def flatten(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return all places one after the other.

    Raises:
        UserError: for padded sequences, whose lengths differ from batch to batch.
    """
    if mask is not None:
        raise UserError("The pooling 'flatten' needs the same number of places in every row, which texts have not.")
    return sequences.flatten(1)
