"""Tables: `csv:FILE`, `jsonl:FILE` and `parquet:FILE`, with a row for each image, sound, text or row of numbers.

A table has a column `path` (files of images or sounds, relative to the table's folder), `text` or, in Parquet, `image`
or `audio` (encoded files), and a column `label`; perhaps `group`, `site` and `split`. Options name other columns and
choose rows: `csv:all.csv?label=diagnosis&group=patient&split=train`.

A table without any of the first four holds rows of numbers: `csv:heart.csv?label=disease&features=age,pulse`; without
`features` all other columns of numbers are used. `categories=sex,stage` adds columns with a few levels, and
`missing=pulse:0` names codes of missing values. `group_by=sex` names a column of subgroups, by which a run divides its
metrics; it stays a feature where it is one. A table with a column `messages`, or `prompt` and `completion`, holds
conversations, without labels. `target=COLUMN` or `target=A,B` selects real targets for regression
instead of classes; `labels=no` is for rows without either, and `labels=some` leaves rows without a label out.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.conversations import CONVERSATION, ConversationRows, holds_conversations
from fedhead.data.conversion import to_item
from fedhead.data.csv_file import open_csv
from fedhead.data.files import Files
from fedhead.data.items import IntArray, Item, Kind, UnreadableSampleError
from fedhead.data.jsonl_file import open_jsonl
from fedhead.data.labels import is_missing, name_of, names_of
from fedhead.data.number_rows import NumberRows, find_features, without_codes
from fedhead.data.numbers import is_numeric
from fedhead.data.parquet_file import open_parquet
from fedhead.data.samples import Former, LeftOut, Samples, choose_split, sources
from fedhead.data.sounds import require_soundfile
from fedhead.data.specs import join_options, split_options, to_path
from fedhead.data.table_annotations import annotations_of, chosen_values, columns_of_option, labelled_rows
from fedhead.data.table_columns import COLUMNS, Table, column_for, content_column, find_named
from fedhead.data.texts import plain_text
from fedhead.data.walk import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from fedhead.errors import UserError
from fedhead.wording import quoted

OPTIONS = frozenset(
    {
        *COLUMNS,
        *("target", "labels", "time", "event", "features", "categories", "missing", "kind", "root", "separator"),
        "group_by",
    }
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
    conversations = holds_conversations(table.columns, options, table.path)
    if conversations:
        options = {**options, "labels": "no"}
    labelled, unlabelled = labelled_rows(table, rows, options, spec)
    rows, splits = rows[labelled], splits and [splits[row] for row in labelled.tolist()]
    annotations = annotations_of(table, rows, options, spec)
    group = column_for(table, "group", options, spec, needed=False)
    site = column_for(table, "site", options, spec, needed=False)
    root = Path(options.get("root", table.path.parent))
    items = _items_of(table, rows, root, options, spec, annotations.columns, (group, site))
    fingerprints = (table.fingerprint, table.former.fingerprint)
    # Subgroups change no feature, and the table's own fingerprint covers their values.
    deciding = sorted((name, value) for name, value in options.items() if name != "group_by")
    described = [
        repr((one, deciding, str(root))) + stamps
        for one, stamps in zip(fingerprints, (items.stamps, items.former_stamps), strict=True)
    ]
    groups = names_of(chosen_values(table, group, rows)) if group else None
    if groups and groups != _former_names(chosen_values(table, group, rows)):
        described[0] += repr(groups)
    fingerprint, before = (hashlib.sha256(one.encode(errors="surrogatepass")).hexdigest() for one in described)
    return Samples(
        spec=spec,
        classes=annotations.classes,
        labels=annotations.labels,
        read=items.read,
        name=RowNames(table, rows).name,
        fingerprint=fingerprint,
        groups=groups,
        sites=_sites(chosen_values(table, site, rows), site, table, rows) if site else None,
        splits=splits,
        kind=items.kind,
        targets=annotations.targets,
        target_names=annotations.target_names,
        columns=items.columns,
        incomplete=items.incomplete,
        annotated=CONVERSATION if conversations else "",
        former=None if fingerprint == before else replace(items.former, fingerprint=before),
        left_out=(*unlabelled, *items.left_out),
        subgroups=_subgroups(table, rows, options, spec, annotations.columns),
    )


@dataclass(frozen=True)
class _Items:
    """The items of a table's rows.

    Attributes:
        kind: of the items.
        read: reads the item of a row.
        former: the keys of earlier versions.
        stamps: of the files that items are read from, as a text.
        former_stamps: the same as in earlier versions.
        columns: the names of numbers; empty for other items.
        incomplete: those with missing numbers.
        left_out: unused columns.
    """

    kind: Kind
    read: Callable[[int], Item]
    former: Former
    stamps: str = ""
    former_stamps: str = ""
    columns: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    left_out: Sequence[LeftOut] = ()


def _items_of(
    table: Table,
    rows: IntArray,
    root: Path,
    options: dict[str, str],
    spec: str,
    predicted: Sequence[str],
    described_by: Sequence[str | None],
) -> _Items:
    """Return the items of rows, from the column that holds them or their files, or else from numbers in several.

    Args:
        table: the table.
        rows: the chosen rows.
        root: the base folder of relative paths.
        options: as in `samples_of_table`.
        spec: the data spec with its options.
        predicted: the columns of labels and targets.
        described_by: the columns of groups and sites, if any.

    Raises:
        UserError: for a missing column, or files none of which exists.
    """
    if holds_conversations(table.columns, options, table.path):
        return _Items(KINDS[CONVERSATION], ConversationRows.of(table, rows).read, table.former)
    content, column = content_column(table, options, spec)
    kind = KINDS[content]
    if content == "path":
        return _files_of(table, column, rows, root, options, spec)
    if content in ("image", "audio"):
        read = CellRows(table.cells(column), kind, table, rows, root).read
        if not (by_row := table.named_files(column)):
            return _Items(kind, read, table.former)
        files = Files(root, [by_row[row] for row in rows.tolist() if row in by_row])
        stamps = files.stamps()
        return _Items(kind, read, _later(files.former("", stamps), table.former), "\n".join(map(str, stamps)))
    if content == "text":
        return _Items(kind, TextRows(table.cells(column), table, rows).read, table.former)
    others = {name for name in (*predicted, *described_by, options.get("split", "").partition(":")[0]) if name}
    others.update(*(find_named(table, COLUMNS[purpose]) for purpose in ("path", "image", "audio", "text", "split")))
    numbers, left_out = _number_rows(table, rows, options, predicted, others)
    return _Items(
        kind,
        numbers.read,
        table.former,
        columns=numbers.columns.names,
        incomplete=numbers.incomplete,
        left_out=left_out,
    )


def _files_of(table: Table, column: str, rows: IntArray, root: Path, options: dict[str, str], spec: str) -> _Items:
    paths = tuple("" if is_missing(value) else str(value) for value in chosen_values(table, column, rows))
    kind = _kind_of_paths(paths, options, spec)
    files = Files(root, paths, kind)
    stamps = files.stamps()
    if not any(one.exists for one in stamps):
        raise UserError(
            f"None of the files of {spec} exists; the first is {files.name(0)}. Relative paths start from {root}; "
            "choose another folder as in ?root=/data/images."
        )
    return _Items(
        kind,
        PathRows(files, table, rows).read,
        _later(files.former("", stamps), table.former),
        "\n".join(map(str, stamps)),
        "\n".join(one.former for one in stamps),
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


KINDS: dict[str, Kind] = {
    "path": "image",
    "image": "image",
    "audio": "audio",
    "text": "text",
    CONVERSATION: "text",
    "table": "table",
}
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


def _number_rows(
    table: Table, rows: IntArray, options: dict[str, str], predicted: Sequence[str], others: Collection[str]
) -> tuple[NumberRows, list[LeftOut]]:
    """Return the columns named in options, or else all numeric columns except `others`; and the unused columns."""
    asked = columns_of_option(table, options, "features") if "features" in options else None
    categories = columns_of_option(table, options, "categories") if "categories" in options else []
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
        subgroups = options.get("group_by")
        numeric = {
            name: column
            for name, column in values.items()
            if name not in categories and (name != subgroups or is_numeric(column))
        }
        found: Mapping[str, Sequence[Any]] = {}
        if numeric or not categories:
            found, left = find_features(numeric, str(table.path), required=not categories)
        values = {**found, **{name: values[name] for name in categories}}
    return NumberRows.of(values, lambda row: table.place(int(rows[row])), categories), left


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


def _subgroups(
    table: Table, rows: IntArray, options: dict[str, str], spec: str, predicted: Collection[str]
) -> list[str | None] | None:
    """Return the subgroup of each row from the column in the option `group_by`; None without the option."""
    if "group_by" not in options:
        return None
    if options["group_by"] in predicted:
        raise UserError(
            f"The column {options['group_by']!r} is to be predicted, so it cannot name subgroups as well: figures by "
            "class are in every report. Name another column, as in ?group_by=sex."
        )
    return names_of(chosen_values(table, column_for(table, "group_by", options, spec), rows))


def _sites(values: list[Any], column: str, table: Table, rows: IntArray) -> list[str]:
    for row, value in enumerate(values):
        if is_missing(value):
            raise UserError(f"{table.place(int(rows[row]))} has no site in column {column!r}, although other rows do.")
    return [name_of(value) for value in values]
