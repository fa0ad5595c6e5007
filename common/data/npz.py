"""`npz:FILE`: NumPy archives with `images` and `labels`, MedMNIST's among them; rows are read one at a time.

| arrays | hold |
|---|---|
| `images` | `[n, H, W]`, `[n, H, W, C]` or `[n, C, H, W]` with 1, 3 or 4 channels, of what `to_image` takes |
| `texts` | `[n]` strings, instead of images |
| `labels` | `[n]` or `[n, 1]` numbers or names; or `[n, C]` of 0 and 1, multi-label |
| `classes`, `groups`, `sites` | the names of the classes; for each row its group and its site |
| `train_images`, `train_labels`, ... | the same by split, as MedMNIST names them; or Keras' `x_train`, `y_train` |
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.data.images import to_image
from fedhead.data.samples import (
    IntArray,
    Samples,
    UnreadableSampleError,
    choose_split,
    index_labels,
    sources,
    split_options,
)
from fedhead.data.sequential import SequentialRows
from fedhead.errors import UserError

CONTENT = ("images", "texts", "x")
LABELS = {"images": "labels", "texts": "labels", "x": "y"}


class Rows(Protocol):
    """An array on disk, by rows."""

    shape: tuple[int, ...]

    def read(self, row: int) -> npt.NDArray[Any]:
        """Return one row."""


@sources.register("npz")
def load_npz(argument: str) -> Samples:
    """A NumPy archive of images (or texts) and labels; option `split`."""
    spec = f"npz:{argument}"
    given, options = split_options(argument, {"split"}, spec)
    if not given:
        raise UserError("Expected a file, as in npz:bloodmnist.npz.")
    path = Path(given).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                member.filename.removesuffix(".npy"): (member.CRC, member.file_size)
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a NumPy archive, or a damaged one: {error}.") from None
    parts = _parts(path, set(members))
    content = next(iter(parts.values()))[0]
    fingerprint = sha256(repr((sorted(members.items()), sorted(options.items()))).encode()).hexdigest()
    rows = [_open_rows(path, names[0]) for names in parts.values()]
    labels = [_labels(path, names[1]) for names in parts.values()]
    for (images, named), stored, part in zip(parts.values(), rows, labels, strict=True):
        if stored.shape[0] != len(part):
            raise UserError(f"{path} has {stored.shape[0]} rows in {images!r} but {len(part)} in {named!r}.")
    lengths = [len(part) for part in labels]
    if len({part.shape[1:] for part in labels}) > 1:
        raise UserError(f"{path} does not label its splits alike: {', '.join(names[1] for names in parts.values())}.")
    splits = (
        None
        if list(parts) == [""]
        else [name for name, length in zip(parts, lengths, strict=True) for _ in range(length)]
    )
    if splits is None and "split" in options:
        raise UserError(f"{path} has no splits to choose from; it holds {', '.join(sorted(members))}.")
    chosen = np.arange(sum(lengths)) if splits is None else choose_split(splits, options.get("split"), spec)

    def names_of(array: str) -> list[str] | None:
        if array not in members:
            return None
        values = _load(path, array)
        if values.shape != (sum(lengths),):
            raise UserError(f"{path} has {array!r} of shape {list(values.shape)}; expected [{sum(lengths)}].")
        return [str(value) for value in values[chosen].tolist()]

    together = np.concatenate(labels)[chosen]
    classes = [str(name) for name in _load(path, "classes").tolist()] if "classes" in members else None
    names, indices = index_labels(together if together.ndim == 1 else list(together), classes, spec)
    archived = ArchivedRows(path, tuple(rows), np.cumsum([0, *lengths]), chosen, tuple(parts))
    is_text = content.endswith("texts")
    return Samples(
        spec=f"npz:{path}?split={options['split']}" if "split" in options else f"npz:{path}",
        classes=names,
        labels=indices,
        read=archived.read_text if is_text else archived.read_image,
        name=archived.name,
        fingerprint=fingerprint,
        groups=names_of("groups"),
        sites=names_of("sites"),
        splits=None if splits is None else [splits[row] for row in chosen],
        kind="text" if is_text else "image",
    )


@dataclass(frozen=True)
class ArchivedRows:
    """Rows of the arrays of an archive, one array after the other.

    Attributes:
        path: of the archive.
        arrays: the rows' content, by split.
        starts: the row that each array begins with, and the number of rows.
        chosen: `[n]`, the rows to take.
        splits: the arrays' names.
    """

    path: Path
    arrays: tuple[Rows, ...]
    starts: IntArray
    chosen: IntArray
    splits: tuple[str, ...]

    def _find(self, row: int) -> tuple[int, int]:
        number = int(self.chosen[row])
        array = int(np.searchsorted(self.starts, number, side="right")) - 1
        return array, number - int(self.starts[array])

    def read_image(self, row: int) -> Image.Image:
        array, number = self._find(row)
        return to_image(self.arrays[array].read(number), self.name(row))

    def read_text(self, row: int) -> str:
        array, number = self._find(row)
        text = str(self.arrays[array].read(number))
        if not text.strip():
            raise UnreadableSampleError(f"{self.name(row)} has no text.")
        return text

    def name(self, row: int) -> str:
        array, number = self._find(row)
        return f"{self.path}, {self.splits[array]} row {number}".replace("  ", " ")


class MappedRows:
    """An array that is stored as it is: mapped from the archive."""

    def __init__(self, path: Path, name: str) -> None:
        self._arguments = (path, name)
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo(f"{name}.npy").header_offset
        with path.open("rb") as file:
            file.seek(start + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(start + 30 + name_length + extra_length)
            self.shape, fortran, dtype = _read_header(file)
            offset = file.tell()
        self._array = np.memmap(
            path, dtype=dtype, mode="r", offset=offset, shape=self.shape, order="F" if fortran else "C"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the mapping behind: every process makes its own."""
        return MappedRows, self._arguments

    def read(self, row: int) -> npt.NDArray[Any]:
        return np.array(self._array[row])


