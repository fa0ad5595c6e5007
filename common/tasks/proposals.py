"""Proposals and boxes: which proposal finds which box, and boxes from the outputs of proposals.

All boxes are left, top, right and bottom as shares of the image. Proposals without area fill up an image's places.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

from fedhead.backbones.proposals import with_area
from fedhead.tasks.cells import Assignment

FOREGROUND = 0.5
"""Intersection over union from which a proposal finds a box; others are background."""

LARGEST_LOG = math.log(1000 / 16)
"""Most that the logarithm of a side may exceed that of the proposal's."""


def match(corners: Tensor, proposals: Tensor) -> Assignment:
    """Match proposals with boxes, as Faster R-CNN does.

    A proposal finds the box that it overlaps most, if their intersection over union reaches `FOREGROUND`. Its shape is
    the box's centre relative to the proposal's, in units of its sides, and the logarithms of the ratios of the sides.

    Args:
        corners: `[m, 4]`, with area.
        proposals: `[P, 4]`.
    """
    count = len(proposals)
    if not len(corners) or not count:
        none = torch.zeros(count, dtype=torch.float64)
        return Assignment(torch.full((count,), -1), none, none, torch.zeros(count, 4, dtype=torch.float64))
    overlap, box = box_iou(proposals, corners).nan_to_num(0).max(1)
    found = (overlap >= FOREGROUND) & with_area(proposals)
    own = corners[box]
    sides, given = own[:, 2:] - own[:, :2], (proposals[:, 2:] - proposals[:, :2]).clamp(min=1e-9)
    offset = ((own[:, :2] + own[:, 2:]) - (proposals[:, :2] + proposals[:, 2:])) / 2 / given
    shape = torch.cat([offset, (sides / given).log()], 1)
    marks = found.double()
    return Assignment(box.masked_fill(~found, -1), marks, marks, shape.masked_fill(~found[:, None], 0))


def beside(ignored: Tensor, proposals: Tensor) -> Tensor:
    """Return `[P]` bool, whether half of each proposal or more is in one of the boxes `[m, 4]`."""
    low = torch.maximum(proposals[:, None, :2], ignored[:, :2])
    high = torch.minimum(proposals[:, None, 2:], ignored[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = (proposals[:, 2:] - proposals[:, :2]).prod(-1)
    return (both >= 0.5 * area[:, None]).any(1)


def refined(shape: Tensor, proposals: Tensor) -> Tensor:
    """Return the boxes `[..., P, C, 4]` that proposals `[..., P, 4]` predict, inside the image; inverts `match`."""
    own = proposals.to(shape)[..., None, :]
    sides = own[..., 2:] - own[..., :2]
    middle = (own[..., :2] + own[..., 2:]) / 2 + shape[..., :2] * sides
    half = shape[..., 2:].clamp(max=LARGEST_LOG).exp() * sides / 2
    return torch.cat([middle - half, middle + half], -1).clamp(0, 1)
