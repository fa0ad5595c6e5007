"""Proposals: boxes where a detector suspects objects, each with features; the places of items for detection."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedhead.backbones.geometry import Geometry
from fedhead.errors import UserError

PROPOSALS = "proposals"
"""Name of the layer that gives proposals, optionally with their number and the size of images: `proposals:150@320`."""

MOST_PROPOSALS = 300
"""Proposals of an image that are kept by default, if a detector has more."""

_COUNTS = range(1, 2001)
_SIZES = range(64, 2049)


class Asked(NamedTuple):
    """What a layer `proposals:COUNT@SIZE` asks for; None for the detector's own values."""

    number: int | None
    side: int | None


def split_proposals(layer: str) -> Asked | None:
    """Parse `proposals`, `proposals:COUNT` or `proposals:COUNT@SIZE`; return None for other layers.

    Raises:
        UserError: if the number or the size is not valid.
    """
    if not re.match(rf"{PROPOSALS}(?![\w.])", layer):
        return None
    found = re.fullmatch(rf"{PROPOSALS}(?::(\d{{1,4}}))?(?:@(\d{{1,4}}))?", layer)
    count, size = (int(one) if one else None for one in found.groups()) if found else (0, 0)
    if (count is not None and count not in _COUNTS) or (size is not None and size not in _SIZES):
        raise UserError(
            f"Proposals are named as in 'proposals:150@320', with {_COUNTS[0]} to {_COUNTS[-1]} in an image of "
            f"{_SIZES[0]} to {_SIZES[-1]} pixels' height and width, not {layer!r}."
        )
    return Asked(count, size)


@dataclass(frozen=True)
class Proposals(Geometry):
    """The places of an item that are its proposals: four corners and `d` features of each are stored.

    Images with fewer proposals are filled up with boxes without area, whose features are 0.
    """

    @classmethod
    def from_rows(cls, rows: Tensor, size: tuple[int, int]) -> "Proposals":
        """Return the geometry of the output of a `Proposer`, `[n, P, 4 + d]`."""
        return cls(((rows.shape[2] - 4, 1, rows.shape[1]),), size)

    @property
    def num_values(self) -> int:
        """`V`, the number of values that are stored of an item."""
        return self.num_places * (4 + self.num_features)

    def places(self, values: Tensor) -> Tensor:
        """Return the features of all proposals `[n, P, d]`, from stored values `[n, V]`."""
        return self._rows(values)[..., 4:]

    def proposals(self, values: Tensor) -> Tensor:
        """Return the boxes `[n, P, 4]` as shares of the image, from stored values `[n, V]`."""
        return self._rows(values)[..., :4].double().clamp(0, 1)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean over an item's proposals `[n, d]`, from stored values `[n, V]`; 0 of items without."""
        real = with_area(self.proposals(values)).to(values.dtype)
        return (self.places(values) * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self.num_places, 4 + self.num_features)


def with_area(corners: Tensor) -> Tensor:
    """Return whether boxes `[..., 4]` have an area."""
    return (corners[..., 2:] > corners[..., :2]).all(-1)


class Proposer(nn.Module, ABC):
    """A detector without its last layer: images `[n, 3, height, width]` to proposals `[n, P, 4 + d]`.

    The first four numbers of a row are left, top, right and bottom as shares of the image; the others are features.
    """

    by_image: bool = False
    """Whether an exported program takes one image at a time, because its operations depend on the image's boxes."""

    not_exported: str = ""
    """Why programs cannot be exported, as the end of a sentence; empty if they can."""

    @abstractmethod
    def steady(self, images: Tensor) -> Tensor:
        """Return mean features `[n, d]` that hang on no choice of boxes, for comparing two machines.

        Which boxes a detector proposes can differ by rounding.
        """


def rows_of(corners: Sequence[Tensor], features: Sequence[Tensor], count: int, images: Tensor) -> Tensor:
    """Return proposals `[n, P, 4 + d]` of `n` images, given those of each by descending score, in pixels."""
    height, width = images.shape[2:]
    shares = images.new_tensor([width, height, width, height])
    rows = [torch.cat([boxes / shares, own], 1) for boxes, own in zip(corners, features, strict=True)]
    # Exports trace it: the number of boxes is a tensor's, and only then cut to the count.
    return torch.stack([torch.cat([own, own.new_zeros(count, own.shape[1])])[:count] for own in rows])
