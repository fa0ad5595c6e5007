"""Cells of a grid and boxes: which cell finds which box, and boxes from the outputs of cells.

Boxes are left, top, right and bottom as shares of the image; cells are numbered row by row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 0.15
"""Cells within this share of a box's width and height of its centre find it; at least the nearest cell does."""

SPREAD = 0.5
"""Standard deviation of the objectness about the centre of a box, in its width and height."""

OVERLAP = 0.5
"""Intersection over union above which the box with the lower score is suppressed."""

MOST = 100
"""Boxes found in one image."""

LEAST_SCORE = 0.001
"""Lowest score of a box that is evaluated."""

LARGEST_LOG = 4.0
"""Most that the logarithm of a side may exceed that of the image's."""


class Assignment(NamedTuple):
    """The boxes of the `P` cells of an image.

    Attributes:
        box: `[P]` int64, the box that each cell finds; -1 for none.
        weight: `[P]` float64, up to 1; 0 in cells without a box.
        objectness: `[P]` float64, up to `weight` at the centre of the box that a cell finds and 0 in cells without.
        shape: `[P, 4]` float64, its centre relative to the cell's in units of its sides, and the logarithms of its
            sides as shares of the image; 0 in cells without.
    """

    box: Tensor
    weight: Tensor
    objectness: Tensor
    shape: Tensor


def centres(grid: tuple[int, int]) -> Tensor:
    """Return the centres of cells `[P, 2]`, x and y as shares of the image, for a height and width in cells."""
    height, width = grid
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def assign(corners: Tensor, grid: tuple[int, int]) -> Assignment:
    """Assign cells to boxes.

    A box is found by the cells within `NEAR` of its centre and by the nearest cell. A cell between several boxes keeps
    the nearest in units of their sizes; but the nearest cell of a box is its own if it is no other's nearest cell. A
    cell weighs one over the root of the number of its box's cells, so that large boxes with many cells do not outweigh
    small ones. The objectness is this times `exp(-d^2 / (2 SPREAD^2))` for the distance `d` in units of the box's size.

    Args:
        corners: `[m, 4]`, with area.
        grid: height and width in cells.
    """
    cells = centres(grid)
    places, boxes = len(cells), len(corners)
    if not boxes:
        none = torch.zeros(places, dtype=torch.float64)
        return Assignment(torch.full((places,), -1), none, none, torch.zeros(places, 4, dtype=torch.float64))
    middle, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    offset = (middle - cells[:, None]).abs() / sides
    distance = offset.square().sum(-1)
    scale = torch.tensor([grid[1], grid[0]], dtype=torch.float64)
    steps = ((middle - cells[:, None]) * scale).square().sum(-1)
    nearest = steps.argmin(0)
    near = (offset <= NEAR).all(-1)
    first = torch.zeros_like(near)
    first[nearest, torch.arange(boxes)] = True
    # The nearest cell of a box prefers it to others that are merely near.
    cost = distance.masked_fill(~(near | first), torch.inf)
    claimed = first.any(1, keepdim=True) & ~first
    cost, box = cost.masked_fill(claimed, torch.inf).min(1)
    found = cost.isfinite()
    box = box.masked_fill(~found, -1)
    own = box.clamp(min=0)
    shape = torch.cat([(middle[own] - cells) / sides[own], sides[own].log()], 1)
    claims = torch.bincount(own[found], minlength=boxes)[own]
    weight = found / claims.clamp(min=1).double().sqrt()
    objectness = weight * (-cost / (2 * SPREAD**2)).exp()
    return Assignment(box, weight, objectness, shape.masked_fill(~found[:, None], 0))


def within(corners: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return `[P]` bool, whether the centre of each cell is in one of the boxes `[m, 4]`."""
    cells = centres(grid)[:, None]
    return ((cells >= corners[:, :2]) & (cells <= corners[:, 2:])).all(-1).any(1)


def corners_of(shape: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the boxes `[..., P, C, 4]` that cells predict, inside the image; the inverse of `Assignment.shape`.

    Only torch operations, since exports trace it.
    """
    sides = shape[..., 2:].clamp(max=LARGEST_LOG).exp()
    middle = centres(grid).to(shape)[:, None] + shape[..., :2] * sides
    return torch.cat([middle - sides / 2, middle + sides / 2], -1).clamp(0, 1)


class Found(NamedTuple):
    """The boxes found in one image, by descending score.

    Attributes:
        corners: `[k, 4]`, as shares of the image.
        scores: `[k]`, 0 to 1.
        labels: `[k]` int64.
    """

    corners: Tensor
    scores: Tensor
    labels: Tensor


def find_boxes(corners: Tensor, scores: Tensor, least: float = LEAST_SCORE, most: int = MOST) -> Found:
    """Return the boxes of an image without those that overlap a box of the same class and a higher score.

    Args:
        corners: `[P, C, 4]`, of each cell if it holds each class.
        scores: `[P, C]`.
        least: lowest score.
        most: highest number of boxes.
    """
    from torchvision.ops import batched_nms

    place, label = (scores >= least).nonzero(as_tuple=True)
    chosen, score = corners[place, label], scores[place, label]
    size = chosen[:, 2:] - chosen[:, :2]
    kept = (size > 0).all(1).nonzero()[:, 0]
    kept = kept[batched_nms(chosen[kept].float(), score[kept].float(), label[kept], OVERLAP)[:most]]
    return Found(chosen[kept], score[kept], label[kept])
