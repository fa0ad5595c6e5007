"""Rows of numbers: the numeric and the categorical columns of a table, with each row as one item."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedhead.data.items import Columns, FloatArray, RowError, TableRow
from fedhead.data.labels import class_names, names_of
from fedhead.data.numbers import column_of_numbers, is_numeric, split_names, to_number
from fedhead.data.samples import LeftOut
from fedhead.errors import UserError
from fedhead.wording import quoted

MOST_LEVELS = 200
"""Largest number of levels of a categorical column; more are names or free text."""

_SHOWN = 10
_INDEX_NAMES = re.compile(r"|unnamed: ?\d+|__index_level_\d+__|(.*[ _-])?(id|idx|index|row)")
"""Names, in lower case, of columns that may be row indices; pandas writes the first three."""


@dataclass(frozen=True)
class NumberRows:
    """The rows of a table as numbers.

    Attributes:
        columns: the names of the numbers.
        table: `[n, d]`; NaN where a number is missing.
    """

    columns: Columns
    table: FloatArray

    @classmethod
    def of(
        cls, values: Mapping[str, Sequence[Any]], place: Callable[[int], str], categories: Collection[str] = ()
    ) -> Self:
        """Read columns by name as numbers, and categorical ones as one number for each level.

        Args:
            values: `[n]` for each column.
            place: the position of a row for readers, in messages.
            categories: the names of the categorical columns; a missing value is a level without a name.

        Raises:
            UserError: naming row and column of a value that is not a number, or not finite; or a categorical column
                whose name contains `=` or that has too many levels.
        """
        names: list[str] = []
        columns: list[FloatArray] = []
        for name, column in values.items():
            if name not in categories:
                names.append(name)
                columns.append(column_of_numbers(column, name, place, incomplete=True))
                continue
            levels, marks = _levels_of(column, name)
            names += [f"{name}={level}" for level in levels]
            columns += list(marks)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"The level {twice!r} of a categorical column is also the name of a column; rename one.")
        return cls(Columns(tuple(names), tuple(categories)), np.stack(columns, axis=1))

    @property
    def incomplete(self) -> tuple[str, ...]:
        """The columns with missing numbers."""
        lacking = np.flatnonzero(np.isnan(self.table).any(axis=0))
        return tuple(self.columns.names[place] for place in lacking.tolist())

    def read(self, row: int) -> TableRow:
        return TableRow(self.columns, self.table[row])


def _levels_of(values: Sequence[Any], column: str) -> tuple[tuple[str, ...], FloatArray]:
    """Return the levels of a categorical column, and for each `[n]`, 1 in its rows; "" is the level of missing values.

    Raises:
        UserError: if there are more than `MOST_LEVELS`, or the column's name contains `=`.
    """
    if "=" in column:
        raise UserError(f"The categorical column {column!r} has a '=' in its name; rename it.")
    named = [name or "" for name in names_of(values)]
    present = set(named)
    levels = (*class_names(present - {""}), *([""] if "" in present else []))
    if len(levels) > MOST_LEVELS:
        raise UserError(
            f"The column {column!r} has {len(levels)} different values; a categorical column has at most {MOST_LEVELS}."
        )
    positions = {level: position for position, level in enumerate(levels)}
    marks = np.zeros((len(levels), len(named)))
    marks[[positions[name] for name in named], np.arange(len(named))] = 1
    return levels, marks


def without_codes(values: Mapping[str, Sequence[Any]], option: str, columns: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Return columns with None for the codes of missing values.

    Args:
        values: `[n]` for each column.
        option: `COLUMN:CODE` for each code, comma-separated, as in `chol:0,pulse:-9`.
        columns: all columns of the table.

    Raises:
        UserError: if a part has no column of the table or no code.
    """
    codes: dict[str, set[str]] = {}
    for part in split_names(option, [f"{name}:" for name in columns]):
        column, colon, code = part.rpartition(":")
        if not colon or not code or column not in columns:
            raise UserError(
                f"The option missing has {part!r}; expected COLUMN:CODE, as in ?missing={columns[0]}:-9, with one of "
                f"the columns {quoted(list(columns), _SHOWN)}."
            )
        codes.setdefault(column, set()).add(str(names_of([code])[0]))
    return {
        name: column
        if name not in codes
        else [None if said in codes[name] else value for value, said in zip(column, names_of(column), strict=True)]
        for name, column in values.items()
    }


