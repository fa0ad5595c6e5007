"""Items: one image, one text or one row of numbers, and the error for unreadable ones."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.errors import FedheadError

Kind = Literal["image", "text", "table"]
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

    Attributes:
        names: `[d]`, distinct.
    """

    names: tuple[str, ...]

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each name."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def by_name(self) -> IntArray:
        """The positions in the order of the names, independent of the order of the columns."""
        return np.array(sorted(range(len(self.names)), key=self.names.__getitem__), dtype=np.int64)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the sorted names."""
        return hashlib.sha256(repr(sorted(self.names)).encode(errors="surrogatepass")).digest()


@dataclass(frozen=True)
class TableRow:
    """A row of numbers.

    Attributes:
        columns: the names of the numbers.
        values: `[d]` float64.
    """

    columns: Columns
    values: FloatArray


Item = Image.Image | str | TableRow
"""An image of mode L or RGB, a text, or a row of numbers."""


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


def content_key(item: Item) -> int:
    """Return a 64-bit hash of an image's mode, size and pixels, of a text, or of a row's numbers by name."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, str):
        digest.update(b"text ")
        digest.update(item.encode(errors="surrogatepass"))
    elif isinstance(item, TableRow):
        digest.update(b"table ")
        digest.update(item.columns.digest)
        # Adding 0 turns -0 into 0.
        digest.update((item.values[item.columns.by_name] + 0.0).tobytes())
    else:
        digest.update(f"{item.mode} {item.size}".encode())
        digest.update(item.tobytes())
    return int.from_bytes(digest.digest(), "little")
