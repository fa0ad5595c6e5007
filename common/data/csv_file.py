"""CSV files with cells read on demand: only the position of each row is kept in memory."""

import codecs
import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedhead.data.items import IntArray
from fedhead.data.samples import Former
from fedhead.errors import UserError

DELIMITERS = ",;\t|"

_NAMED_DELIMITER = re.compile(rb'"?sep=([^\r\n"])"?[\r\n]*')
"""The optional first line that names the delimiter, as written and read by Excel."""

# A text may be longer than the module's default limit of 131,072 characters.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class CsvFile:
    """A CSV file with a header line.

    Attributes:
        path: the path of the file.
        columns: the header.
        fingerprint: SHA-256 of the content.
        encoding: the encoding of the text.
        delimiter: the separator of values in a row.
        offsets: `[n + 1]`, the first byte of each row, and the end of the last one.
        lines: `[n]`, the first line of each row, from 1.
    """

    path: Path
    columns: tuple[str, ...]
    fingerprint: str
    encoding: str
    delimiter: str
    offsets: IntArray
    lines: IntArray

    def __len__(self) -> int:
        return len(self.lines)

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        positions = [self.columns.index(name) for name in names]
        found: list[list[Any]] = [[] for _ in names]
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[0]))
            text = (line.decode(self.encoding) for line in file)
            for row in csv.reader(text, delimiter=self.delimiter, strict=True):
                if row:
                    for values, position in zip(found, positions, strict=True):
                        values.append(row[position])
        return found

    @property
    def former(self) -> Former:
        return Former(self.fingerprint)

    def named_files(self, name: str) -> Mapping[int, str]:
        return {}

    def cells(self, name: str) -> Callable[[int], Any]:
        return CsvCells(self, self.columns.index(name)).read

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


@dataclass(frozen=True)
class CsvCells:
    """One column, read cell by cell."""

    file: CsvFile
    position: int

    def read(self, row: int) -> str:
        start, end = map(int, self.file.offsets[row : row + 2])
        with self.file.path.open("rb") as file:
            file.seek(start)
            lines = io.BytesIO(file.read(end - start))
        text = (line.decode(self.file.encoding) for line in lines)
        parsed = csv.reader(text, delimiter=self.file.delimiter, strict=True)
        return next(values for values in parsed if values)[self.position]


def open_csv(path: Path, encoding: str) -> CsvFile:
    """Read the header and the row positions of a CSV file in one pass; quoted values may span lines.

    Args:
        path: the path of the file.
        encoding: Python's name of an encoding in which a line ends with the byte 10, such as UTF-8 and ISO 8859.

    Raises:
        UserError: if it is empty or not a table in that encoding, with the line.
    """
    _require_line_ends(path, encoding)
    columns: tuple[str, ...] = ()
    offsets, numbers = [], []
    with path.open("rb") as file:
        lines = _Lines(file, path, encoding)
        reader = csv.reader(lines, delimiter=lines.delimiter, strict=True)
        while True:
            begin, line = lines.end, reader.line_num + 1 + lines.above
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(
                    f"{path} is not a well-formed CSV file; the row that begins on line {line}: {error}."
                ) from None
            if not row:
                continue
            if not columns:
                columns = _header(row, path)
                continue
            if len(row) != len(columns):
                raise UserError(
                    f"{path}, line {line} has {len(row)} values for the {len(columns)} columns of the header; put "
                    f"values that contain {lines.delimiter!r} in quotes."
                )
            offsets.append(begin)
            numbers.append(line)
    if not columns:
        raise UserError(f"{path} is empty; expected a header line such as path,label and a row for each sample.")
    return CsvFile(
        path=path,
        columns=columns,
        fingerprint=lines.digest.hexdigest(),
        encoding=encoding,
        delimiter=lines.delimiter,
        offsets=np.array([*offsets, lines.end], dtype=np.int64),
        lines=np.array(numbers, dtype=np.int64),
    )


class _Lines:
    """The lines of an open file, decoded one by one.

    Args:
        file: the file, at its beginning.
        path: its path.
        encoding: its encoding.

    Attributes:
        delimiter: the separator of values, as the first line names or suggests it.
        above: the number of lines before the first one that is read.
        end: the position after the last line that was read.
        digest: of all lines so far.

    Raises:
        UserError: if it is another kind of file, or not text in this encoding.
    """

    def __init__(self, file: BinaryIO, path: Path, encoding: str) -> None:
        self.digest = hashlib.sha256()
        self._file, self._path, self._encoding = file, path, encoding
        start = file.read(4)
        _require_text(start, path)
        # The byte order mark that Excel writes before UTF-8.
        self.end = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        file.seek(self.end)
        first = file.readline()
        named = _NAMED_DELIMITER.fullmatch(first)
        if named:
            self.end += len(first)
            self.digest.update(first)
            self.delimiter = named[1].decode("latin-1")
        else:
            self.delimiter = max(DELIMITERS, key=lambda one: _decode(first, path, 1, encoding).count(one))
        self.above = int(named is not None)
        file.seek(self.end)

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._file, 1 + self.above):
            self.digest.update(line)
            self.end += len(line)
            yield _decode(line, self._path, number, self._encoding)


def _require_line_ends(path: Path, encoding: str) -> None:
    """Check that text in an encoding can be split at bytes 10.

    Raises:
        UserError: if not, or if there is no such encoding.
    """
    try:
        if "\n".encode(encoding) != b"\n":
            raise UserError(f"{path} cannot be read line by line in {encoding}: save it as UTF-8.")
    except LookupError:
        raise UserError(f"There is no encoding {encoding!r}; expected one such as utf-8, latin-1 or cp1252.") from None


def _require_text(start: bytes, path: Path) -> None:
    """Check the first bytes of a file.

    Raises:
        UserError: if they are of another kind of file.
    """
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is text in UTF-16: save it as UTF-8.")
    if start.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path} is an archive or a spreadsheet, not a CSV file: save it as CSV in UTF-8.")
    if start.startswith(b"PAR1"):
        raise UserError(f"{path} is a Parquet file: use parquet:{path.name}.")


def _header(row: list[str], path: Path) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in row)
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns {twice!r} in its header; rename one.")
    return columns


def _decode(line: bytes, path: Path, number: int, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number} is not text in {encoding.upper()} (byte {line[error.start]:#04x}): save it as "
            "UTF-8, or name its encoding as in ?encoding=cp1252."
        ) from None
