"""Parquet files with cells read in small batches of rows, in the order of the file."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.conversion import files_named
from fedhead.data.files import stamp
from fedhead.data.items import UnreadableSampleError
from fedhead.data.samples import Former
from fedhead.data.sequential import SequentialRows
from fedhead.errors import UserError
from fedhead.extras import require

BATCH = 64
"""Number of rows of a column in memory at once."""


class ParquetFile:
    """A Parquet file; needs the extra `parquet`.

    Attributes:
        path: the path of the file.
        columns: the column names.
        fingerprint: of the file's stamp, and of the statistics in the footer.
        former: the fingerprint of the previous version.

    Raises:
        UserError: if the file is damaged or not Parquet, or pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require("pyarrow", "parquet", f"Reading {path}")
        import pyarrow

        try:
            with _open(path) as file:
                metadata = file.metadata
                self.columns = tuple(file.schema_arrow.names)
                self._class_names = _class_names(file.schema_arrow.metadata or {})
                rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a Parquet file or is damaged: {_first_line(error)}") from None
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        found = stamp(path)
        footer = json.dumps(metadata.to_dict(), default=str)
        self.fingerprint = hashlib.sha256(repr((str(found), footer)).encode()).hexdigest()
        former = hashlib.sha256(repr((found.size, found.modified, footer)).encode()).hexdigest()
        self.former = Former(former, found.changed)
        self._leaves = _leaves(metadata)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in names}
        with _open(self.path) as file:
            for batch in file.iter_batches(batch_size=65536, columns=list(found)):
                for name, values in found.items():
                    values.extend(batch.column(name).to_pylist())
        return [self._named(name, found[name]) for name in names]

    def _named(self, name: str, values: list[Any]) -> list[Any]:
        names = self._class_names.get(name)
        return values if names is None else [_named(value, names) for value in values]

    def named_files(self, name: str) -> Mapping[int, str]:
        # Plain bytes name no file; for images with names, the footer shows whether all have their bytes.
        if name in self._leaves or not self._leaves.get(f"{name}.bytes", True):
            return {}
        return files_named(self.values([name])[0])

    def cells(self, name: str) -> Callable[[int], Any]:
        return ParquetCells(self.path, name, tuple(self._starts.tolist())).read

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"


class ParquetCells:
    """One column, read cell by cell; rows requested in order are read once, with few of them in memory.

    Args:
        path: the path of the file.
        column: the name of the column.
        starts: the first row of each row group, and the number of rows.
    """

    def __init__(self, path: Path, column: str, starts: tuple[int, ...]) -> None:
        self._arguments = (path, column, starts)
        self._rows = SequentialRows(lambda row: starts[self._group(row)], self._rows_from)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the open file; every process opens its own."""
        return ParquetCells, self._arguments

    def read(self, row: int) -> Any:
        from pyarrow import ArrowException

        try:
            return self._rows.read(row)
        except (ArrowException, OSError, StopIteration) as error:
            path, column, _ = self._arguments
            raise UnreadableSampleError(f"{path}, row {row + 1}: {column!r} is damaged: {_first_line(error)}") from None

    def _group(self, row: int) -> int:
        return bisect_right(self._arguments[2], row) - 1

    def _rows_from(self, start: int) -> Iterator[Any]:
        path, column, _ = self._arguments
        with _open(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, row_groups=[self._group(start)], columns=[column]):
                yield from batch.column(0).to_pylist()


def open_parquet(path: Path) -> ParquetFile:
    """Read the footer of a Parquet file; see `ParquetFile`."""
    return ParquetFile(path)


def _open(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile as Reader

    return Reader(path, pre_buffer=False, buffer_size=1 << 20)


def _leaves(metadata: Any) -> dict[str, bool]:
    """Return for each column of plain values, by its path, whether values may be missing, from the footer."""
    missing: dict[str, bool] = {}
    for group in range(metadata.num_row_groups):
        for position in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(position)
            statistics = chunk.statistics
            unknown = statistics is None or not statistics.has_null_count or statistics.null_count > 0
            missing[chunk.path_in_schema] = missing.get(chunk.path_in_schema, False) or unknown
    return missing


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of class numbers by column, if Hugging Face's `datasets` stored them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _named(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
