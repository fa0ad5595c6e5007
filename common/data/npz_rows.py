"""The arrays of a NumPy archive, read one row at a time."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedhead.data.items import UnreadableSampleError
from fedhead.data.sequential import SequentialRows
from fedhead.errors import UserError


class Rows(Protocol):
    """An array on disk, by rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, row: int) -> npt.NDArray[Any]:
        """Return one row."""


class MappedRows:
    """An uncompressed array, mapped from the archive."""

    def __init__(self, path: Path, name: str) -> None:
        self._arguments = (path, name)
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo(f"{name}.npy").header_offset
        with path.open("rb") as file:
            file.seek(start + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(start + 30 + name_length + extra_length)
            self.shape, fortran, self.dtype = _read_header(file)
            offset = file.tell()
        self._array = np.memmap(
            path, dtype=self.dtype, mode="r", offset=offset, shape=self.shape, order="F" if fortran else "C"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the mapping; every process opens its own."""
        return MappedRows, self._arguments

    def read(self, row: int) -> npt.NDArray[Any]:
        return np.array(self._array[row])


class CompressedRows:
    """A compressed array, decompressed row by row, in one pass for rows in order."""

    def __init__(self, path: Path, name: str) -> None:
        self._arguments = (path, name)
        self._rows = SequentialRows(lambda row: 0, self._rows_from)
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            self.shape, self.fortran, self.dtype = _read_header(file)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the open file; every process opens its own."""
        return CompressedRows, self._arguments

    def read(self, row: int) -> npt.NDArray[Any]:
        try:
            array: npt.NDArray[Any] = self._rows.read(row)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            path, name = self._arguments
            raise UnreadableSampleError(f"Row {row} of {name!r} in {path} is damaged: {error}.") from None
        return array

    def _rows_from(self, start: int) -> Iterator[npt.NDArray[Any]]:
        path, name = self._arguments
        shape = self.shape[1:]
        length = self.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            _read_header(file)
            for _ in range(start, self.shape[0]):
                yield np.frombuffer(file.read(length), dtype=self.dtype).reshape(shape)


class LoadedRows:
    """An array in memory."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def read(self, row: int) -> npt.NDArray[Any]:
        return np.asarray(self._array[row])


def open_rows(path: Path, name: str) -> Rows:
    """Open an array of content.

    Raises:
        UserError: if it cannot be read, or has a shape that its name does not allow.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED
        rows: Rows
        if stored:
            rows = MappedRows(path, name)
        else:
            compressed = CompressedRows(path, name)
            rows = LoadedRows(load_array(path, name)) if compressed.fortran else compressed
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UserError(f"The array {name!r} of {path} cannot be read: {str(error).rstrip('.')}.") from None
    text, numbers = name.endswith("texts"), name.endswith(("features", "clips"))
    channels = (1, 3, 4)
    is_image = len(rows.shape) == 3 or (
        len(rows.shape) == 4 and (rows.shape[3] in channels or rows.shape[1] in channels)
    )
    wide = "length" if name.endswith("clips") else "d"
    if numbers and (len(rows.shape) != 2 or rows.shape[1] == 0):
        raise UserError(f"The array {name!r} of {path} has shape {list(rows.shape)}; expected [n, {wide}] numbers.")
    if not text and not numbers and not is_image:
        raise UserError(
            f"The array {name!r} of {path} has shape {list(rows.shape)}; expected [n, H, W], [n, H, W, C] or "
            "[n, C, H, W] with 1, 3 or 4 channels."
        )
    if text and len(rows.shape) != 1:
        raise UserError(f"The array {name!r} of {path} has shape {list(rows.shape)}; expected [n] strings.")
    return rows


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it contains Python objects; save it as an array of numbers or strings")
    return shape, fortran, dtype


def load_array(path: Path, name: str) -> npt.NDArray[Any]:
    """Read an array as a whole; nothing is unpickled.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[Any] = archive[name]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        advice = "; save names as strings, as array.astype(str)" if "allow_pickle" in str(error) else ""
        raise UserError(f"The array {name!r} of {path} cannot be read: {str(error).rstrip('.')}{advice}.") from None
    return array