def select(row: TableRow, needed: Sequence[str]) -> FloatArray:
    """Return the numbers of a row by name; a level that the row's table lacks is 0.

    Args:
        row: the row.
        needed: names of numbers, and of levels as `COLUMN=LEVEL`.

    Raises:
        RowError: if the row has a level that is not needed of a column with needed levels.
        UserError: if a column is missing.
    """
    columns = row.columns
    if columns.names == needed:
        return row.values
    named = {name: name.partition("=")[0] for name in needed}
    own = {name for name, column in named.items() if column in columns.categories}
    require_columns(columns.names, [name for name in needed if name not in own])
    used = {named[name] for name in own}
    for position in columns.levels.tolist():
        column, _, level = columns.names[position].partition("=")
        if row.values[position] == 1 and column in used and columns.names[position] not in own:
            known = [name.partition("=")[2] for name in needed if named[name] == column]
            said = f"has {level!r}" if level else "has no value"
            raise RowError(
                f"A row {said} in the categorical column {column!r}, and the model knows the levels "
                f"{quoted(known, _SHOWN)}. Correct the value, or add {columns.names[position]!r} to the columns of "
                "the backbone identity."
            )
    places = columns.positions
    return np.array([row.values[places[name]] if name in places else 0.0 for name in needed])


def expand(row: Mapping[str, Any], needed: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a row's values with categorical columns as levels, and the names of these columns.

    Args:
        row: values by column.
        needed: the names of the numbers and levels that a model needs.
    """
    categories = [name.partition("=")[0] for name in needed if name not in row and "=" in name]
    categories = [name for name in dict.fromkeys(categories) if name in row]
    values = {name: value for name, value in row.items() if name not in categories}
    for column, level in zip(categories, names_of(row[name] for name in categories), strict=True):
        values[f"{column}={level or ''}"] = 1.0
    return values, tuple(categories)


def find_features(
    values: Mapping[str, Sequence[Any]], table: str, *, required: bool = True
) -> tuple[dict[str, Sequence[Any]], list[LeftOut]]:
    """Return the numeric columns except row indices, and the omitted columns.

    Args:
        values: `[n]` for each column.
        table: the name of the table, for messages.
        required: whether a column must hold numbers.

    Raises:
        UserError: if no column holds numbers, but one must.
    """
    numeric = {name: column for name, column in values.items() if is_numeric(column)}
    counters = [name for name, column in numeric.items() if _numbers_rows(name, column)]
    chosen = {name: column for name, column in numeric.items() if name not in counters}
    if not chosen and required:
        raise UserError(
            f"{table} has no column of numbers to use as features; it has {quoted(list(values), _SHOWN) or 'no other'}"
            ". Name columns as in ?features=age,pulse."
        )
    texts = [name for name in values if name not in numeric]
    left = [
        LeftOut(len(names), "columns" if len(names) > 1 else "column", reason, tuple(map(repr, names[:_SHOWN])))
        for names, reason in (
            (texts, "other values than numbers; name categorical columns in ?categories="),
            (counters, "only row numbers; name it in ?features= to use it"),
        )
        if names
    ]
    return chosen, left


def require_columns(held: Sequence[str], needed: Sequence[str]) -> None:
    """Check that the data has the columns that a model needs.

    Raises:
        UserError: naming the missing ones.
    """
    missing = [name for name in needed if name not in set(held)]
    if missing:
        raise UserError(
            f"The data lacks {len(missing)} of the {len(needed)} columns of numbers that the model needs: "
            f"{quoted(missing, 10)}. It has: {', '.join(map(repr, held[:20]))}."
        )


def may_number_rows(name: str) -> bool:
    """Return whether a column is named like an index."""
    return _INDEX_NAMES.fullmatch(name.strip().casefold()) is not None


def _numbers_rows(name: str, values: Sequence[Any]) -> bool:
    """Return whether a column is named like an index and has a distinct whole number in each row."""
    if not may_number_rows(name):
        return False
    numbers = [to_number(value) for value in values]
    whole = all(number is not None and number.is_integer() for number in numbers)
    return whole and len(set(numbers)) == len(numbers)
