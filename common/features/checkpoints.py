"""Checkpoints of an extraction: blocks appended to the files of a folder, each with a checksum in its `meta.json`."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fedhead.files import write_atomically

logger = logging.getLogger(__name__)

META = "meta.json"

Meta = dict[str, Any]
"""The state of a folder: `done` counts the rows whose blocks are in its files, `checksums` has one for each block."""


def read_meta(folder: Path) -> Meta:
    """Return the state of a folder."""
    meta: Meta = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Write the state of a folder atomically."""
    write_atomically(folder / META, json.dumps(meta))


def intact_meta(folder: Path, is_intact: Callable[[Meta], bool]) -> Meta | None:
    """Return the state of a folder if its files have the content that it describes; else None."""
    try:
        meta = read_meta(folder)
        return meta if is_intact(meta) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_whole(folder: Path, is_intact: Callable[[Meta], bool], what: str) -> bool:
    """Return whether a finished folder exists; delete it if its content is corrupt.

    Args:
        folder: of the store.
        is_intact: whether its files have the content that its state describes.
        what: the content, for the log.
    """
    if not folder.exists():
        return False
    if intact_meta(folder, is_intact) is not None:
        return True
    logger.warning("The %s in %s are damaged; they are extracted again.", what, folder)
    shutil.rmtree(folder)
    return False


def truncate(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the files of a folder off at these sizes in bytes; files that are missing are made."""
    for name, size in sizes.items():
        with (folder / name).open("ab") as file:
            file.truncate(size)


class Blocks:
    """The files of a partial folder, to which blocks of rows are appended.

    Args:
        folder: the partial folder.
        names: of its files.
        meta: its state, which changes with each block.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], meta: Meta) -> None:
        self.folder, self.names, self.meta = folder, names, meta
        self._opened = ExitStack()
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        self._files = [self._opened.enter_context((self.folder / name).open("ab")) for name in self.names]
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._opened.close()

    def append(self, content: tuple[bytes, ...], done: int) -> None:
        """Append a block to the files, flush them, and note its checksum, which is of the first two files' content.

        Args:
            content: of each file.
            done: the number of rows in the files afterwards.
        """
        for file, written in zip(self._files, content, strict=True):
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        self.meta["checksums"].append(zlib.crc32(content[1], zlib.crc32(content[0])))
        self.meta["done"] = done
        write_meta(self.folder, self.meta)
