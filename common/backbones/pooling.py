"""Pooling of a map or a sequence per row to one vector."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.registry import Registry

Pooling = Callable[[Tensor, Tensor | None], Tensor]
"""Type of a registered pooling: a function of `[n, length, d]` and a mask `[n, length]` of 0 and 1, or None for all."""

poolings: Registry[Pooling] = Registry("pooling")

OF_SEQUENCES = ("cls", "last")
"""Poolings that depend on positions in a sequence."""


class Sequences(NamedTuple):
    """Sequences with their own mask, from a module whose output has another length than its input.

    Attributes:
        values: `[n, length, d]`.
        mask: `[n, length]`, 0 for padding.
    """

    values: Tensor
    mask: Tensor


def pool(output: Tensor | Sequence[Tensor], pooling: str, mask: Tensor | None = None) -> Tensor:
    """Return one vector per row; of several outputs, their vectors joined.

    Args:
        output: vectors `[n, d]`, returned unchanged; sequences `[n, length, d]`; or maps, `[n, d, height, width]` or
            `[n, height, width, d]`: the two equal dimensions are spatial, otherwise the last two. `Sequences` bring
            their own mask.
        pooling: a name in `poolings`; of several outputs, a name for each, joined by `+`.
        mask: `[n, length]`, 0 for padding.

    Raises:
        UserError: if there is no such pooling, or a pooling by position is applied to maps.
    """
    if isinstance(output, Sequences):
        output, mask = output
    if not isinstance(output, Tensor):
        parts = zip(output, pooling.split("+"), strict=True)
        return torch.cat([pool(one, name, mask) for one, name in parts], dim=1)
    if output.ndim == 4:
        if pooling in OF_SEQUENCES:
            raise UserError(f"The pooling {pooling!r} is for sequences; the layer gives maps {list(output.shape[1:])}.")
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        output = output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    return poolings[pooling](output, mask) if output.ndim == 3 else output


@poolings.register("mean")
def mean(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the positions; zeros for rows of padding only."""
    if mask is None:
        return sequences.mean(1)
    real = mask.unsqueeze(-1) == 1
    return sequences.where(real, 0).sum(1) / real.sum(1).clamp_min(1)


@poolings.register("max")
def largest(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the maximum of each feature over the positions; zeros for rows of padding only."""
    if mask is None:
        return sequences.amax(1)
    real = mask.unsqueeze(-1) == 1
    return sequences.where(real, -torch.inf).amax(1).where(real.any(1), 0)


@poolings.register("cls")
def first(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the first position: the class token, if a model has one."""
    return sequences[:, 0]


@poolings.register("last")
def last(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last position before padding, which depends on the whole text in a causal model."""
    if mask is None:
        return sequences[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    return sequences[torch.arange(len(sequences), device=mask.device), (mask * places).argmax(1)]


@poolings.register("map")
def whole(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return all positions, channel by channel, for tasks whose rows are places of items.

    Padding becomes zeros; the sequences of all batches must have one length.
    """
    if mask is not None:
        sequences = sequences.where(mask.unsqueeze(-1) == 1, 0)
    return sequences.mT.flatten(1)


@poolings.register("proposals")
def proposed(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return all rows of a detector's proposals, one after the other."""
    return sequences.flatten(1)


@poolings.register("flatten")
def flatten(sequences: Tensor, mask: Tensor | None) -> Tensor:
    """Return all positions concatenated.

    Raises:
        UserError: for padded sequences, since their length differs between batches.
    """
    if mask is not None:
        raise UserError("The pooling 'flatten' needs the same number of positions in every row, unlike texts.")
    return sequences.flatten(1)
