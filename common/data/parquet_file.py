"""Parquet files whose cells are read a few rows at a time, in the order of the file."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.samples import UnreadableSampleError
from fedhead.data.sequential import SequentialRows
from fedhead.errors import UserError
from fedhead.extras import require

BATCH = 64
"""Rows of a column that are in memory at once."""


class ParquetFile:
    """A Parquet file; needs the extra `parquet`.

    Attributes:
        path: of the file.
        columns: its names.
        fingerprint: of its size, its last change and what its footer says of every part of it.

    Raises:
        UserError: if it is damaged or not Parquet, or pyarrow is not installed.
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
            raise UserError(f"{path} is not a Parquet file, or a damaged one: {_first_line(error)}") from None
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        stat = path.stat()
        described = (stat.st_size, stat.st_mtime_ns, json.dumps(metadata.to_dict(), default=str))
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> list[Any]:
        names = self._class_names.get(name)
        values: list[Any] = []
        with _open(self.path) as file:
            for batch in file.iter_batches(batch_size=65536, columns=[name]):
                values.extend(batch.column(0).to_pylist())
        return values if names is None else [_named(value, names) for value in values]

    def cells(self, name: str) -> Callable[[int], Any]:
        return ParquetCells(self.path, name, tuple(self._starts.tolist())).read

    def place(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"


class ParquetCells:
    """One column, a cell at a time; rows asked for in their order are read once, and few of them are in memory.

    Args:
        path: of the file.
        column: its name.
        starts: the row that each row group begins with, and the number of rows.
    """

    def __init__(self, path: Path, column: str, starts: tuple[int, ...]) -> None:
        self._arguments = (path, column, starts)
        self._rows = SequentialRows(lambda row: starts[self._group(row)], self._rows_from)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the open file behind: every process opens its own."""
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


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of class numbers by column, where Hugging Face's `datasets` wrote them down."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
