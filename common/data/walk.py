"""Traversal of folders for data sources and `predict`: the files in them, and the kind of each."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from fedhead.data.items import Kind
from fedhead.data.samples import LeftOut
from fedhead.errors import UserError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".dcm", ".dib", ".dicom", ".gif", ".heic", ".heif", ".ima", ".j2c", ".j2k", ".jfif", ".jp2",
    ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
})
# fmt: on
TEXT_SUFFIXES = frozenset({".txt"})
AUDIO_SUFFIXES = frozenset({".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3"})

SYSTEM_NAMES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "DICOMDIR"})
"""Names of files and folders added by operating systems and archives, except those that begin with a dot."""

_KNOWN_ELSEWHERE = {
    ".svs .ndpi .mrxs .scn .vms .vmu .bif .svslide": "whole-slide images; cut tiles from them first",
    ".nii .nrrd .mha .mhd": "volumes; export their slices as images",
    ".npy .npz .mat .h5 .hdf5": "arrays; load them with npz: or python:",
    ".m4a .aac .wma .aiff .aif .au .amr .caf .webm .mp4 .mov": "sounds in another format; convert them to FLAC or WAV",
}
"""Suffixes of files in unsupported formats, with advice."""

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
_EXAMPLES = 3

FileKind = Literal["image", "text", "audio", "other"]
SUFFIXES: dict[Kind, frozenset[str]] = {"image": IMAGE_SUFFIXES, "text": TEXT_SUFFIXES, "audio": AUDIO_SUFFIXES}
"""Suffixes of files that are one item each, by kind."""


def files_below(root: Path, ignored: list[str] | None = None) -> Iterator[Path]:
    """Yield all files below a folder by name, except system files and hidden ones.

    Links to folders are followed, each folder once.

    Args:
        root: the folder.
        ignored: collects the paths of hidden and system files and folders.

    Raises:
        UserError: if a folder cannot be read.
    """
    visited: set[tuple[int, int]] = set()

    def walk(folder: Path) -> Iterator[Path]:
        try:
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in visited:
                return
            visited.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(((entry.name, entry.is_dir()) for entry in entries), key=lambda one: one[0])
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}.") from None
        for name, is_folder in found:
            path = folder / name
            if is_of_system(name):
                if ignored is not None:
                    ignored.append(str(path))
            elif is_folder:
                yield from walk(path)
            else:
                yield path

    yield from walk(root)


def is_of_system(name: str) -> bool:
    """Return whether a name is hidden, or added by an operating system or archive program."""
    return name.startswith(".") or name in SYSTEM_NAMES


def kind_of_file(path: Path) -> FileKind:
    """Return the kind of a file by its suffix, or without one by its first bytes, as for many DICOM files."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in AUDIO_SUFFIXES:
        return "audio"
    # DICOM files are often named by dotted numbers.
    if suffix.removeprefix(".").isdigit() or not suffix:
        return "image" if _begins_like_an_image(path) else "other"
    return "other"


def _begins_like_an_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except (OSError, ValueError):
        return False
    if start[128:] == b"DICM" or start.startswith(_MAGIC):
        return True
    return (start.startswith(b"RIFF") and start[8:12] == b"WEBP") or start[4:12] in (b"ftypavif", b"ftypheic")


def other_files(paths: Iterable[Path], wanted: str) -> list[LeftOut]:
    """Return the files of other kinds, grouped by the reason.

    Args:
        paths: the files.
        wanted: "images", "texts" or "clips".
    """
    by_reason: dict[str, list[Path]] = {}
    for path in paths:
        suffix = path.suffix.lower()
        known = (words for suffixes, words in _KNOWN_ELSEWHERE.items() if suffix in suffixes.split())
        reason = next(known, "")
        by_reason.setdefault(reason or f"not {wanted}", []).append(path)
    return [left_out(found, reason, by_suffix=True) for reason, found in by_reason.items()]


def left_out(paths: Sequence[Path | str], reason: str, *, by_suffix: bool = False, warned: bool = True) -> LeftOut:
    """Return a record of unused files, with a few of them as examples.

    Args:
        paths: the files.
        reason: the reason in a few words.
        by_suffix: whether to count the suffixes.
        warned: whether loading the data logs a warning.
    """
    if by_suffix:
        counts = Counter(Path(path).suffix.lower() or "without suffix" for path in paths)
        reason += f"; {', '.join(f'{count} {suffix}' for suffix, count in counts.most_common(6))}"
    examples = tuple(map(str, paths[:_EXAMPLES]))
    return LeftOut(len(paths), "files" if len(paths) > 1 else "file", reason, examples, warned)
