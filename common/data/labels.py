"""Conversion of labels, groups and other names from values of any library, shared by all sources."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedhead.data.items import IntArray
from fedhead.data.positions import by_position, column_names
from fedhead.errors import UserError
from fedhead.wording import printable

MISSING_TEXTS = frozenset({"", "nan", "NaN", "<NA>", "NaT"})
"""Texts that pandas and NumPy write for missing values."""

UNLABELLED = "unlabelled"
"""The only class of data that is read without its labels."""

_WHOLE = re.compile(r"([+-]?\d+)\.0*")


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: None, NaN, pandas' NA and NaT, an empty text, or the text of a NaN."""
    if value is None:
        return True
    if isinstance(value, bytes | str):
        return (value.decode(errors="replace") if isinstance(value, bytes) else value).strip() in MISSING_TEXTS
    try:
        return bool(value != value)
    # Comparison of arrays is elementwise; pandas' NA has no truth value.
    except (TypeError, ValueError):
        return type(value).__name__ == "NAType"


def name_of(value: Any) -> str:
    """Return a value as a name that every encoder accepts.

    Equal whole numbers have one name, however they are stored: 3, 3.0 and "3.0" are "3".

    Args:
        value: not missing.
    """
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = printable(str(value))
    if found := _WHOLE.fullmatch(text):
        return str(int(found[1]))
    return text


def names_of(values: Iterable[Any]) -> list[str | None]:
    """Return values as names, and None where a value is missing."""
    return [None if is_missing(value) else name_of(value) for value in values]


def class_names(values: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names, sorted: by value if all are whole numbers, else alphabetically.

    A folder, a table and an array with the same labels thus have the same classes in the same order.
    """
    distinct = set(values)
    if all(value.isascii() and value.removeprefix("-").isdigit() for value in distinct):
        return tuple(sorted(distinct, key=lambda value: (int(value), value)))
    return tuple(sorted(distinct))


def index_names(names: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """Return `class_names` and each name's index in them, `[n]`."""
    classes = class_names(names)
    index = {name: label for label, name in enumerate(classes)}
    return classes, np.fromiter((index[name] for name in names), dtype=np.int64, count=len(names))


def mark_names(names: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], IntArray]:
    """Return `class_names` and a matrix `[n, C]` of 0 and 1 with each row's classes."""
    classes = class_names(name for row in names for name in row)
    index = {name: label for label, name in enumerate(classes)}
    marked = np.zeros((len(names), len(classes)), dtype=np.int64)
    for row, having in enumerate(names):
        marked[row, [index[name] for name in having]] = 1
    return classes, marked


def index_labels(labels: Any, classes: Sequence[str] | None, spec: str) -> tuple[tuple[str, ...], IntArray]:
    """Return class names, and labels `[n]` or `[n, C]` that index them.

    Args:
        labels: `n` names, or indices of `classes`; or for multi-label rows `[n, C]` of 0 and 1, or `n` sequences of
            names or indices. Series, frames, arrays and tensors are read by position.
        classes: the class names; None for the labels' own values.
        spec: the name of the data in messages.

    Raises:
        UserError: if there are no rows, rows have labels of different kinds, or a label is missing or not a class.
    """
    columns = column_names(labels)
    labels = by_position(labels, f"The labels of {spec}")
    if getattr(labels, "ndim", 1) == 2 and labels.shape[1] == 1:
        labels, columns = labels[:, 0], None
    if len(labels) == 0:
        raise UserError(f"{spec} has no rows.")
    values = [_plain(label) for label in (labels.tolist() if hasattr(labels, "tolist") else labels)]
    several = [isinstance(value, list) for value in values]
    if any(several):
        if not all(several):
            raise UserError(f"{spec} mixes kinds of labels; expected one label per row, or a list for every row.")
        named = columns if classes is None else classes
        return _mark_labels(values, named, spec)
    missing = [row for row, value in enumerate(values) if is_missing(value)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(values)} rows of {spec} have no label; the first is row {missing[0]} "
            f"({values[missing[0]]!r}). Give each row a label, or remove it."
        )
    if classes is None:
        return index_names([name_of(value) for value in values])
    return tuple(map(str, classes)), _columns(values, classes, spec)


def _plain(label: Any) -> Any:
    """Return a label as a scalar, or as a list if it is a sequence."""
    if isinstance(label, str | bytes):
        return label
    if isinstance(label, set | frozenset):
        return sorted(label, key=str)
    if isinstance(label, list | tuple):
        return list(label)
    if hasattr(label, "tolist"):
        return label.tolist()
    return list(label) if hasattr(label, "__len__") and hasattr(label, "__getitem__") else label


def _mark_labels(labels: list[list[Any]], classes: Sequence[str] | None, spec: str) -> tuple[tuple[str, ...], IntArray]:
    """Return classes, and labels `[n, C]` of 0 and 1, from rows of marks or of names."""
    for row, values in enumerate(labels):
        if any(is_missing(value) for value in values):
            raise UserError(f"Row {row} of {spec} has a missing label in its list; remove it from the list.")
        if any(isinstance(value, list | tuple | dict) for value in values):
            raise UserError(f"Row {row} of {spec} has a list inside its list of labels; expected names or numbers.")
    width = len(labels[0]) if classes is None else len(classes)
    if width > 1 and all(len(values) == width and all(_is_mark(value) for value in values) for values in labels):
        return tuple(map(str, range(width) if classes is None else classes)), np.array(labels).astype(np.int64)
    if classes is None:
        return mark_names([[name_of(value) for value in values] for values in labels])
    columns = _columns([value for values in labels for value in values], classes, spec)
    marked = np.zeros((len(labels), len(classes)), dtype=np.int64)
    marked[np.repeat(np.arange(len(labels)), [len(values) for values in labels]), columns] = 1
    return tuple(map(str, classes)), marked


def _is_mark(value: Any) -> bool:
    return not isinstance(value, str | bytes) and value in (0, 1)


def _columns(values: list[Any], classes: Sequence[str], spec: str) -> IntArray:
    """Return the index of each class, given names of classes, or whole numbers that index them."""
    by_name = {name_of(name): index for index, name in enumerate(classes)}
    if len(by_name) < len(classes):
        raise UserError(f"{spec} names a class twice: {', '.join(map(str, classes[:20]))}.")
    indices = []
    for value in values:
        if not isinstance(value, str | bytes) and _is_index(value, len(classes)):
            indices.append(int(value))
        elif isinstance(value, str | bytes) and (found := by_name.get(name_of(value))) is not None:
            indices.append(found)
        else:
            raise UserError(
                f"{spec} has a row of class {value!r}, which is neither one of its {len(classes)} classes "
                f"({', '.join(map(str, classes[:20]))}) nor an index of one."
            )
    return np.array(indices, dtype=np.int64)


def _is_index(value: Any, classes: int) -> bool:
    try:
        return not math.isnan(value) and value == int(value) and 0 <= int(value) < classes
    except (TypeError, ValueError, OverflowError):
        return False
