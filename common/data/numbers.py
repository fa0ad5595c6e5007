"""Conversion of table columns to numbers: real targets, and the features of rows of numbers."""

import logging
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from fedhead.data.items import FloatArray
from fedhead.data.labels import is_missing
from fedhead.errors import UserError

logger = logging.getLogger(__name__)

_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_NOT_AVAILABLE = frozenset({"na", "n/a", "#n/a", "null", "none", "-", "?", "."})
"""Texts, in lower case, for missing numbers in tables."""


def to_number(value: Any) -> float | None:
    """Return a value as a number; None for a missing one.

    Texts may have a decimal comma.

    Raises:
        ValueError: if it is not a number.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if is_missing(value) or (isinstance(value, str) and value.strip().casefold() in _NOT_AVAILABLE):
        return None
    if isinstance(value, str):
        text = value.strip()
        if _DECIMAL_COMMA.fullmatch(text):
            text = text.replace(",", ".")
        # Python accepts 1_000 as a number, but tables never mean it so.
        if "_" in text:
            raise ValueError(value)
        return float(text)
    if isinstance(value, bool | int | float | Decimal | np.number | np.bool_):
        return float(value)
    raise ValueError(value)


def is_numeric(values: Sequence[Any]) -> bool:
    """Return whether a column has at least one number and otherwise only missing values."""
    found = False
    for value in values:
        try:
            found |= to_number(value) is not None
        except (ValueError, OverflowError):
            return False
    return found


def column_of_numbers(
    values: Sequence[Any], column: str, place: Callable[[int], str], *, incomplete: bool = False
) -> FloatArray:
    """Return a column as finite numbers `[n]`.

    Args:
        values: the values of the rows.
        column: the name of the column, for messages.
        place: the position of a row for readers, in messages.
        incomplete: whether values may be missing; they become NaN.

    Raises:
        UserError: naming the first row whose value is missing, not a number, or not finite.
    """
    numbers = np.empty(len(values), dtype=np.float64)
    for row, value in enumerate(values):
        try:
            number = to_number(value)
        except (ValueError, OverflowError):
            raise UserError(
                f"{place(row)} has {value!r} in the column {column!r}; expected a number. Omit the column or "
                "correct the value."
            ) from None
        if number is None and incomplete:
            number = np.nan
        elif number is None:
            missing = sum(_is_none(one) for one in values)
            raise UserError(
                f"{place(row)} has no value in the column {column!r} ({missing} of {len(values)} rows have none). Fill "
                "in the values or remove these rows."
            )
        elif not np.isfinite(number):
            raise UserError(
                f"{place(row)} has {value!r} in the column {column!r}, which is not a finite number; correct the value."
            )
        numbers[row] = number
    return numbers


_WORDS = {"true": 1.0, "yes": 1.0, "y": 1.0, "t": 1.0, "false": 0.0, "no": 0.0, "n": 0.0, "f": 0.0}


def happened(value: Any, column: str, place: str) -> float:
    """Return 1 for an event and 0 for none, from 0 and 1, true and false, or yes and no.

    Raises:
        UserError: if a value is none of these.
    """
    try:
        number = _WORDS.get(str(value).strip().casefold())
        number = to_number(value) if number is None else number
    except (ValueError, OverflowError):
        number = None
    if number not in (0, 1):
        raise UserError(
            f"{place} has {value!r} in the column {column!r}; expected 1 for an event and 0 for none (or yes and no)."
        )
    return float(number or 0)


def _is_none(value: Any) -> bool:
    try:
        return to_number(value) is None
    except (ValueError, OverflowError):
        return False


def warn_of_constants(targets: FloatArray, names: Sequence[str], spec: str) -> None:
    """Warn about targets with the same value in all rows: there is nothing to learn, and R2 is undefined."""
    for name, column in zip(names, targets.T, strict=True):
        if len(column) and (column == column[0]).all():
            logger.warning(
                "The target %r of %s is %g in all %d rows: there is nothing to predict.",
                name,
                spec,
                column[0],
                len(column),
            )


def split_names(value: str, columns: Sequence[str]) -> list[str]:
    """Split comma-separated names, where a name in `columns` may itself contain commas.

    Returns:
        The names, which need not all be in `columns`.
    """
    parts, names, start = value.split(","), [], 0
    while start < len(parts):
        for stop in range(len(parts), start, -1):
            name = ",".join(parts[start:stop])
            if name in columns or name.strip() in columns or stop == start + 1:
                names.append(name if name in columns else name.strip())
                start = stop
                break
    return names
