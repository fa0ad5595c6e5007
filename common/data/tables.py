"""Tables: `csv:FILE`, `jsonl:FILE` and `parquet:FILE`, with a row for each image, sound, text or row of numbers.

A table has a column `path` (files of images or sounds, relative to the table's folder), `text` or, in Parquet, `image`
or `audio` (encoded files), and a column `label`; perhaps `group`, `site` and `split`. Options name other columns and
choose rows: `csv:all.csv?label=diagnosis&group=patient&split=train`.

A table without any of the first four holds rows of numbers: `csv:heart.csv?label=disease&features=age,pulse`; without
`features` all other columns of numbers are used. `categories=sex,stage` adds columns with a few levels, and
`missing=pulse:0` names codes of missing values. `target=COLUMN` or `target=A,B` selects real targets for regression
instead of classes; `labels=no` is for rows without either, and `labels=some` leaves rows without a label out.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.conversion import to_item
from fedhead.data.csv_file import open_csv
from fedhead.data.files import Files
from fedhead.data.items import FloatArray, IntArray, Item, Kind, UnreadableSampleError
from fedhead.data.jsonl_file import open_jsonl
from fedhead.data.labels import UNLABELLED, index_labels, index_names, is_missing, mark_names, name_of, names_of
from fedhead.data.number_rows import NumberRows, find_features, without_codes
from fedhead.data.numbers import column_of_numbers, happened, split_names, warn_of_constants
from fedhead.data.parquet_file import open_parquet
from fedhead.data.samples import Former, LeftOut, Samples, choose_split, sources
from fedhead.data.sounds import require_soundfile
from fedhead.data.specs import join_options, split_options, to_path, without_labels
from fedhead.data.table_columns import COLUMNS, Table, column_for, content_column, find_named
from fedhead.data.texts import plain_text
from fedhead.data.walk import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from fedhead.errors import UserError
from fedhead.wording import quoted

SOME = "some"
"""Value of the option `labels` for tables in which some rows have no label."""

OPTIONS = frozenset(
    {*COLUMNS, "target", "labels", "time", "event", "features", "categories", "missing", "kind", "root", "separator"}
)
"""Options of every source that reads a table."""


@sources.register("csv")
def load_csv(argument: str) -> Samples:
    """A CSV file with a header line, in UTF-8 (or `encoding=`); with commas, semicolons or tabs."""
    return _load("csv", argument, {"encoding"})


@sources.register("jsonl")
def load_jsonl(argument: str) -> Samples:
    """A file with one JSON object per line; labels may be lists."""
    return _load("jsonl", argument, ())


@sources.register("parquet")
def load_parquet(argument: str) -> Samples:
    """A Parquet file, possibly with images in it; needs the extra `parquet`."""
    return _load("parquet", argument, ())


def _load(source: str, argument: str, more_options: Collection[str]) -> Samples:
    spec = f"{source}:{argument}"
    known = {*OPTIONS, *more_options}
    given, options = split_options(argument, known, spec)
    if not given:
        raise UserError(f"Expected a file, as in {source}:train.{source}, not {spec!r}.")
    path = to_path(given).absolute()
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file, as in {source}:{given}/train.{source}.")
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    table = open_table(source, path, options)
    if "root" in options:
        options["root"] = str(to_path(options["root"]).absolute())
    return samples_of_table(table, options, f"{source}:{join_options(str(path), options)}")


def open_table(source: str, path: Path, options: Mapping[str, str]) -> Table:
    """Open a file of rows.

    Args:
        source: "csv", "jsonl" or "parquet".
        path: the path of the file.
        options: `encoding`, for a CSV file.

    Raises:
        UserError: if it cannot be read, or has no rows.
    """
    try:
        if source == "csv":
            table: Table = open_csv(path, options.get("encoding", "utf-8"))
        else:
            table = open_jsonl(path) if source == "jsonl" else open_parquet(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if len(table) == 0:
        raise UserError(f"{path} has no rows.")
    return table


def samples_of_table(table: Table, options: dict[str, str], spec: str) -> Samples:
    """Load the rows of a table as samples.

    Args:
        table: the table.
        options: columns by purpose (several, comma-separated, for `target` and `features`); `split`, the rows to use;
            `separator`, between the labels of a row; `root`, the base folder of relative paths; `kind`, the kind of the
            items.
        spec: the data spec with its options.

    Raises:
        UserError: for a missing column, rows without a label, or invalid options.
    """
    rows, splits = _choose_rows(table, options, spec)
    labelled, unlabelled = _labelled_rows(table, rows, options, spec)
    rows, splits = rows[labelled], splits and [splits[row] for row in labelled.tolist()]
    annotations = _annotations(table, rows, options, spec)
    group = column_for(table, "group", options, spec, needed=False)
    site = column_for(table, "site", options, spec, needed=False)
    root = Path(options.get("root", table.path.parent))
    fingerprints = (table.fingerprint, table.former.fingerprint)
    described = [repr((one, sorted(options.items()), str(root))) for one in fingerprints]
    former = table.former
    content, column = content_column(table, options, spec)
    kind, columns = KINDS[content], tuple[str, ...]()
    incomplete: tuple[str, ...] = ()
    left_out: list[LeftOut] = []
    read: Callable[[int], Item]
    if content == "path":
        paths = tuple("" if is_missing(value) else str(value) for value in _chosen(table, column, rows))
        kind = _kind_of_paths(paths, options, spec)
        files = Files(root, paths, kind)
        stamps = files.stamps()
        if not any(one.exists for one in stamps):
            raise UserError(
                f"None of the files of {spec} exists; the first is {files.name(0)}. Relative paths start from {root}; "
                "choose another folder as in ?root=/data/images."
            )
        described[0] += "\n".join(map(str, stamps))
        described[1] += "\n".join(one.former for one in stamps)
        former = _later(files.former("", stamps), table.former)
        read = PathRows(files, table, rows).read
    elif content in ("image", "audio"):
        if by_row := table.named_files(column):
            files = Files(root, [by_row[row] for row in rows.tolist() if row in by_row])
            stamps = files.stamps()
            described[0] += "\n".join(map(str, stamps))
            former = _later(files.former("", stamps), table.former)
        read = CellRows(table.cells(column), kind, table, rows, root).read
    elif content == "text":
        read = TextRows(table.cells(column), table, rows).read
    else:
        named = (*annotations.columns, group, site, options.get("split", "").partition(":")[0])
        others = {name for name in named if name}
        others.update(*(find_named(table, COLUMNS[purpose]) for purpose in ("path", "image", "audio", "text", "split")))
        numbers, left_out = _number_rows(table, rows, options, annotations.columns, others)
        columns, incomplete, read = numbers.columns.names, numbers.incomplete, numbers.read
    groups = names_of(_chosen(table, group, rows)) if group else None
    if groups and groups != _former_names(_chosen(table, group, rows)):
        described[0] += repr(groups)
    fingerprint, before = (hashlib.sha256(one.encode(errors="surrogatepass")).hexdigest() for one in described)
    return Samples(
        spec=spec,
        classes=annotations.classes,
        labels=annotations.labels,
        read=read,
        name=RowNames(table, rows).name,
        fingerprint=fingerprint,
        groups=groups,
        sites=_sites(_chosen(table, site, rows), site, table, rows) if site else None,
        splits=splits,
        kind=kind,
        targets=annotations.targets,
        target_names=annotations.target_names,
        columns=columns,
        incomplete=incomplete,
        former=None if fingerprint == before else replace(former, fingerprint=before),
        left_out=(*unlabelled, *left_out),
    )


def _later(files: Former, table: Former) -> Former:
    return replace(files, changed=max(files.changed, table.changed))


def _former_names(values: list[Any]) -> list[str | None]:
    """Return groups by the rule of the previous version, which distinguished "3.0" and 3."""
    missing = [value is None or value == "" or (isinstance(value, float) and math.isnan(value)) for value in values]
    return [
        None if none else str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        for none, value in zip(missing, values, strict=True)
    ]


KINDS: dict[str, Kind] = {"path": "image", "image": "image", "audio": "audio", "text": "text", "table": "table"}
"""Kinds of items by the content of a column; files may also be sounds."""


def _kind_of_paths(paths: Sequence[str], options: Mapping[str, str], spec: str) -> Kind:
    """Return the kind of the files named in a column: the one in the option, or else by their suffixes."""
    if options.get("kind") in ("image", "audio"):
        kind = KINDS[options["kind"]]
    else:
        sounds = [row for row, path in enumerate(paths) if Path(path).suffix.lower() in AUDIO_SUFFIXES]
        if not sounds:
            return "image"
        others = [path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES]
        if others:
            raise UserError(
                f"{spec} names {len(sounds)} sounds, such as {paths[sounds[0]]}, and {len(others)} images, such as "
                f"{others[0]}; expected one kind. Put them into separate tables."
            )
        kind = "audio"
    if kind == "audio":
        require_soundfile(f"The data {spec!r}")
    return kind


@dataclass(frozen=True)
class _Annotations:
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


def _annotations(table: Table, rows: IntArray, options: dict[str, str], spec: str) -> _Annotations:
    """Read the targets or the times and events named in options, or else the labels, unless the data has none."""
    if options.get("labels") != SOME and without_labels(options, spec):
        if named := [name for name in ("label", "target") if name in options]:
            raise UserError(f"{spec} says labels=no and names a {named[0]}; expected one of them.")
        return _Annotations(tuple(find_named(table, COLUMNS["label"])), (UNLABELLED,), np.zeros(len(rows), np.int64))
    if "time" in options or "event" in options:
        return _times(table, rows, options, spec)
    if "target" not in options:
        column = column_for(table, "label", options, spec)
        values = _chosen(table, column, rows)
        classes, labels = _labels(values, options.get("separator"), table, rows, column, spec)
        return _Annotations((column,), classes, labels)
    if "label" in options:
        raise UserError(f"{spec} names label and target; expected one of them: classes or real targets.")
    names = _columns_of_option(table, options, "target")
    targets = np.stack(
        [
            column_of_numbers([values[row] for row in rows], name, lambda row: table.place(int(rows[row])))
            for name, values in zip(names, table.values(names), strict=True)
        ],
        axis=1,
    )
    warn_of_constants(targets, names, spec)
    return _Annotations(tuple(names), (), np.zeros(len(rows), dtype=np.int64), targets, tuple(names))


def _labelled_rows(
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
    missing = np.array([is_missing(value) for value in _chosen(table, column, rows)], np.bool_)
    if missing.all():
        raise UserError(f"No row of {spec} has a label in column {column!r}: read all as unlabelled with ?labels=no.")
    found = np.flatnonzero(missing)
    if not len(found):
        return np.arange(len(rows)), ()
    examples = tuple(table.place(int(rows[row])) for row in found[:3].tolist())
    things = "rows" if len(found) > 1 else "row"
    return np.flatnonzero(~missing), (LeftOut(len(found), things, "no label, by labels=some", examples, warned=False),)


def _times(table: Table, rows: IntArray, options: dict[str, str], spec: str) -> _Annotations:
    """Read times and events as the targets `time` and `event`.

    Raises:
        UserError: if an option is missing or another one names labels, a time is missing, not finite or before 0, or an
            event is neither yes nor no.
    """
    if not {"time", "event"} <= options.keys() or {"label", "target"} & options.keys():
        raise UserError(f"{spec} needs time and event together, without label and target, as in ?time=days&event=died.")
    names = [_columns_of_option(table, options, option) for option in ("time", "event")]
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
    return _Annotations((names[0][0], names[1][0]), (), np.zeros(len(rows), np.int64), targets, ("time", "event"))


def _number_rows(
    table: Table, rows: IntArray, options: dict[str, str], predicted: Sequence[str], others: Collection[str]
) -> tuple[NumberRows, list[LeftOut]]:
    """Return the columns named in options, or else all numeric columns except `others`; and the unused columns."""
    asked = _columns_of_option(table, options, "features") if "features" in options else None
    categories = _columns_of_option(table, options, "categories") if "categories" in options else []
    if both := [name for name in (*(asked or ()), *categories) if name in predicted]:
        raise UserError(f"The column {both[0]!r} is to be predicted, so it cannot be a feature as well.")
    names = [name for name in asked or table.columns if name in (asked or ()) or name not in others]
    names = [name for name in names if name not in categories]
    columns = zip((*names, *categories), table.values([*names, *categories]), strict=True)
    values: Mapping[str, Sequence[Any]] = {name: [column[row] for row in rows] for name, column in columns}
    if "missing" in options:
        values = without_codes(values, options["missing"], table.columns)
    left: list[LeftOut] = []
    if asked is None:
        numeric = {name: column for name, column in values.items() if name not in categories}
        found: Mapping[str, Sequence[Any]] = {}
        if numeric or not categories:
            found, left = find_features(numeric, str(table.path), required=not categories)
        values = {**found, **{name: values[name] for name in categories}}
    return NumberRows.of(values, lambda row: table.place(int(rows[row])), categories), left


def _columns_of_option(table: Table, options: dict[str, str], option: str) -> list[str]:
    names = split_names(options[option], table.columns)
    for position, name in enumerate(names):
        if name not in table.columns:
            raise UserError(f"{table.path} has no column {name!r}; it has {quoted(table.columns)}.")
        if name in names[:position]:
            raise UserError(f"The option {option} names the column {name!r} twice.")
    return names


def _chosen(table: Table, column: str, rows: IntArray) -> list[Any]:
    """Return a column's values in the rows."""
    values = table.values([column])[0]
    return values if len(rows) == len(values) else [values[row] for row in rows]


