"""Files by row number, and stamps that change whenever a file does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from fedhead.data.images import read_image
from fedhead.data.items import Item, Kind
from fedhead.data.samples import Former
from fedhead.data.sounds import read_clip
from fedhead.data.texts import read_text

logger = logging.getLogger(__name__)

READERS: Mapping[Kind, Callable[[Path], Item]] = {"image": read_image, "text": read_text, "audio": read_clip}
"""Functions that read a file as one item, by kind."""


@dataclass(frozen=True)
class Stamp:
    """File metadata that distinguishes a file from other files and from its earlier versions.

    Attributes:
        size: bytes; -1 for a missing file.
        modified: the time of the last change of content, in ns; programs can set it back.
        inode: the identity of the file behind the name.
        changed: the time of the last change of content, name or permissions, in ns; no program can set it.
    """

    size: int
    modified: int = 0
    inode: int = 0
    changed: int = 0

    @property
    def exists(self) -> bool:
        return self.size >= 0

    def __str__(self) -> str:
        return f"{self.size} {self.modified} {self.inode} {self.changed}" if self.exists else ""

    @property
    def former(self) -> str:
        """The stamp used before version 0.2; a file renamed over another could have the same one."""
        return f"{self.size} {self.modified}" if self.exists else ""


def stamp(path: Path | str) -> Stamp:
    """Return a file's stamp; a broken link has one, since it is a row that cannot be read."""
    try:
        try:
            found = Path(path).stat()
        except FileNotFoundError:
            found = Path(path).lstat()
    except (OSError, ValueError):
        return Stamp(-1)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


@dataclass(frozen=True)
class Files:
    """Files by row number.

    Attributes:
        root: the base folder of relative paths.
        paths: `[n]`, with slashes.
        kind: the kind of their content.
    """

    root: Path
    paths: Sequence[str]
    kind: Kind = "image"

    def path(self, row: int) -> Path:
        return self.root / self.paths[row]

    def read(self, row: int) -> Item:
        return READERS[self.kind](self.path(row))

    def name(self, row: int) -> str:
        return str(self.path(row))

    def former(self, fingerprint: str, stamps: Sequence[Stamp]) -> Former:
        """Return the former fingerprint of data in these files.

        Args:
            fingerprint: the fingerprint as the previous version computed it.
            stamps: of the files.
        """
        changed = max((one.changed for one in stamps), default=0)
        return Former(fingerprint, changed, partial(fault_of_tiffs, self.root, tuple(self.paths)))

    def stamps(self) -> list[Stamp]:
        """Return `[n]` stamps."""
        return [stamp(self.path(row)) for row in range(len(self.paths))]


def fault_of_tiffs(root: Path, paths: Sequence[str]) -> str:
    """Return a clause if a TIFF file has 32-bit integers, which earlier versions scaled as 16-bit ones."""
    for path in paths:
        if path.lower().endswith((".tif", ".tiff")):
            try:
                with Image.open(root / path) as image:
                    if image.mode == "I":
                        return "TIFF files of 32-bit integers are converted differently since this version"
            # A file that cannot be opened never had features.
            except Exception as error:
                logger.debug("%s cannot be opened: %s", path, error)
    return ""
