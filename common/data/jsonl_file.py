"""JSON lines whose cells are read when asked for: what is kept is where each line begins."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.data.samples import IntArray
from fedhead.errors import UserError


@dataclass(frozen=True)
class JsonLines:
    """A file with a JSON object a line.

    Attributes:
        path: of the file.
        columns: the names that any row has.
        fingerprint: SHA-256 of the content.
        offsets: `[n]`, the byte that each row begins at.
        lines: `[n]`, the line of each row, from 1.
    """

    path: Path
    columns: tuple[str, ...]
    fingerprint: str
    offsets: IntArray
    lines: IntArray

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str) -> list[Any]:
        with self.path.open("rb") as file:
            return [json.loads(line).get(name) for line in file if line.strip()]

    def cells(self, name: str) -> Callable[[int], Any]:
        return JsonCells(self, name).read

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


@dataclass(frozen=True)
class JsonCells:
    """One column, a cell at a time."""

    file: JsonLines
    name: str

    def read(self, row: int) -> Any:
        with self.file.path.open("rb") as file:
            file.seek(int(self.file.offsets[row]))
            return json.loads(file.readline()).get(self.name)


def open_jsonl(path: Path) -> JsonLines:
    """Read a file once for its names and where its rows begin.

    Raises:
        UserError: if it is empty, or a line is not a JSON object in UTF-8, with its number.
    """
    digest = hashlib.sha256()
    columns: dict[str, None] = {}
    offsets, numbers = [], []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                columns.update(dict.fromkeys(_object(line, path, number)))
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    if not numbers:
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
        whole = " It looks like one JSON array; expected an object a line." if line.lstrip()[:1] == b"[" else ""
        raise UserError(
            f"{path}, line {number} is not JSON: {error.msg} at character {error.pos + 1}.{whole}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number} holds {type(value).__name__}; expected a JSON object.")
    return value