class CompressedRows:
    """An array that is stored compressed: unpacked row by row, once if rows are asked for in order."""

    def __init__(self, path: Path, name: str) -> None:
        self._arguments = (path, name)
        self._rows = SequentialRows(lambda row: 0, self._rows_from)
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            self.shape, self.fortran, self._dtype = _read_header(file)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the open file behind: every process opens its own."""
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
        length = self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            _read_header(file)
            for _ in range(start, self.shape[0]):
                yield np.frombuffer(file.read(length), dtype=self._dtype).reshape(shape)


class LoadedRows:
    """An array in memory."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.shape = array.shape

    def read(self, row: int) -> npt.NDArray[Any]:
        return np.asarray(self._array[row])


def _open_rows(path: Path, name: str) -> Rows:
    try:
        with zipfile.ZipFile(path) as archive:
            stored = archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED
        rows: Rows
        if stored:
            rows = MappedRows(path, name)
        else:
            compressed = CompressedRows(path, name)
            rows = LoadedRows(_load(path, name)) if compressed.fortran else compressed
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UserError(f"The array {name!r} of {path} cannot be read: {str(error).rstrip('.')}.") from None
    text = name.endswith("texts")
    channels = (1, 3, 4)
    is_image = len(rows.shape) == 3 or (
        len(rows.shape) == 4 and (rows.shape[3] in channels or rows.shape[1] in channels)
    )
    if not text and not is_image:
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
        raise ValueError("it holds Python objects; save it as an array of numbers or strings")
    return shape, fortran, dtype


def _parts(path: Path, arrays: set[str]) -> dict[str, tuple[str, str]]:
    """Return the names of the content's and the labels' arrays by split; one split without a name if there are none."""
    for content in CONTENT:
        labels = LABELS[content]
        if content in arrays and labels in arrays:
            return {"": (content, labels)}
        found = {}
        for split in ("train", "val", "valid", "validation", "test"):
            for pair in ((f"{split}_{content}", f"{split}_{labels}"), (f"{content}_{split}", f"{labels}_{split}")):
                if arrays.issuperset(pair):
                    found[split] = pair
        if found:
            return found
    raise UserError(
        f"{path} has no arrays 'images' (or 'texts') and 'labels', nor 'train_images' and 'train_labels'; it holds "
        f"{', '.join(map(repr, sorted(arrays))) or 'none'}."
    )


def _labels(path: Path, name: str) -> npt.NDArray[Any]:
    labels = _load(path, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise UserError(f"The labels {name!r} of {path} are not all finite numbers.")
        if (labels != np.rint(labels)).any():
            raise UserError(f"The labels {name!r} of {path} are no whole numbers; expected class numbers or names.")
        labels = labels.astype(np.int64)
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuU":
        raise UserError(
            f"The labels {name!r} of {path} are {labels.dtype} of shape {list(labels.shape)}; expected [n] numbers or "
            "names, or [n, classes] of 0 and 1."
        )
    return labels


def _load(path: Path, name: str) -> npt.NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[Any] = archive[name]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        advice = "; save names as strings, as array.astype(str)" if "allow_pickle" in str(error) else ""
        raise UserError(f"The array {name!r} of {path} cannot be read: {str(error).rstrip('.')}{advice}.") from None
    return array
