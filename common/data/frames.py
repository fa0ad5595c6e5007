"""Frames of pandas and polars and tables of Arrow, with the interface of table files."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedhead.data.arrays import ContentDigest
from fedhead.data.conversion import files_named
from fedhead.data.positions import column_names
from fedhead.data.samples import Former, Samples
from fedhead.errors import UserError


class FrameTable:
    """A frame as a table; rows are counted by position.

    Args:
        frame: of pandas, polars or Arrow.
        spec: the name of the data in messages.
    """

    def __init__(self, frame: Any, spec: str) -> None:
        self.path = Path(spec)
        self.columns: Sequence[str] = column_names(frame) or ()
        named = self.columns if type(frame).__name__ == "Table" else frame.columns
        self._rows = len(frame)
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"{spec} has columns with equal names; rename them.")
        self._values = {name: _plain(frame, column) for name, column in zip(self.columns, named, strict=True)}
        digest = hashlib.sha256(repr(self.columns).encode(errors="surrogatepass"))
        content = ContentDigest(digest)
        for column, values in self._values.items():
            for row, value in enumerate(values):
                if isinstance(value, np.ndarray | Image.Image) or hasattr(value, "detach"):
                    content.add(value, "image", f"{spec}, row {row}")
                else:
                    digest.update(f"{column} {type(value).__name__} {value!r} ".encode(errors="surrogatepass"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._rows

    def values(self, names: Sequence[str]) -> list[list[Any]]:
        return [self._values[name] for name in names]

    @property
    def former(self) -> Former:
        return Former(self.fingerprint)

    def named_files(self, name: str) -> Mapping[int, str]:
        return files_named(self._values[name])

    def cells(self, name: str) -> Callable[[int], Any]:
        return self._values[name].__getitem__

    def place(self, row: int) -> str:
        return f"{self.path}, row {row}"


def _plain(frame: Any, column: Any) -> list[Any]:
    values = frame[column]
    return list(values.to_pylist()) if hasattr(values, "to_pylist") else list(values)


def samples_from_frame(frame: Any, *, spec: str = "frame", **options: str) -> Samples:
    """Load the rows of a frame as samples, by the rules of tables.

    Args:
        frame: of pandas, polars or Arrow, with columns such as `path`, `image` (files, arrays or PIL images) or
            `text`, and `label`; or with columns of numbers.
        spec: the name of the data in messages.
        options: the options of tables, such as `label="diagnosis"` or `target="age"`.

    Raises:
        UserError: for a missing column, rows without a label, or invalid options.
    """
    from fedhead.data.tables import OPTIONS, samples_of_table

    if unknown := sorted(set(options) - OPTIONS):
        raise UserError(f"A frame has no option {unknown[0]!r}; available: {', '.join(sorted(OPTIONS))}.")
    table = FrameTable(frame, spec)
    if len(table) == 0:
        raise UserError(f"{spec} has no rows.")
    return samples_of_table(table, options, spec)
