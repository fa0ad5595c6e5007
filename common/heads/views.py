"""Random views of boundary activations, the same on every device."""

import torch
from torch import Tensor
from torch.nn import functional

NOISE = 0.1
"""Deviation of the noise, in deviations of the batch's activations."""
DROPPED = 0.1
"""Share of channels, and of a text's tokens, that a view lacks."""
LEAST_SIDE = 0.6
"""Least side of the part of a map that a view shows, as a share of the map's."""


def view_of(activations: Tensor, generator: torch.Generator, *, sequences: bool = False) -> Tensor:
    """Return a random view of each row.

    Maps `[n, C, h, w]` show a part, resized to the whole. They are not flipped, since a mirrored letter is another one.
    Texts lack some tokens after the first. All lack some channels, and have noise.

    Args:
        activations: `[n, *shape]`; sequences have their mask as the last column.
        generator: on the CPU.
        sequences: whether they are sequences with a mask.
    """
    if sequences:
        values, mask = activations[..., :-1], activations[..., -1]
        seen = mask * (_draw(mask.shape, generator, mask) >= DROPPED)
        seen[:, 0] = mask[:, 0]
        return torch.cat([_noisy(values, generator, mask.bool()), seen[..., None]], dim=-1)
    if activations.ndim == 4:
        activations = _parts(activations, generator)
    return _noisy(activations, generator)


def _draw(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=generator).to(like)


def _noisy(values: Tensor, generator: torch.Generator, among: Tensor | None = None) -> Tensor:
    """Return values with noise and without some channels: the second dimension of maps, else the last one."""
    deviation = (values if among is None else values[among]).std(correction=0)
    noise = torch.randn(values.shape, generator=generator).to(values)
    per_row = [len(values), *[1] * (values.ndim - 1)]
    channels = 1 if values.ndim == 4 else values.ndim - 1
    per_row[channels] = values.shape[channels]
    kept = _draw(tuple(per_row), generator, values) >= DROPPED
    return (values + NOISE * deviation * noise) * kept / (1 - DROPPED)


def _parts(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random part of each map, resized to the whole."""
    sides = LEAST_SIDE + (1 - LEAST_SIDE) * _draw((len(maps), 2), generator, maps)
    centres = (1 - sides) * (2 * _draw((len(maps), 2), generator, maps) - 1)
    grids = torch.stack(
        [torch.cat([torch.diag(side), centre[:, None]], 1) for side, centre in zip(sides, centres, strict=True)]
    )
    places = functional.affine_grid(grids, list(maps.shape), align_corners=False)
    return functional.grid_sample(maps, places, padding_mode="border", align_corners=False)
