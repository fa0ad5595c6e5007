"""The columns of a table: which of them holds the rows' content, labels, groups, sites and splits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedhead.data.items import UnreadableSampleError
from fedhead.data.labels import is_missing
from fedhead.data.number_rows import may_number_rows
from fedhead.data.numbers import is_numeric, split_names
from fedhead.data.samples import Former
from fedhead.errors import UserError
from fedhead.wording import quoted

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image_path"),
    "image": ("image", "img"),
    "audio": ("audio",),
    "text": ("text", "sentence"),
    "label": ("label", "labels", "category", "class", "target"),
    "group": ("group",),
    "site": ("site",),
    "split": ("split",),
}
"""Purposes of columns, with the usual names of columns for each."""

PEEKED = 8
"""Number of rows examined to guess the content of a column."""


class Table(Protocol):
    """A file of rows with named columns."""

    @property
    def path(self) -> Path: ...

    @property
    def columns(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str:
        """Return a hash that changes with the content."""

    def __len__(self) -> int: ...

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        """Return all values of columns, read in one pass."""

    @property
    def former(self) -> Former:
        """Return the fingerprint of the previous version; the same for files identified by their content."""

    def named_files(self, name: str) -> Mapping[int, str]:
        """Return the files named in cells of a column that would otherwise hold an image, by row."""

    def cells(self, name: str) -> Callable[[int], Any]:
        """Return a function that reads one value of a column; None for a missing value."""

    def place(self, row: int) -> str:
        """Return the position of a row for readers."""


def content_column(table: Table, options: Mapping[str, str], spec: str) -> tuple[str, str]:
    """Return the content of the rows (path, image, audio, text or table), and its column except for "table"."""
    kinds: tuple[str, ...] = ("path", "image", "audio", "text")
    named = [kind for kind in kinds if kind in options]
    wanted = options.get("kind")
    if wanted not in (None, "image", "audio", "text", "table"):
        raise UserError(f"{spec} has the kind {wanted!r}; expected image, audio, text or table.")
    of_numbers = wanted == "table" or bool({"features", "categories"} & options.keys())
    if of_numbers and named:
        raise UserError(f"{spec} names a column for {named[0]}, and rows of numbers; expected one of them.")
    if of_numbers:
        return "table", ""
    if wanted is not None:
        kinds = ("text",) if wanted == "text" else ("path", wanted)
    found = [(kind, column_for(table, kind, options, spec)) for kind in named] or [
        (kind, column) for kind in kinds for column in find_named(table, COLUMNS[kind])
    ]
    if not found and wanted is None and _has_numbers(table, options):
        return "table", ""
    if not found and (empty := _without_values(table, options)):
        raise UserError(
            f"The columns {quoted(empty)} of {table.path} have no value in the first {min(PEEKED, len(table))} rows, "
            "and it has no column 'path', 'image', 'audio' or 'text'. For rows of numbers, name the columns as in "
            f"?features={','.join(empty[:2])}, or put rows with values first."
        )
    if not found:
        raise UserError(
            f"{table.path} has no column 'path', 'image', 'audio' or 'text'; it has {quoted(table.columns)}. Name "
            f"another one as in ?path={table.columns[0]} or ?text={table.columns[0]}."
        )
    if len(found) > 1:
        columns = [column for _, column in found]
        raise UserError(
            f"{table.path} has the columns {quoted(columns)}, any of which may hold the rows' content: choose one, as "
            f"in ?{found[0][0]}={columns[0]}."
        )
    kind, column = found[0]
    if kind in ("image", "audio") and _holds_names(table, column):
        return "path", column
    return kind, column


def _has_numbers(table: Table, options: Mapping[str, str]) -> bool:
    """Return whether a column without another purpose holds numbers, judged by its first values."""
    return any(is_numeric(_first_values(table, column)) for column in _free_columns(table, options))


def _without_values(table: Table, options: Mapping[str, str]) -> list[str]:
    """Return the columns without another purpose that hold no value, judged by their first ones."""
    free = _free_columns(table, options)
    return [column for column in free if all(is_missing(value) for value in _first_values(table, column))]


def _free_columns(table: Table, options: Mapping[str, str]) -> list[str]:
    taken = set(split_names(options.get("target", ""), table.columns))
    for purpose in ("label", "group", "site", "split"):
        taken.update(
            [options[purpose].partition(":")[0]] if purpose in options else find_named(table, COLUMNS[purpose])
        )
    return [column for column in table.columns if column not in taken and not may_number_rows(column)]


def _first_values(table: Table, column: str) -> list[Any]:
    cell = table.cells(column)
    return [cell(row) for row in range(min(PEEKED, len(table)))]


def _holds_names(table: Table, column: str) -> bool:
    """Return whether a column holds names of files instead of their content, judged by its first value."""
    cell = table.cells(column)
    for row in range(min(PEEKED, len(table))):
        try:
            value = cell(row)
        except UnreadableSampleError:
            continue
        if value is not None:
            return isinstance(value, str)
    return False


def column_for(table: Table, purpose: str, options: Mapping[str, str], spec: str, *, needed: bool = True) -> str:
    """Return the name of the column for a purpose; empty if there is none and it is optional."""
    if purpose in options:
        if options[purpose] not in table.columns:
            raise UserError(f"{table.path} has no column {options[purpose]!r}; it has {quoted(table.columns)}.")
        return options[purpose]
    found = find_named(table, COLUMNS[purpose])
    if len(found) > 1 and found[0].casefold() != purpose:
        raise UserError(f"{table.path} has the columns {quoted(found)}: choose one, as in ?{purpose}={found[0]}.")
    if not found and needed:
        raise UserError(
            f"{table.path} has no column {purpose!r}; it has {quoted(table.columns)}. Name another one as in "
            f"?{purpose}={table.columns[-1]}."
        )
    return found[0] if found else ""


def find_columns(table: Table, purpose: str) -> list[str]:
    """Return the columns with a usual name for a purpose."""
    return find_named(table, COLUMNS[purpose])


def find_named(table: Table, names: Sequence[str]) -> list[str]:
    """Return the columns with these names, in the order of the names, ignoring case."""
    by_name = {column.strip().casefold(): column for column in table.columns}
    return [by_name[name] for name in names if name in by_name]
