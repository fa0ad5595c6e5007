"""Preprocessing of images and texts for a backbone: a value, so that a digest can cover it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedhead.data import Item, Kind
from fedhead.data.items import Word
from fedhead.errors import UserError

Batch = Tensor | Mapping[str, Tensor]
"""A backbone's input: a tensor of images, or `input_ids` and `attention_mask` of texts, `clips` and `lengths`."""

PROBES = 2
NEARBY = 24
"""Words on either side that are the context of a word beyond the first ids of a long text."""

LONGEST = 32
"""Largest aspect ratio; of a longer image only the middle is resized, which is more than any crop uses."""
PROBE_TEXTS = (
    "Where is my card? It hasn't arrived yet.",
    "Naïve Bayes, 3.5 % \u2014 \u4f60\u597d; the quick brown fox jumps over the lazy dog, twice.",
)


class Preprocessing(Protocol):
    """A map from an item to a backbone's input, and from several of these to a batch."""

    @property
    def kind(self) -> Kind:
        """The kind of the items."""

    def __call__(self, item: Item) -> Tensor:
        """Return an image's tensor, a text's token ids `[length]` int64, or a clip's samples or frames.

        Raises:
            UserError: for an item of another kind.
        """

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return one batch from the results for several items."""

    def probes(self) -> Sequence[Item]:
        """Return `PROBES` fixed items, for comparing features between machines."""

    def describe(self) -> dict[str, Any]:
        """Return values of JSON types that differ between any two different preprocessings."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Preprocessing of images; a value, so that a digest can cover it.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        resize: the size after resizing: `(height, width)`, or the shorter side.
        crop: `(height, width)` of the central crop afterwards; None for no crop.
        mean: subtracted from each channel, with values in 0..1.
        std: divides each channel afterwards.
        interpolation: Pillow's name of a filter.
        rounding: the start of a crop centred between two pixels: the nearest even one, or the one before.
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
        """Return the usual preprocessing for ImageNet: the central `size` of a shorter side of `size / 0.875`."""
        resize = round(size / 0.875)
        return cls(3, resize, (size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @property
    def kind(self) -> Kind:
        """Always "image"."""
        return "image"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output (for a square image, if only the shorter side is set)."""
        if self.crop is not None:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __call__(self, item: Item) -> Tensor:
        """Return the image as float32 `[channels, height, width]`.

        Raises:
            UserError: for a text.
        """
        if not isinstance(item, Image.Image):
            raise UserError("This backbone takes images, but was given a text or a row of numbers.")
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
        """Return the batch `[n, channels, height, width]`."""
        return torch.stack(list(inputs))

    def probes(self) -> Sequence[Item]:
        """Return images of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (PROBES, 24, 24, 3), dtype=np.uint8)
        return [Image.fromarray(image) for image in noise]

    def describe(self) -> dict[str, Any]:
        """Return the attributes."""
        return asdict(self)


def _middle(image: Image.Image) -> Image.Image:
    """Crop an extremely long image to its middle, since enlarging the rest would take gigabytes."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    if not left and not top:
        return image
    return image.crop((left, top, width - left, height - top))


def _margin(size: int, crop: int, rounding: Literal["even", "down"]) -> int:
    """Return the margin before the crop; negative if `crop` is larger and black is added."""
    if rounding == "down":
        return math.floor((size - crop) / 2)
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)


@dataclass(frozen=True)
class TextPreprocessing:
    """Preprocessing of texts to token ids, and to padded batches of them.

    Attributes:
        encode: returns a text's token ids, truncated to the backbone's limit.
        digest: of everything that `encode` depends on.
        pad: the id that pads the shorter texts of a batch; the mask marks padding.
        max_length: the largest number of ids; None for no limit.
        empty: the id for a text without tokens; None if there is none.
        locate: also returns each id's start and end in the text; None for backbones that know no context.
    """

    encode: Callable[[str], Sequence[int]]
    digest: str
    pad: int = 0
    max_length: int | None = None
    empty: int | None = None
    locate: Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]] | None = None

    @property
    def kind(self) -> Kind:
        """Always "text"."""
        return "text"

    def __call__(self, item: Item) -> Tensor:
        """Return token ids as int64 `[length]`, not padded; of a word in its context `[length, 2]`.

        The second column is 1 for the word's first id. Backbones without context take a word by itself.

        Raises:
            UserError: for an image.
        """
        if isinstance(item, Word):
            return self._word(item)
        if not isinstance(item, str):
            raise UserError("This backbone takes texts, but was given an image or a row of numbers.")
        return torch.tensor(list(self.encode(item)), dtype=torch.int64)

    def collate(self, inputs: Sequence[Tensor]) -> Batch:
        """Return `input_ids` and `attention_mask`, int64 `[n, longest]`, padded at the end; `longest` is at least 1.

        Words are returned with each of their contexts once, with `rows` `[n]`, each word's context, and `places` `[n]`,
        its id there.
        """
        if inputs and inputs[0].ndim == 2:
            return self._contexts(inputs)
        lengths = torch.tensor([len(ids) for ids in inputs])
        longest = max(1, int(lengths.max()))
        padded = torch.full((len(inputs), longest), self.pad, dtype=torch.int64)
        for row, ids in enumerate(inputs):
            padded[row, : len(ids)] = ids
        return {"input_ids": padded, "attention_mask": (torch.arange(longest) < lengths[:, None]).to(torch.int64)}

    def _word(self, item: Word) -> Tensor:
        if self.locate is None:
            return torch.tensor(list(self.encode(item.own)), dtype=torch.int64)
        ids, spans = self.locate(item)
        place = first_id(spans, item.span)
        if place is None and len(item.words) > 1:
            item = item.nearby(NEARBY if len(item.words) > 2 * NEARBY else 0)
            ids, spans = self.locate(item)
            place = first_id(spans, item.span)
        marks = torch.zeros(len(ids), dtype=torch.int64)
        # A word of characters that the tokenizer drops has no ids; the first one stands for the whole context.
        marks[place or 0] = 1
        return torch.stack([torch.tensor(list(ids), dtype=torch.int64), marks], dim=1)

    def _contexts(self, words: Sequence[Tensor]) -> Batch:
        numbers: dict[tuple[int, ...], int] = {}
        rows = [numbers.setdefault(tuple(word[:, 0].tolist()), len(numbers)) for word in words]
        batch = self.collate([torch.tensor(ids, dtype=torch.int64) for ids in numbers])
        assert isinstance(batch, Mapping)
        places = [int(word[:, 1].argmax()) for word in words]
        return {**batch, "rows": torch.tensor(rows), "places": torch.tensor(places)}

    def probes(self) -> Sequence[Item]:
        """Return sentences of different lengths."""
        return PROBE_TEXTS

    def describe(self) -> dict[str, Any]:
        """Return the digest and the padding."""
        return {"text": self.digest, "pad": self.pad}


def first_id(spans: Sequence[tuple[int, int]], span: tuple[int, int]) -> int | None:
    """Return the position of the first id that covers a character of `span`; None if there is none."""
    for place, (start, end) in enumerate(spans):
        if start < span[1] and end > span[0]:
            return place
    return None