@dataclass(frozen=True)
class RowNames:
    """Display names of rows.

    Attributes:
        table: the table.
        rows: `[n]`, row numbers in the table.
    """

    table: Table
    rows: IntArray

    def name(self, row: int) -> str:
        return self.table.place(int(self.rows[row]))


@dataclass(frozen=True)
class PathRows:
    """Files named in a table."""

    files: Files
    table: Table
    rows: IntArray

    def read(self, row: int) -> Item:
        if not self.files.paths[row]:
            raise UnreadableSampleError(f"{self.table.place(int(self.rows[row]))} names no file.")
        return self.files.read(row)


@dataclass(frozen=True)
class CellRows:
    """Images or sounds encoded in a table: as bytes, or as `{bytes, path}`."""

    cell: Callable[[int], Any]
    kind: Kind
    table: Table
    rows: IntArray
    root: Path

    def read(self, row: int) -> Item:
        number = int(self.rows[row])
        return to_item(self.cell(number), self.kind, self.table.place(number), root=self.root)


@dataclass(frozen=True)
class TextRows:
    """Texts in a table."""

    cell: Callable[[int], Any]
    table: Table
    rows: IntArray

    def read(self, row: int) -> str:
        number = int(self.rows[row])
        return plain_text(self.cell(number), self.table.place(number))


def _choose_rows(table: Table, options: dict[str, str], spec: str) -> tuple[IntArray, list[str] | None]:
    """Return the rows to use, and the split of each; the option is VALUE, or COLUMN:VALUE for another column."""
    wanted = options.get("split")
    column, colon, value = (wanted or "").partition(":")
    if colon and column in table.columns:
        wanted = value
    elif found := find_named(table, COLUMNS["split"]):
        column = found[0]
    elif wanted is None:
        return np.arange(len(table)), None
    else:
        raise UserError(
            f"{table.path} has no column 'split' for choosing {wanted!r}; it has {quoted(table.columns)}. Name "
            f"another one as in ?split={table.columns[-1]}:{wanted}."
        )
    splits = [name or "" for name in names_of(table.values([column])[0])]
    rows = choose_split(splits, wanted, spec)
    return rows, [splits[row] for row in rows]


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


def _sites(values: list[Any], column: str, table: Table, rows: IntArray) -> list[str]:
    for row, value in enumerate(values):
        if is_missing(value):
            raise UserError(f"{table.place(int(rows[row]))} has no site in column {column!r}, although other rows do.")
    return [name_of(value) for value in values]
