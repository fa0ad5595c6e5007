"""The geometry of maps: how the values that are stored of an item become features of its places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.errors import UserError

MAP = "map"
"""Name of the pooling that keeps maps and sequences whole, optionally with the size of the images, as in `map@320`."""

DENSE_SIZE = 256
"""Default height and width of the images whose maps are kept."""

FINEST = 4
"""Stride of the finest of the layers in `maps`."""

COARSER = (1, 2, 4)
"""Strides of the layers in `maps`, in units of the finest."""

_FINEST = ("2", "4", "8", "16")

_SIZES = range(32, 2049)


@dataclass(frozen=True)
class Geometry:
    """The maps that a backbone keeps of one item, at their own resolutions.

    Attributes:
        taps: channels, height and width of each map; a sequence has height 1.
        size: height and width of the image that the maps cover; 0 and 0 if items are no images.
    """

    taps: tuple[tuple[int, int, int], ...]
    size: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, outputs: Tensor | Sequence[Tensor], size: tuple[int, int]) -> "Geometry":
        """Return the geometry of maps `[n, d, height, width]`, sequences `[n, length, d]` or vectors `[n, d]`."""
        found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return cls(tuple(_tap(one) for one in found), size)

    @property
    def num_values(self) -> int:
        """`V`, the number of values that are stored of an item."""
        return sum(channels * height * width for channels, height, width in self.taps)

    @property
    def num_features(self) -> int:
        """`d`, the number of features of a place."""
        return sum(channels for channels, _, _ in self.taps)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of places: that of the finest map."""
        return max(tap[1] for tap in self.taps), max(tap[2] for tap in self.taps)

    @property
    def num_places(self) -> int:
        """`P`, the number of places of an item."""
        return self.grid[0] * self.grid[1]

    def maps(self, values: Tensor) -> Tensor:
        """Return the features of all places as maps `[n, d, height, width]`, from stored values `[n, V]`.

        Coarser maps are interpolated bilinearly.
        """
        parts = torch.split(values, [channels * height * width for channels, height, width in self.taps], dim=1)
        maps = [part.reshape(-1, *tap) for part, tap in zip(parts, self.taps, strict=True)]
        return torch.cat([self._on_grid(one) for one in maps], dim=1)

    def places(self, values: Tensor) -> Tensor:
        """Return the features of all places `[n, P, d]`, row by row of the grid, from stored values `[n, V]`."""
        return self.maps(values).flatten(2).mT

    def proposals(self, values: Tensor) -> Tensor | None:
        """Return the box `[n, P, 4]` of each place, as shares of the image; None for a grid of cells."""
        return None

    def means(self, values: Tensor) -> Tensor:
        """Return the mean over an item's places `[n, d]`, from stored values `[n, V]`."""
        return self.maps(values).mean((2, 3))

    def _on_grid(self, maps: Tensor) -> Tensor:
        if maps.shape[2:] == self.grid:
            return maps
        return functional.interpolate(maps, self.grid, mode="bilinear", align_corners=False)


def split_map(pooling: str) -> tuple[bool, int]:
    """Return whether a pooling keeps maps, and of which size the images are; 0 for the default size.

    Raises:
        UserError: if the size is not valid.
    """
    name, at, size = pooling.partition("@")
    if name != MAP:
        return False, 0
    if at and not (size.isdigit() and len(size) <= 4 and int(size) in _SIZES):
        raise UserError(f"The size of images in 'map@SIZE' is a number from {_SIZES[0]} to {_SIZES[-1]}, not {size!r}.")
    return True, int(size) if at else 0


class Maps(NamedTuple):
    """The layers that `maps/STRIDE@SIZE` stands for.

    Attributes:
        strides: of the layers.
        size: height and width of the images; 0 for the default.
    """

    strides: tuple[int, ...]
    size: int


def split_maps(layer: str) -> Maps | None:
    """Return the layers that `maps`, `maps@SIZE` or `maps/STRIDE@SIZE` stands for; None for other layers.

    Raises:
        UserError: if the stride or the size is not valid.
    """
    head, at, size = layer.partition("@")
    name, slash, stride = head.partition("/")
    if name != f"{MAP}s":
        return None
    if slash and stride not in _FINEST:
        raise UserError(f"The finest stride in 'maps/STRIDE' is {', '.join(_FINEST)}, not {stride!r}.")
    finest = int(stride) if slash else FINEST
    return Maps(tuple(finest * factor for factor in COARSER), split_map(f"{MAP}{at}{size}")[1])


def dense_layers(module: nn.Module, batch: Tensor, strides: Sequence[int]) -> list[str]:
    """Return the last module of a model at each of some strides, among the modules of its first two levels.

    Convolutions of single cells, such as the one before a classifier that only multiplies the channels, do not count.

    Args:
        module: of images `[n, channels, height, width]`.
        batch: an input.
        strides: of the layers.
    """
    found: dict[int, str] = {}
    height = batch.shape[2]
    pointwise: list[Tensor] = []

    def note(name: str, one: nn.Module) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] != output.shape[3]:
                return
            if _is_pointwise(one) or any(output is other for other in pointwise):
                pointwise.append(output)
                return
            stride, rest = divmod(height, output.shape[2])
            if not rest and stride in strides:
                found[stride] = name

        return hook

    handles = [
        one.register_forward_hook(note(name, one))
        for name, one in module.named_modules()
        if name and name.count(".") < 2
    ]
    try:
        with torch.no_grad():
            module.eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [found[stride] for stride in strides if stride in found]


def _is_pointwise(module: nn.Module) -> bool:
    convolutions = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    return bool(convolutions) and all(one.kernel_size == (1, 1) for one in convolutions)


def _tap(output: Tensor) -> tuple[int, int, int]:
    if output.ndim == 4:
        return output.shape[1], output.shape[2], output.shape[3]
    if output.ndim == 3:
        return output.shape[2], 1, output.shape[1]
    return output.shape[1], 1, 1
