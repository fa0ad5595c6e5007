"""Conversion of values of any library to items, shared by all sources, the Python API and `predict`."""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.images import decode_image, read_image, to_image
from fedhead.data.items import ITEMS, Clip, Columns, Item, Kind, TableRow, UnreadableSampleError
from fedhead.data.labels import is_missing
from fedhead.data.number_rows import expand, require_columns
from fedhead.data.numbers import to_number
from fedhead.data.positions import by_position, column_names
from fedhead.data.sounds import decode_clip, read_clip, to_clip
from fedhead.data.texts import plain_text, read_text
from fedhead.data.walk import AUDIO_SUFFIXES
from fedhead.errors import UserError


def to_item(value: Any, kind: Kind, name: str, columns: Columns | None = None, *, root: Path | None = None) -> Item:
    """Return a value as an item.

    Args:
        value: for an image, a PIL image, an array, a tensor, the path or the bytes of a file, or both by name as in
            data sets of Hugging Face; for a text, a string or the `Path` of a file; for a row of numbers, a sequence of
            numbers or numbers by column; for a clip, a `Clip`, the path or the bytes of a file, or `{array,
            sampling_rate}`.
        kind: the kind of the item.
        name: the name of the value in messages.
        columns: the names of a sequence of numbers.
        root: the base folder of relative paths; by default the current one.

    Raises:
        UnreadableSampleError: if the value is missing or not such an item.
    """
    if isinstance(value, TableRow | Clip):
        item: Item = value
    elif kind == "table":
        return _to_row(value, name, columns)
    elif value is None or isinstance(value, numbers.Number):
        if value is None or is_missing(value):
            raise UnreadableSampleError(f"{name} {_NOTHING[kind]}.")
        raise UnreadableSampleError(f"{name} is a number; expected {_WORDS[kind]}.")
    elif kind == "text":
        return _to_text(value, name, root)
    elif kind == "audio":
        return _to_sound(value, name, root)
    else:
        return _to_picture(value, name, root)
    held: Kind = "audio" if isinstance(item, Clip) else "table"
    if kind != held:
        raise UnreadableSampleError(f"{name} is {_WORDS[held]}; expected {_WORDS[kind]}.")
    return to_clip(item.samples, item.rate, name) if isinstance(item, Clip) else item


_WORDS: dict[Kind, str] = {"image": "an image", "text": "a text", "table": "a row of numbers", "audio": "a clip"}
_NOTHING: dict[Kind, str] = {
    "image": "holds no image",
    "text": "has no text",
    "table": "has no numbers",
    "audio": "holds no sound",
}


def items_of(values: Any, kind: Kind, needed: Sequence[str] = ()) -> Iterator[Item]:
    """Yield items from values by position; a frame's rows are rows of numbers, or its single column holds the items.

    Args:
        values: any input of `by_position`, or any iterable, which is read lazily.
        kind: the kind of the items.
        needed: the names of the numbers that a model needs, and of the levels of categorical columns.

    Raises:
        UnreadableSampleError: naming the value that is not such an item.
        UserError: if the values are not rows.
    """
    columns = None
    if is_frame(values):
        names = column_names(values) or ()
        if kind == "table":
            columns = Columns(names)
        elif len(names) != 1:
            raise UserError(f"A frame of {len(names)} columns is not a list of {ITEMS[kind]}; give one of its columns.")
        rows = by_position(values, "The items")
        values = rows if kind == "table" else [row[0] for row in rows]
    elif hasattr(values, "__len__") or isinstance(values, str | bytes | dict | set):
        values = by_position(values, "The items")
    for position, value in enumerate(values):
        if kind == "table" and needed and (columns or isinstance(value, Mapping)):
            row = (
                value if isinstance(value, Mapping) else dict(zip(columns.names if columns else (), value, strict=True))
            )
            yield row_of(row, needed, f"item {position}")
            continue
        yield to_item(value, kind, f"item {position}", columns)


