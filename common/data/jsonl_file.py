"""JSON lines with values read on demand: only the position of each line is kept in memory."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.conversion import files_named
from fedhead.data.items import IntArray
from fedhead.data.samples import Former
from fedhead.errors import UserError

MOST_LINE = 2**26
"""Bytes of a line."""


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line.

    Attributes:
        path: the path of the file.
        columns: the names that occur in any row.
        fingerprint: SHA-256 of the content.
        offsets: `[n]`, the first byte of each row.
        lines: `[n]`, the line of each row, from 1.
    """

    path: Path
    columns: tuple[str, ...]
    fingerprint: str
    offsets: IntArray
    lines: IntArray

    def __len__(self) -> int:
        return len(self.lines)

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in names]
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig"))
                    for values, name in zip(found, names, strict=True):
                        values.append(row.get(name))
        return found

    @property
    def former(self) -> Former:
        return Former(self.fingerprint)

    def named_files(self, name: str) -> Mapping[int, str]:
        return files_named(self.values([name])[0])

    def cells(self, name: str) -> Callable[[int], Any]:
        return JsonCells(self, name).read

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


@dataclass(frozen=True)
class JsonCells:
    """One column, read cell by cell."""

    file: JsonLines
    name: str

    def read(self, row: int) -> Any:
        with self.file.path.open("rb") as file:
            file.seek(int(self.file.offsets[row]))
            return json.loads(file.readline().decode("utf-8-sig")).get(self.name)


def open_jsonl(path: Path) -> JsonLines:
    """Read the names and row positions of a file in one pass.

    Raises:
        UserError: if it is empty, or with the line number, if a line is not a JSON object in UTF-8.
    """
    digest = hashlib.sha256()
    columns: dict[str, None] = {}
    offsets, numbers = [], []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), 1):
            if len(line) == MOST_LINE and not line.endswith(b"\n"):
                raise UserError(f"{path}, line {number} has more than {MOST_LINE / 1e6:.0f} MB.")
            digest.update(line)
            if line.strip():
                columns.update(dict.fromkeys(_object(line, path, number)))
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    if not numbers or not columns:
        raise UserError(f'{path} is empty; expected a line such as {{"text": "...", "label": "..."}} for each sample.')
    return JsonLines(
        path, tuple(columns), digest.hexdigest(), np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)
    )


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number} is not text in UTF-8 (byte {line[error.start]:#04x}): save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        whole = " It looks like one JSON array; expected one object per line." if line.lstrip()[:1] == b"[" else ""
        raise UserError(
            f"{path}, line {number} is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}.{whole}"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(
            f"{path}, line {number} is not JSON that can be read: it is nested too deeply, or has a number of "
            "thousands of digits."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number} is of type {type(value).__name__}; expected a JSON object.")
    return value
