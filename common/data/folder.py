"""`folder:PATH`: a sub-folder of images per class, or of text files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from fedhead.data.images import read_image
from fedhead.data.samples import Kind, Samples, index_names, load_samples, sources
from fedhead.data.texts import read_text
from fedhead.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".dcm", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEXT_SUFFIXES = (".txt",)


@dataclass(frozen=True)
class Files:
    """Files by row number.

    Attributes:
        root: the folder that relative paths start from.
        paths: `[n]`, with slashes.
    """

    root: Path
    paths: Sequence[str]

    def path(self, row: int) -> Path:
        return self.root / self.paths[row]

    def read_image(self, row: int) -> Image.Image:
        return read_image(self.path(row))

    def read_text(self, row: int) -> str:
        return read_text(self.path(row))

    def name(self, row: int) -> str:
        return str(self.path(row))

    def stamp(self, row: int) -> str:
        """Return what changes when the file does, its size and time; nothing if it is missing."""
        path = self.path(row)
        try:
            # A link to nothing is a file that cannot be read, as others are: it is skipped when its turn comes.
            stat = path.stat() if path.exists() else path.lstat()
        except OSError:
            return ""
        return f"{stat.st_size} {stat.st_mtime_ns}"


@sources.register("folder")
def load_folder(argument: str) -> Samples:
    """A folder with a sub-folder of images per class; or where there are none, of text files (.txt)."""
    root = _existing_folder(argument)
    return _samples_of_files(root, _folder_files(root))


def load_sites(spec: str) -> Samples:
    """Load data that says which site holds each row.

    That is `folder:PATH` whose every sub-folder is a site with a sub-folder per class, and any other data whose rows
    name their site, as a table with a column `site` does.

    Raises:
        UserError: if the data does not say so.
    """
    source, _, argument = spec.partition(":")
    if source != "folder":
        samples = load_samples(spec)
        if samples.sites is None:
            raise UserError(
                f"The partition 'folder' takes the sites from the data, but {spec!r} names none. Expected folder:PATH "
                "with a sub-folder per site, or a table with a column 'site' (another one as in ?site=hospital)."
            )
        return samples
    root = _existing_folder(argument)
    files = [file for site in _subfolders(root) for file in _folder_files(site)]
    if not files:
        raise UserError(f"{root} has no sub-folders; the partition 'folder' takes each one as a site.")
    return replace(_samples_of_files(root, files), sites=tuple(file.parent.parent.name for file in files))


def _existing_folder(argument: str) -> Path:
    if not argument:
        raise UserError("Expected a path, as in folder:/data/xrays.")
    root = Path(argument).expanduser()
    if not root.exists():
        raise UserError(f"There is no folder {root}.")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder.")
    return root


def _subfolders(root: Path) -> list[Path]:
    return [path for path in _visible(root) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from None


def _folder_files(root: Path) -> list[Path]:
    """Return the images one folder below `root`, or if there are none the text files."""
    files = [path for folder in _subfolders(root) for path in _visible(folder)]
    for suffixes in (IMAGE_SUFFIXES, TEXT_SUFFIXES):
        if found := [path for path in files if path.suffix.lower() in suffixes]:
            return found
    nested = any(_subfolders(folder) for folder in _subfolders(root))
    advice = " If its sub-folders are sites, say partition = 'folder'." if nested else ""
    raise UserError(
        f"{root} holds no images. Expected a sub-folder per class, each with files such as 1.jpg "
        f"({', '.join(IMAGE_SUFFIXES)}), or texts ({', '.join(TEXT_SUFFIXES)}).{advice}"
    )


def _samples_of_files(root: Path, paths: list[Path]) -> Samples:
    files = Files(root.absolute(), tuple(path.relative_to(root).as_posix() for path in paths))
    kinds: set[Kind] = {"text" if path.suffix.lower() in TEXT_SUFFIXES else "image" for path in paths}
    if len(kinds) == 2:
        raise UserError(f"{root} holds images in some of its folders and texts in others; expected one of them.")
    kind = kinds.pop()
    digest = hashlib.sha256()
    for row, path in enumerate(files.paths):
        digest.update(f"{path}\0{files.stamp(row)}\n".encode(errors="surrogateescape"))
    classes, labels = index_names([path.parent.name for path in paths])
    return Samples(
        spec=f"folder:{root.resolve()}",
        classes=classes,
        labels=labels,
        read=files.read_text if kind == "text" else files.read_image,
        name=files.name,
        fingerprint=digest.hexdigest(),
        kind=kind,
    )
