"""The labels, targets, or times and events of a table's rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhead.data.items import FloatArray, IntArray
from fedhead.data.labels import UNLABELLED, index_labels, index_names, is_missing, mark_names, name_of
from fedhead.data.numbers import column_of_numbers, happened, split_names, warn_of_constants
from fedhead.data.samples import LeftOut
from fedhead.data.specs import without_labels
from fedhead.data.table_columns import COLUMNS, Table, column_for, find_named
from fedhead.errors import UserError
from fedhead.wording import quoted

SOME = "some"
"""Value of the option `labels` for tables in which some rows have no label."""


@dataclass(frozen=True)
class Annotations:
    """The labels or targets of a table.

    Attributes:
        columns: the source columns.
        classes: see `Samples`.
        labels: see `Samples`.
        targets: see `Samples`.
        target_names: see `Samples`.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    labels: IntArray
    targets: FloatArray | None = None
    target_names: tuple[str, ...] = ()


def annotations_of(table: Table, rows: IntArray, options: dict[str, str], spec: str) -> Annotations:
    """Read the targets or the times and events named in options, or else the labels, unless the data has none."""
    if options.get("labels") != SOME and without_labels(options, spec):
        if named := [name for name in ("label", "target") if name in options]:
            raise UserError(f"{spec} says labels=no and names a {named[0]}; expected one of them.")
        return Annotations(tuple(find_named(table, COLUMNS["label"])), (UNLABELLED,), np.zeros(len(rows), np.int64))
    if "time" in options or "event" in options:
        return _times(table, rows, options, spec)
    if "target" not in options:
        column = column_for(table, "label", options, spec)
        values = chosen_values(table, column, rows)
        classes, labels = _labels(values, options.get("separator"), table, rows, column, spec)
        return Annotations((column,), classes, labels)
    if "label" in options:
        raise UserError(f"{spec} names label and target; expected one of them: classes or real targets.")
    names = columns_of_option(table, options, "target")
    targets = np.stack(
        [
            column_of_numbers([values[row] for row in rows], name, lambda row: table.place(int(rows[row])))
            for name, values in zip(names, table.values(names), strict=True)
        ],
        axis=1,
    )
    warn_of_constants(targets, names, spec)
    return Annotations(tuple(names), (), np.zeros(len(rows), dtype=np.int64), targets, tuple(names))


def labelled_rows(
    table: Table, rows: IntArray, options: dict[str, str], spec: str
) -> tuple[IntArray, tuple[LeftOut, ...]]:
    """Return the positions in `rows` to use: with `labels=some` those that have a label, else all.

    Raises:
        UserError: if no row has one.
    """
    if options.get("labels") != SOME:
        return np.arange(len(rows)), ()
    if "target" in options or "time" in options or "separator" in options:
        raise UserError(f"{spec} says labels=some, which is for data with one class in each row.")
    column = column_for(table, "label", options, spec)
    missing = np.array([is_missing(value) for value in chosen_values(table, column, rows)], np.bool_)
    if missing.all():
        raise UserError(f"No row of {spec} has a label in column {column!r}: read all as unlabelled with ?labels=no.")
    found = np.flatnonzero(missing)
    if not len(found):
        return np.arange(len(rows)), ()
    examples = tuple(table.place(int(rows[row])) for row in found[:3].tolist())
    things = "rows" if len(found) > 1 else "row"
    return np.flatnonzero(~missing), (LeftOut(len(found), things, "no label, by labels=some", examples, warned=False),)


def _times(table: Table, rows: IntArray, options: dict[str, str], spec: str) -> Annotations:
    """Read times and events as the targets `time` and `event`.

    Raises:
        UserError: if an option is missing or another one names labels, a time is missing, not finite or before 0, or an
            event is neither yes nor no.
    """
    if not {"time", "event"} <= options.keys() or {"label", "target"} & options.keys():
        raise UserError(f"{spec} needs time and event together, without label and target, as in ?time=days&event=died.")
    names = [columns_of_option(table, options, option) for option in ("time", "event")]
    if any(len(one) != 1 for one in names) or names[0] == names[1]:
        raise UserError(f"{spec} names {names[0]} as time and {names[1]} as event; expected a column for each.")
    columns = [[values[row] for row in rows] for values in table.values([names[0][0], names[1][0]])]

    def place(row: int) -> str:
        return table.place(int(rows[row]))

    times = column_of_numbers(columns[0], names[0][0], place)
    if (before := np.flatnonzero(times < 0)).size:
        row = int(before[0])
        raise UserError(
            f"{place(row)} has the time {times[row]:g}, which is before 0 ({before.size} of {len(times)} rows). Count "
            "times from the start of each row's own observation."
        )
    events = np.array([happened(value, names[1][0], place(row)) for row, value in enumerate(columns[1])])
    targets = np.stack([times, events], axis=1)
    return Annotations((names[0][0], names[1][0]), (), np.zeros(len(rows), np.int64), targets, ("time", "event"))


def _labels(
    values: list[Any], separator: str | None, table: Table, rows: IntArray, column: str, spec: str
) -> tuple[tuple[str, ...], IntArray]:
    """Return classes, and labels `[n]`, or `[n, C]` if labels are lists or separated."""
    if separator is not None:
        texts = ["" if is_missing(value) else str(value) for value in values]
        return mark_names([[name.strip() for name in text.split(separator) if name.strip()] for text in texts])
    missing = [row for row, value in enumerate(values) if is_missing(value)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(values)} rows of {spec} have no label in column {column!r}; the first: "
            f"{table.place(int(rows[missing[0]]))}. Give each row a label, remove it, or leave such rows out with "
            "?labels=some. Where rows may have any number of classes, name the separator between them, as in "
            "?separator=;."
        )
    if any(isinstance(value, list) for value in values):
        if not all(isinstance(value, list) for value in values):
            odd = next(row for row, value in enumerate(values) if not isinstance(value, list))
            raise UserError(f"{table.place(int(rows[odd]))} has no list of labels, although other rows do.")
        return index_labels(values, None, spec)
    return index_names([name_of(value) for value in values])


def columns_of_option(table: Table, options: dict[str, str], option: str) -> list[str]:
    """Return the columns named in an option.

    Raises:
        UserError: if the table lacks one, or one is named twice.
    """
    names = split_names(options[option], table.columns)
    for position, name in enumerate(names):
        if name not in table.columns:
            raise UserError(f"{table.path} has no column {name!r}; it has {quoted(table.columns)}.")
        if name in names[:position]:
            raise UserError(f"The option {option} names the column {name!r} twice.")
    return names


def chosen_values(table: Table, column: str, rows: IntArray) -> list[Any]:
    """Return a column's values in the rows."""
    values = table.values([column])[0]
    return values if len(rows) == len(values) else [values[row] for row in rows]
