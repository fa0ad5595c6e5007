"""Tables: `csv:FILE`, `jsonl:FILE` and `parquet:FILE`, a row for each image or text.

A table has a column `path` (image files, relative to the table's folder), `text` or, in Parquet, `image` (encoded
files), and a column `label`; perhaps `group`, `site` and `split`. Options name other columns and choose rows:
`csv:all.csv?label=diagnosis&group=patient&split=train`.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fedhead.data.csv_file import open_csv
from fedhead.data.folder import Files
from fedhead.data.images import decode_image, read_image
from fedhead.data.jsonl_file import open_jsonl
from fedhead.data.parquet_file import open_parquet
from fedhead.data.samples import (
    IntArray,
    Samples,
    UnreadableSampleError,
    choose_split,
    index_labels,
    index_names,
    mark_names,
    sources,
    split_options,
)
from fedhead.errors import UserError

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image_path"),
    "image": ("image", "img"),
    "text": ("text", "sentence"),
    "label": ("label", "labels", "category", "class", "target"),
    "group": ("group",),
    "site": ("site",),
    "split": ("split",),
}
"""What a column is for, and the names under which it is looked for."""


class Table(Protocol):
    """A file of rows with named columns."""

    @property
    def path(self) -> Path: ...

    @property
    def columns(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str:
        """Return what changes when the content does."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""

    def cells(self, name: str) -> Callable[[int], Any]:
        """Return what reads one value of a column at a time; None where there is none."""

    def place(self, row: int) -> str:
        """Return where a row is, as a person would find it."""


@sources.register("csv")
def load_csv(argument: str) -> Samples:
    """A CSV file with a header line, in UTF-8 (or `encoding=`); with commas, semicolons or tabs."""
    return _load("csv", argument, {"encoding"})


@sources.register("jsonl")
def load_jsonl(argument: str) -> Samples:
    """A file with a JSON object a line; labels may be lists."""
    return _load("jsonl", argument, ())


@sources.register("parquet")
def load_parquet(argument: str) -> Samples:
    """A Parquet file, perhaps with the images in it; needs the extra `parquet`."""
    return _load("parquet", argument, ())


