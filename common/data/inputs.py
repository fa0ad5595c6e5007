"""Inputs of predictions: the items in files, folders, patterns and tables, by the rules of data sources."""

import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedhead.data.coco import open_coco
from fedhead.data.conversion import row_of, to_item
from fedhead.data.files import READERS
from fedhead.data.items import ITEMS, Item, Kind, UnreadableSampleError
from fedhead.data.labels import is_missing
from fedhead.data.number_rows import require_columns, without_codes
from fedhead.data.specs import decode_path, exists, split_options, to_path
from fedhead.data.table_columns import Table, content_column, find_columns
from fedhead.data.tables import KINDS, OPTIONS, open_table
from fedhead.data.walk import SUFFIXES, files_below, kind_of_file, other_files
from fedhead.errors import UserError

logger = logging.getLogger(__name__)

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""Suffixes of tables, with the data source for each."""

COCO = "coco"
"""Source of the images that a file in COCO's format lists."""


@dataclass(frozen=True)
class Input:
    """An item to predict: its display name, and a function that reads it."""

    name: str
    read: Callable[[], Item]


def find_inputs(paths: Sequence[str], kind: Kind, columns: Sequence[str] = ()) -> list[Input]:
    """Return the inputs in files, folders (recursively), patterns and tables, in the given order.

    Args:
        paths: a table has a column `path` (files, relative to it), `image`, `audio` or, for a model of texts, `text`,
            or the columns of numbers; other names as options, as in `csv:new.csv?path=scan`. The images that a file in
            COCO's format lists are `coco:FILE.json?images=FOLDER`.
        kind: the kind of items that the model takes.
        columns: the names of the numbers, for a model of rows of numbers.

    Raises:
        UserError: if a path does not exist, contains nothing of that kind, or is a table without such a column.
    """
    found: list[Input] = []
    for given in paths:
        source = given.partition(":")[0]
        if source in TABLES.values() and not exists(given):
            name, options = split_options(given.partition(":")[2], {*OPTIONS, "encoding"}, given)
            found += _in_table(source, to_path(name), options, kind, columns)
            continue
        if source == COCO and not exists(given):
            found += _in_coco(given.partition(":")[2], kind)
            continue
        path = Path(given if exists(given) else decode_path(given))
        if not exists(str(path)):
            matches = sorted(_matches(given))
            if not matches:
                raise UserError(f"{given} does not exist, and matches nothing as a pattern.")
            found += find_inputs(matches, kind, columns)
        elif path.is_dir():
            found += _in_folder(path, kind)
        elif source := TABLES.get(path.suffix.lower(), ""):
            found += _in_table(source, path, {}, kind, columns)
        elif kind == "table":
            raise UserError(f"{path} is not a table; expected a file with the suffix {', '.join(TABLES)}.")
        else:
            found.append(_file(path, str(path), kind))
    return found


def _matches(pattern: str) -> list[str]:
    try:
        return glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute patterns too
    # Some patterns are invalid regular expressions, and some texts are invalid paths.
    except (OSError, ValueError) as error:
        raise UserError(f"{pattern!r} is neither a path nor a pattern: {error}.") from None


def _file(path: Path, name: str, kind: Kind) -> Input:
    return Input(name, partial(READERS[kind], path))


def _in_folder(folder: Path, kind: Kind) -> list[Input]:
    if kind == "table":
        raise UserError(f"{folder} is a folder; expected a table, with the suffix {', '.join(TABLES)}.")
    files = list(files_below(folder))
    kinds = {path: kind_of_file(path) for path in files}
    taken = [path for path in files if kinds[path] == kind]
    for one in other_files([path for path in files if kinds[path] != kind], ITEMS[kind]):
        logger.warning("%s: %s.", folder, one)
    if not taken:
        suffixes = sorted(SUFFIXES[kind])
        raise UserError(f"{folder} contains no {ITEMS[kind]}; expected files with a suffix of {', '.join(suffixes)}.")
    return [_file(path, str(path), kind) for path in taken]


def _in_coco(argument: str, kind: Kind) -> list[Input]:
    if kind != "image":
        raise UserError(f"coco:{argument} has images, but the model takes {ITEMS[kind]}.")
    listed = open_coco(argument)
    return [_file(listed.root / name, name, kind) for name in listed.images]


def _in_table(source: str, path: Path, options: dict[str, str], kind: Kind, columns: Sequence[str]) -> list[Input]:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    table = open_table(source, path, options)
    if kind == "table":
        return _rows_of_numbers(table, columns, options)
    content, column = content_column(table, _with_content(table, options, kind), str(path))
    if content not in ("path", kind):
        raise UserError(
            f"{path} has {ITEMS[KINDS[content]]}, but the model takes {ITEMS[kind]}. "
            f"Name a column as in {source}:{path}?{'text' if kind == 'text' else 'path'}={table.columns[0]}."
        )
    root = Path(options.get("root", path.parent))
    if content == "path":
        values = table.values([column])[0]
        return [_named_file(value, root, table, row, kind) for row, value in enumerate(values)]
    cell, places = table.cells(column), map(table.place, range(len(table)))
    return [Input(place, partial(_cell, cell, row, kind, place, root)) for row, place in enumerate(places)]


def _with_content(table: Table, options: dict[str, str], kind: Kind) -> dict[str, str]:
    """Return options that select the texts or the files of a table that has both."""
    if options.keys() & {"path", "image", "audio", "text"} or (kind == "text" and not find_columns(table, "text")):
        return options
    return {**options, "kind": kind}


def _named_file(value: Any, root: Path, table: Table, row: int, kind: Kind) -> Input:
    if is_missing(value):
        return Input(table.place(row), partial(_no_file, table.place(row)))
    return _file(root / str(value), str(value), kind)


def _no_file(place: str) -> Item:
    raise UnreadableSampleError(f"{place} names no file.")


def _cell(cell: Callable[[int], Any], row: int, kind: Kind, place: str, root: Path) -> Item:
    return to_item(cell(row), kind, place, root=root)


def _rows_of_numbers(table: Table, columns: Sequence[str], options: Mapping[str, str]) -> list[Input]:
    held = set(table.columns)
    names = {column if column in held else column.partition("=")[0] for column in columns}
    missing = [column for column in columns if column not in held and column.partition("=")[0] not in held]
    require_columns(table.columns, missing)
    named = sorted(names)
    values: Mapping[str, Sequence[Any]] = dict(zip(named, table.values(named), strict=True))
    if "missing" in options:
        values = without_codes(values, options["missing"], table.columns)
    return [
        Input(table.place(row), partial(row_of, dict(zip(named, cells, strict=True)), columns, table.place(row)))
        for row, cells in enumerate(zip(*values.values(), strict=True))
    ]
