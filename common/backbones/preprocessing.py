"""What makes a backbone's input from images or texts: a value, so that a digest can cover it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedhead.data import Item, Kind
from fedhead.errors import UserError

Batch = Tensor | Mapping[str, Tensor]
"""What goes through a backbone at once: a tensor of images, or `input_ids` and `attention_mask` of texts."""

PROBES = 2
LONGEST = 32
"""Sides to one; of an image that is longer only the middle is resized, which is more than any crop takes."""
PROBE_TEXTS = (
    "Where is my card? It hasn't arrived yet.",
    "Naïve Bayes, 3.5 % \u2014 \u4f60\u597d; the quick brown fox jumps over the lazy dog, twice.",
)


class Preprocessing(Protocol):
    """From an item to what a backbone takes, and from several of these to a batch."""

    @property
    def kind(self) -> Kind:
        """What the items are."""

    def __call__(self, item: Item) -> Tensor:
        """Return an image's tensor, or a text's token ids `[length]` int64.

        Raises:
            UserError: for an item of another kind.
        """

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return one batch of what the call returned for each item."""

    def probes(self) -> Sequence[Item]:
        """Return `PROBES` fixed items, whose features two machines compare."""

    def describe(self) -> dict[str, Any]:
        """Return values, as JSON has them, that differ wherever two of these make different inputs."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """From an image to what a backbone takes; a value, so that a digest can cover it.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        resize: what the image is resized to: `(height, width)`, or its shorter side.
        crop: `(height, width)` cut from the middle afterwards; None for nothing.
        mean: subtracted from each channel, whose values are in 0..1.
        std: divides each channel afterwards.
        interpolation: Pillow's name of a filter.
        rounding: where the crop begins if the middle is between two pixels: at the nearest even one, or the one before.
    """

    channels: Literal[1, 3]
    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    rounding: Literal["even", "down"] = "even"

    @classmethod
    def imagenet(cls, size: int) -> Self:
        """Return what most models trained on ImageNet take: the middle `size` of a shorter side of `size / 0.875`."""
        resize = round(size / 0.875)
        return cls(3, resize, (size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @property
    def kind(self) -> Kind:
        """Always "image"."""
        return "image"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out (of a square image, if only the shorter side is set)."""
        if self.crop is not None:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __call__(self, item: Item) -> Tensor:
        """Return float32 `[channels, height, width]`.

        Raises:
            UserError: for a text.
        """
        if isinstance(item, str):
            raise UserError("This backbone takes images, and was given a text.")
        image = item.convert("L" if self.channels == 1 else "RGB")
        if isinstance(self.resize, int) and self.crop is not None:
            image = _middle(image)
        width, height = image.size
        if isinstance(self.resize, int):
            short = min(width, height)
            target = (int(self.resize * width / short), int(self.resize * height / short))
        else:
            target = (self.resize[1], self.resize[0])
        if target != image.size:
            image = image.resize(target, Image.Resampling[self.interpolation.upper()])
        if self.crop is not None:
            top = _margin(image.size[1], self.crop[0], self.rounding)
            left = _margin(image.size[0], self.crop[1], self.rounding)
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = torch.from_numpy(np.array(image)).reshape(image.size[1], image.size[0], self.channels)
        mean = torch.tensor(self.mean).reshape(-1, 1, 1)
        std = torch.tensor(self.std).reshape(-1, 1, 1)
        return pixels.permute(2, 0, 1).to(torch.float32).div_(255).sub_(mean).div_(std)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return `[n, channels, height, width]`."""
        return torch.stack(list(inputs))

    def probes(self) -> Sequence[Item]:
        """Return images of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (PROBES, 24, 24, 3), dtype=np.uint8)
        return [Image.fromarray(image) for image in noise]

    def describe(self) -> dict[str, Any]:
        """Return the attributes."""
        return asdict(self)


def _middle(image: Image.Image) -> Image.Image:
    """Cut off most of what is left and right of a strip's middle, which enlarging would take gigabytes for."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    if not left and not top:
        return image
    return image.crop((left, top, width - left, height - top))


def _margin(size: int, crop: int, rounding: Literal["even", "down"]) -> int:
    """Return what is cut before the middle; negative where `crop` is larger and black is added."""
    if rounding == "down":
        return math.floor((size - crop) / 2)
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)


@dataclass(frozen=True)
class TextPreprocessing:
    """From a text to token ids, and to padded batches of them.

    Attributes:
        encode: gives a text's token ids, cut to the length that the backbone takes.
        digest: of everything that `encode` depends on.
        pad: the id that fills the shorter texts of a batch up; the mask says where.
        max_length: how many ids `encode` gives at most; None for any number.
        empty: the id that `encode` gives for a text without any; None if it gives none.
    """

    encode: Callable[[str], Sequence[int]]
    digest: str
    pad: int = 0
    max_length: int | None = None
    empty: int | None = None

    @property
    def kind(self) -> Kind:
        """Always "text"."""
        return "text"

    def __call__(self, item: Item) -> Tensor:
        """Return int64 `[length]`, not padded.

        Raises:
            UserError: for an image.
        """
        if not isinstance(item, str):
            raise UserError("This backbone takes texts, and was given an image.")
        return torch.tensor(list(self.encode(item)), dtype=torch.int64)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return `input_ids` and `attention_mask`, int64 `[n, longest]`, padded at the end; `longest` is at least 1."""
        lengths = torch.tensor([len(ids) for ids in inputs])
        longest = max(1, int(lengths.max()))
        padded = torch.full((len(inputs), longest), self.pad, dtype=torch.int64)
        for row, ids in enumerate(inputs):
            padded[row, : len(ids)] = ids
        return {"input_ids": padded, "attention_mask": (torch.arange(longest) < lengths[:, None]).to(torch.int64)}

    def probes(self) -> Sequence[Item]:
        """Return sentences of unlike lengths."""
        return PROBE_TEXTS

    def describe(self) -> dict[str, Any]:
        """Return the digest and the padding."""
        return {"text": self.digest, "pad": self.pad}