def row_of(values: Mapping[Any, Any], needed: Sequence[str], name: str) -> TableRow:
    """Return a row of numbers from the values of its columns.

    Args:
        values: by column; other columns than the needed ones are ignored.
        needed: the names of the numbers that a model needs, and of the levels of categorical columns.
        name: the name of the row in messages.

    Raises:
        UnreadableSampleError: if a value is not a number.
        UserError: if a column is missing.
    """
    named = {str(column): value for column, value in values.items()}
    row, categories = expand(named, needed)
    starts = tuple(f"{column}=" for column in categories)
    kept = {
        column: value for column, value in row.items() if column in needed or (starts and column.startswith(starts))
    }
    require_columns(list(named), [column for column in needed if not (starts and column.startswith(starts))])
    read = _to_row(kept, name, None)
    return TableRow(Columns(read.columns.names, categories), read.values)


def is_frame(value: Any) -> bool:
    """Return whether a value is a table with named columns of pandas, polars or Arrow."""
    return column_names(value) is not None


def files_named(values: Iterable[Any]) -> dict[int, str]:
    """Return the paths of files that are given by name instead of their bytes, by position."""
    named = {}
    for row, value in enumerate(values):
        if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
            named[row] = str(value["path"])
        elif isinstance(value, str | Path):
            named[row] = str(value)
    return named


def kind_of(value: Any) -> Kind:
    """Return the kind of item of a value: a string is a text, and numbers in one dimension are a row."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Clip) or (isinstance(value, Mapping) and "sampling_rate" in value):
        return "audio"
    if isinstance(value, Path) and value.suffix.lower() in AUDIO_SUFFIXES:
        return "audio"
    if isinstance(value, TableRow) or (isinstance(value, Mapping) and not {"bytes", "path"} & value.keys()):
        return "table"
    return "table" if _is_vector(value) else "image"


def _is_vector(value: Any) -> bool:
    """Return whether a value is one-dimensional and numeric."""
    if hasattr(value, "ndim"):
        return bool(value.ndim == 1)
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, numbers.Number) for one in value)


def _to_picture(value: Any, name: str, root: Path | None) -> Item:
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            return read_image((root or Path()) / path)
    if isinstance(value, str | Path):
        return read_image((root or Path()) / value)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image(bytes(value), name)
    if value is None:
        raise UnreadableSampleError(f"{name} holds no image.")
    return to_image(value, name)


def _to_sound(value: Any, name: str, root: Path | None) -> Item:
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return to_clip(value["array"], value.get("sampling_rate"), name)
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            return read_clip((root or Path()) / path)
    if isinstance(value, str | Path):
        return read_clip((root or Path()) / value)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_clip(bytes(value), name)
    if value is None:
        raise UnreadableSampleError(f"{name} holds no sound.")
    raise UnreadableSampleError(
        f"{name} is of type {type(value).__name__}; expected a clip: Clip(samples, rate), or the path of a file."
    )


def _to_text(value: Any, name: str, root: Path | None) -> str:
    if isinstance(value, Path):
        return read_text((root or Path()) / value)
    return plain_text(value, name)


def _to_row(value: Any, name: str, columns: Columns | None) -> TableRow:
    if isinstance(value, Mapping):
        columns, value = Columns(tuple(map(str, value))), list(value.values())
    elif type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "index"):
        columns, value = columns or Columns(tuple(map(str, value.index))), list(value)
    if not _is_vector(value) and not isinstance(value, Sequence):
        raise UnreadableSampleError(f"{name} is of type {type(value).__name__}; expected a row of numbers.")
    columns = columns or Columns(tuple(f"x{position}" for position in range(len(value))))
    if isinstance(value, str | bytes) or len(value) != len(columns.names):
        given = "a text" if isinstance(value, str | bytes) else f"{len(value)} numbers"
        raise UnreadableSampleError(f"{name} is {given}; expected {len(columns.names)} numbers.")
    row = np.empty(len(columns.names))
    for position, one in enumerate(value.tolist() if hasattr(value, "tolist") else value):
        column = columns.names[position]
        try:
            number = to_number(one)
        except (ValueError, OverflowError):
            raise UnreadableSampleError(f"{name} has {one!r} in the column {column!r}; expected a number.") from None
        if number is not None and not np.isfinite(number):
            raise UnreadableSampleError(f"{name} has no finite number in the column {column!r}.")
        row[position] = np.nan if number is None else number
    return TableRow(columns, row)
