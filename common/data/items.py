"""Items: one image, text, clip or row of numbers, and the error for unreadable ones."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.errors import FedheadError, UserError

Kind = Literal["image", "text", "table", "audio"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
KeyArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

GROUP = "fedhead.group"
"""Key of an image's `info`: the group named in the image file (the patient of a DICOM file)."""
MODE = "fedhead.mode"
"""Key of an image's `info`: the original mode of a converted image."""


@dataclass(frozen=True)
class Columns:
    """Names of the numbers in a `TableRow`, shared by all rows of a table.

    A categorical column `c` has a number for each of its levels `l`, named `c=l`: 1 in rows of the level, else 0.

    Attributes:
        names: `[d]`, distinct.
        categories: the categorical columns.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...] = ()

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each name."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def levels(self) -> IntArray:
        """The positions of the levels of categorical columns."""
        starts = tuple(f"{name}=" for name in self.categories)
        found = [position for position, name in enumerate(self.names) if starts and name.startswith(starts)]
        return np.array(found, dtype=np.int64)

    @cached_property
    def by_name(self) -> IntArray:
        """The positions of the numbers in the order of their names, independent of the order of the columns."""
        numbers = set(range(len(self.names))) - set(self.levels.tolist())
        return np.array(sorted(numbers, key=self.names.__getitem__), dtype=np.int64)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the sorted names of the numbers and of the categorical columns, but not of their levels."""
        names = [self.names[position] for position in self.by_name] + sorted(self.categories)
        return hashlib.sha256(repr(names).encode(errors="surrogatepass")).digest()


@dataclass(frozen=True)
class TableRow:
    """A row of numbers.

    Attributes:
        columns: the names of the numbers.
        values: `[d]` float64; NaN for a missing number.
    """

    columns: Columns
    values: FloatArray


@dataclass(frozen=True, eq=False)
class Clip:
    """A piece of sound in one channel; `fedhead.data.to_clip` checks and mixes any other form.

    Attributes:
        samples: `[length]` float32, finite, usually in -1..1; at least one.
        rate: samples per second.
    """

    samples: npt.NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        """The duration."""
        return len(self.samples) / self.rate


class Word(str):
    """A word of a text, with the text as its context; as a `str`, it is the text: words joined by single spaces.

    Args:
        words: of the text; none contains a space.
        place: the position of this word.
    """

    __slots__ = ("place", "words")

    words: tuple[str, ...]
    place: int

    def __new__(cls, words: tuple[str, ...], place: int) -> Self:
        made = super().__new__(cls, " ".join(words))
        made.words, made.place = words, place
        return made

    def __getnewargs__(self) -> tuple[tuple[str, ...], int]:  # type: ignore[override]
        return self.words, self.place

    @property
    def own(self) -> str:
        """The word itself."""
        return self.words[self.place]

    @property
    def span(self) -> tuple[int, int]:
        """The start and end of the word in the text."""
        start = sum(map(len, self.words[: self.place])) + self.place
        return start, start + len(self.own)

    def nearby(self, reach: int) -> "Word":
        """Return the word in a shorter context: at most `reach` words on either side."""
        start = max(0, self.place - reach)
        return Word(self.words[start : self.place + reach + 1], self.place - start)


Item = Image.Image | str | TableRow | Clip
"""An image of mode L or RGB, a text or a word of one, a row of numbers, or a clip."""

ITEMS: dict[Kind, str] = {"image": "images", "text": "texts", "table": "rows of numbers", "audio": "clips"}
"""The kinds in words, in the plural."""


class UnreadableSampleError(FedheadError):
    """One sample cannot be read; the others can.

    Args:
        message: a sentence.
        lasting: whether the content itself is at fault, so that reading it again gives the same error. Permissions,
            unmounted disks and missing decoders may change.
    """

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


class RowError(UserError):
    """A value of one row does not fit a backbone; other rows may fit."""


def content_key(item: Item) -> int:
    """Return a 64-bit hash of an image's mode, size and pixels, a text, a row's numbers by name, or a clip."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, str):
        digest.update(f"word {item.place} ".encode() if isinstance(item, Word) else b"text ")
        digest.update(item.encode(errors="surrogatepass"))
    elif isinstance(item, TableRow):
        digest.update(b"table ")
        digest.update(item.columns.digest)
        numbers = item.values[item.columns.by_name]
        # Adding 0 turns -0 into 0.
        digest.update(np.where(np.isnan(numbers), np.nan, numbers + 0.0).tobytes())
        # Sites may have different levels, so only those of the row itself count.
        active = [item.columns.names[position] for position in item.columns.levels if item.values[position] == 1]
        digest.update(repr(sorted(active)).encode(errors="surrogatepass") if item.columns.categories else b"")
    elif isinstance(item, Clip):
        digest.update(f"clip {item.rate} ".encode())
        digest.update((item.samples + np.float32(0)).tobytes())
    else:
        digest.update(f"{item.mode} {item.size}".encode())
        digest.update(item.tobytes())
    return int.from_bytes(digest.digest(), "little")