def _load(source: str, argument: str, more_options: Collection[str]) -> Samples:
    spec = f"{source}:{argument}"
    known = {*COLUMNS, "root", "separator", *more_options}
    given, options = split_options(argument, known, spec)
    if not given:
        raise UserError(f"Expected a file, as in {source}:train.{source}, not {spec!r}.")
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file, as in {source}:{given}/train.{source}.")
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    try:
        if source == "csv":
            table: Table = open_csv(path, options.get("encoding", "utf-8"))
        else:
            table = open_jsonl(path) if source == "jsonl" else open_parquet(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if len(table) == 0:
        raise UserError(f"{path} holds no rows.")
    if "root" in options:
        options["root"] = str(Path(options["root"]).expanduser().absolute())
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return samples_of_table(table, options, f"{source}:{path}{f'?{query}' if query else ''}")


def samples_of_table(table: Table, options: dict[str, str], spec: str) -> Samples:
    """Take the rows of a table for samples.

    Args:
        table: to read.
        options: names of columns by what they are for; `split`, the rows to take; `separator`, between the labels of a
            row; `root`, the folder that relative paths start from.
        spec: what it is loaded from, with its options.

    Raises:
        UserError: for a column that is not there, rows without a label, or options that do not fit.
    """
    rows, splits = _choose_rows(table, options, spec)

    def chosen(column: str) -> list[Any]:
        values = table.column(column)
        return values if len(rows) == len(values) else [values[row] for row in rows]

    label = _column(table, "label", options, spec)
    classes, labels = _labels(chosen(label), options.get("separator"), table, rows, label, spec)
    content, column = _content_column(table, options, spec)
    group = _column(table, "group", options, spec, needed=False)
    site = _column(table, "site", options, spec, needed=False)
    root = Path(options.get("root", table.path.parent))
    digest = hashlib.sha256(repr((table.fingerprint, sorted(options.items()), str(root))).encode())
    read: Callable[[int], Image.Image | str]
    if content == "path":
        paths = tuple("" if _missing(value) else str(value) for value in chosen(column))
        files = Files(root, paths)
        stamps = [files.stamp(row) for row in range(len(paths))]
        if not any(stamps):
            raise UserError(
                f"Not one file of {spec} is there; the first is {files.name(0)}. Relative paths start from {root}; "
                "another folder as in ?root=/data/images."
            )
        digest.update("\n".join(stamps).encode())
        read = PathRows(files, table, rows).read
    elif content == "image":
        read = ImageRows(table.cells(column), table, rows, root).read
    else:
        read = TextRows(table.cells(column), table, rows).read
    return Samples(
        spec=spec,
        classes=classes,
        labels=labels,
        read=read,
        name=RowNames(table, rows).name,
        fingerprint=digest.hexdigest(),
        groups=[None if _missing(value) else _name(value) for value in chosen(group)] if group else None,
        sites=_sites(chosen(site), site, table, rows) if site else None,
        splits=splits,
        kind="text" if content == "text" else "image",
    )


@dataclass(frozen=True)
class RowNames:
    """Where rows are.

    Attributes:
        table: that holds them.
        rows: `[n]`, their numbers in it.
    """

    table: Table
    rows: IntArray

    def name(self, row: int) -> str:
        return self.table.place(int(self.rows[row]))


@dataclass(frozen=True)
class PathRows:
    """Images whose files a table names."""

    files: Files
    table: Table
    rows: IntArray

    def read(self, row: int) -> Image.Image:
        if not self.files.paths[row]:
            raise UnreadableSampleError(f"{self.table.place(int(self.rows[row]))} names no file.")
        return self.files.read_image(row)


@dataclass(frozen=True)
class ImageRows:
    """Images whose encoded files a table holds: as bytes, or as `{bytes, path}`."""

    cell: Callable[[int], Any]
    table: Table
    rows: IntArray
    root: Path

    def read(self, row: int) -> Image.Image:
        number = int(self.rows[row])
        value, name = self.cell(number), self.table.place(number)
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path:
                return read_image(self.root / path)
        if value is None:
            raise UnreadableSampleError(f"{name} holds no image.")
        if not isinstance(value, bytes):
            raise UnreadableSampleError(f"{name} holds {type(value).__name__}, not the bytes of an image file.")
        return decode_image(value, name)


@dataclass(frozen=True)
class TextRows:
    """Texts that a table holds."""

    cell: Callable[[int], Any]
    table: Table
    rows: IntArray

    def read(self, row: int) -> str:
        number = int(self.rows[row])
        value = self.cell(number)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UnreadableSampleError(f"{self.table.place(number)} has no text.")
        if not isinstance(value, str):
            raise UnreadableSampleError(f"{self.table.place(number)} holds {type(value).__name__}, not a text.")
        return value


def _choose_rows(table: Table, options: dict[str, str], spec: str) -> tuple[IntArray, list[str] | None]:
    """Return the rows to take, and the split of each; the option is VALUE, or COLUMN:VALUE for another column."""
    wanted = options.get("split")
    column, colon, value = (wanted or "").partition(":")
    if colon and column in table.columns:
        wanted = value
    elif found := _find(table, COLUMNS["split"]):
        column = found[0]
    elif wanted is None:
        return np.arange(len(table)), None
    else:
        raise UserError(
            f"{table.path} has no column 'split' by which to choose {wanted!r}; it has {_listed(table.columns)}. Name "
            f"another one as in ?split={table.columns[-1]}:{wanted}."
        )
    splits = ["" if _missing(one) else _name(one) for one in table.column(column)]
    rows = choose_split(splits, wanted, spec)
    return rows, [splits[row] for row in rows]


def _content_column(table: Table, options: dict[str, str], spec: str) -> tuple[str, str]:
    """Return what the rows are read from (path, image or text), and the name of that column."""
    kinds = ("path", "image", "text")
    named = [kind for kind in kinds if kind in options]
    found = [(kind, _column(table, kind, options, spec)) for kind in named] or [
        (kind, column) for kind in kinds for column in _find(table, COLUMNS[kind])
    ]
    if not found:
        raise UserError(
            f"{table.path} has no column 'path', 'image' or 'text'; it has {_listed(table.columns)}. Name another one "
            f"as in ?path={table.columns[0]} or ?text={table.columns[0]}."
        )
    if len(found) > 1:
        columns = [column for _, column in found]
        raise UserError(
            f"{table.path} has the columns {_listed(columns)}, any of which may hold the rows' content: say which, as "
            f"in ?{found[0][0]}={columns[0]}."
        )
    kind, column = found[0]
    if kind == "image" and _holds_names(table, column):
        return "path", column
    return kind, column


def _holds_names(table: Table, column: str) -> bool:
    """Tell whether a column holds the names of files and not their content, by its first value."""
    cell = table.cells(column)
    for row in range(min(8, len(table))):
        try:
            value = cell(row)
        except UnreadableSampleError:
            continue
        if value is not None:
            return isinstance(value, str)
    return False


def _column(table: Table, purpose: str, options: dict[str, str], spec: str, *, needed: bool = True) -> str:
    """Return the name of the column for a purpose; empty if there is none and none is needed."""
    if purpose in options:
        if options[purpose] not in table.columns:
            raise UserError(f"{table.path} has no column {options[purpose]!r}; it has {_listed(table.columns)}.")
        return options[purpose]
    found = _find(table, COLUMNS[purpose])
    if len(found) > 1 and found[0].casefold() != purpose:
        raise UserError(f"{table.path} has the columns {_listed(found)}: say which, as in ?{purpose}={found[0]}.")
    if not found and needed:
        raise UserError(
            f"{table.path} has no column {purpose!r}; it has {_listed(table.columns)}. Name another one as in "
            f"?{purpose}={table.columns[-1]}."
        )
    return found[0] if found else ""


def _find(table: Table, names: Sequence[str]) -> list[str]:
    """Return the columns of these names, in the order of the names, whatever their case."""
    by_name = {column.strip().casefold(): column for column in table.columns}
    return [by_name[name] for name in names if name in by_name]


def _labels(
    values: list[Any], separator: str | None, table: Table, rows: IntArray, column: str, spec: str
) -> tuple[tuple[str, ...], IntArray]:
    """Return classes, and labels `[n]`, or `[n, C]` if labels are lists or parted by a separator."""
    if separator is not None:
        texts = ["" if _missing(value) else str(value) for value in values]
        return mark_names([[name.strip() for name in text.split(separator) if name.strip()] for text in texts])
    missing = [row for row, value in enumerate(values) if _missing(value)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(values)} rows of {spec} have no label in column {column!r}; the first: "
            f"{table.place(int(rows[missing[0]]))}. Give each row a label, or remove it. Where rows may have "
            "any number of classes, say what parts them, as in ?separator=;."
        )
    if any(isinstance(value, list) for value in values):
        if not all(isinstance(value, list) for value in values):
            odd = next(row for row, value in enumerate(values) if not isinstance(value, list))
            raise UserError(f"{table.place(int(rows[odd]))} has no list of labels, as other rows have.")
        return index_labels(values, None, spec)
    return index_names([_name(value) for value in values])


def _sites(values: list[Any], column: str, table: Table, rows: IntArray) -> list[str]:
    for row, value in enumerate(values):
        if _missing(value):
            raise UserError(f"{table.place(int(rows[row]))} names no site in column {column!r}, as other rows do.")
    return [_name(value) for value in values]


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _name(value: Any) -> str:
    """Return a value as a name: 3.0, which a column with gaps makes of 3, is 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
