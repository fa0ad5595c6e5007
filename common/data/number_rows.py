"""Rows of numbers: the numeric columns of a table, with each row as one item."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedhead.data.items import Columns, FloatArray, TableRow
from fedhead.data.numbers import column_of_numbers, is_numeric, to_number
from fedhead.data.samples import LeftOut
from fedhead.errors import UserError
from fedhead.wording import quoted

_SHOWN = 10
_INDEX_NAMES = re.compile(r"|unnamed: ?\d+|__index_level_\d+__|(.*[ _-])?(id|idx|index|row)")
"""Names, in lower case, of columns that may be row indices; pandas writes the first three."""


@dataclass(frozen=True)
class NumberRows:
    """The rows of a table as numbers.

    Attributes:
        columns: the names of the numbers.
        table: `[n, d]`.
    """

    columns: Columns
    table: FloatArray

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Any]], place: Callable[[int], str]) -> Self:
        """Read columns by name as numbers.

        Args:
            values: `[n]` for each column.
            place: the position of a row for readers, in messages.

        Raises:
            UserError: naming row and column of a value that is missing, not a number, or not finite.
        """
        columns = [column_of_numbers(column, name, place) for name, column in values.items()]
        return cls(Columns(tuple(values)), np.stack(columns, axis=1))

    def read(self, row: int) -> TableRow:
        return TableRow(self.columns, self.table[row])


def find_features(values: Mapping[str, Sequence[Any]], table: str) -> tuple[dict[str, Sequence[Any]], list[LeftOut]]:
    """Return the numeric columns except row indices, and the omitted columns.

    Args:
        values: `[n]` for each column.
        table: the name of the table, for messages.

    Raises:
        UserError: if no column holds numbers.
    """
    numeric = {name: column for name, column in values.items() if is_numeric(column)}
    counters = [name for name, column in numeric.items() if _numbers_rows(name, column)]
    chosen = {name: column for name, column in numeric.items() if name not in counters}
    if not chosen:
        raise UserError(
            f"{table} has no column of numbers to use as features; it has {quoted(list(values), _SHOWN) or 'no other'}"
            ". Name columns as in ?features=age,pulse."
        )
    texts = [name for name in values if name not in numeric]
    left = [
        LeftOut(len(names), "columns" if len(names) > 1 else "column", reason, tuple(map(repr, names[:_SHOWN])))
        for names, reason in (
            (texts, "other values than numbers"),
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
