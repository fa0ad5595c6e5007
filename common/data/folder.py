"""`folder:PATH`: a sub-folder of images, sounds or text files per class."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedhead.data.files import Files
from fedhead.data.items import ITEMS, Kind
from fedhead.data.labels import UNLABELLED, index_names, name_of
from fedhead.data.samples import LeftOut, Samples, look_up, sources, warn_of
from fedhead.data.sounds import require_soundfile
from fedhead.data.specs import join_options, split_options, to_path, without_labels
from fedhead.data.walk import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    files_below,
    is_of_system,
    kind_of_file,
    left_out,
    other_files,
)
from fedhead.errors import UserError
from fedhead.wording import listed

_KINDS: tuple[Literal["image", "audio", "text"], ...] = ("image", "audio", "text")
"""Kinds of files, in the order of preference."""


@sources.register("folder")
def load_folder(argument: str) -> Samples:
    """A folder with a sub-folder per class of images or sounds, or without these, of text files (.txt).

    `kind=image`, `audio` or `text` chooses if there are several. Files in deeper folders belong to the class of the
    top-level one, unless `nested=no`. If all files are deeper, the top-level folders may be sites or splits, and only
    `nested=yes` accepts them as classes. With `labels=no` the files have no classes, and may be in any folder.
    """
    return _load(argument, sites=False)


def load_sites(spec: str) -> Samples:
    """Load data that names the site of each row, and log ignored parts; see `look_up_sites`."""
    samples = look_up_sites(spec)
    warn_of(samples)
    return samples


def look_up_sites(spec: str) -> Samples:
    """Load data that names the site of each row.

    This is `folder:PATH` with a sub-folder per site that has a sub-folder per class, or other data with a site for
    each row, such as a table with a column `site`.

    Raises:
        UserError: if the data names no sites.
    """
    source, _, argument = spec.partition(":")
    if source != "folder":
        samples = look_up(spec)
        if samples.sites is None:
            raise UserError(
                f"The partition 'folder' takes the sites from the data, but {spec!r} names none. Expected folder:PATH "
                "with a sub-folder per site, or a table with a column 'site' (for another name, ?site=hospital)."
            )
        return samples
    return _load(argument, sites=True)


def _load(argument: str, *, sites: bool) -> Samples:
    spec = f"folder:{argument}"
    given, options = split_options(argument, {"kind", "labels", "nested"}, spec)
    nested = options.get("nested")
    if nested not in (None, "yes", "no"):
        raise UserError(f"The option nested of {spec!r} is yes or no, not {nested!r}.")
    kind = options.get("kind")
    if kind not in (None, *_KINDS):
        raise UserError(f"The option kind of {spec!r} is image, audio or text, not {kind!r}.")
    root = _existing_folder(given)
    depth = 1 if sites else 0
    unlabelled = without_labels(options, spec)
    found = _find_all(root, depth, kind) if unlabelled else _find(root, depth, nested, kind)
    if found.kind == "audio":
        require_soundfile(f"The data {spec!r}")
    samples = _samples_of_files(root, found.kind, found.paths, depth=None if unlabelled else depth)
    if sites:
        samples = replace(samples, sites=tuple(name_of(path.relative_to(root).parts[0]) for path in found.paths))
    return replace(
        samples,
        spec=f"folder:{join_options(str(root.resolve()), options)}",
        left_out=tuple(found.left_out),
        cautions=tuple(found.cautions),
    )


def _existing_folder(argument: str) -> Path:
    if not argument:
        raise UserError("Expected a path, as in folder:/data/xrays.")
    root = to_path(argument)
    if not root.exists():
        raise UserError(f"There is no folder {root}.")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder.")
    return root


@dataclass(frozen=True)
class _Found:
    """The files of a folder.

    Attributes:
        kind: the kind of the files to use.
        paths: the files to use.
        left_out: all other files.
        cautions: sentences on ambiguous paths and their interpretation.
    """

    kind: Kind
    paths: list[Path]
    left_out: list[LeftOut]
    cautions: list[str]


def _find(root: Path, depth: int, nested: str | None, wanted: str | None) -> _Found:
    """Find the files to use; the folder number `depth` of the path below `root` names the class."""
    ignored: list[str] = []
    files = list(files_below(root, ignored))
    kinds = {path: kind_of_file(path) for path in files}
    level = {path: len(path.relative_to(root).parts) - depth - 2 for path in files}
    both: dict[Kind, tuple[list[Path], list[Path]]] = {}
    for kind in _KINDS if wanted is None else [one for one in _KINDS if one == wanted]:
        direct = [path for path in files if kinds[path] == kind and level[path] == 0]
        deeper = [path for path in files if kinds[path] == kind and level[path] > 0]
        if direct or (deeper and nested == "yes"):
            both[kind] = direct, deeper
    if not both:
        usable = [path for path in files if (kinds[path] == wanted if wanted else kinds[path] != "other")]
        raise UserError(_nothing_found(root, files, usable, depth, wanted))
    if {"image", "audio"} <= both.keys():
        counts = " and ".join(f"{sum(map(len, both[one]))} {ITEMS[one]}" for one in ("image", "audio"))
        raise UserError(
            f"The folders of classes in {root} have {counts}; expected one kind. Separate them, or choose one as in "
            "?kind=audio."
        )
    found, (direct, deeper) = next(iter(both.items()))
    taken = set(direct) if nested == "no" else {*direct, *deeper}
    paths = [path for path in files if path in taken]
    words = ITEMS[found]
    above = [path for path in files if kinds[path] == found and level[path] < 0]
    left, cautions = [], []
    if above:
        left.append(left_out(above, "not in a class folder"))
    if deeper and nested == "no":
        left.append(left_out(deeper, "in deeper folders, by nested=no"))
    elif deeper:
        cautions.append(_nested_caution(root, deeper, len(paths), depth, words))
    used = {path.relative_to(root).parts[: depth + 1] for path in paths}
    if empty := [folder for folder in _class_folders(root, depth) if folder.relative_to(root).parts not in used]:
        left.append(
            LeftOut(
                len(empty),
                "folders of classes" if len(empty) > 1 else "folder of a class",
                f"no {words} in them",
                tuple(map(str, empty[:3])),
            )
        )
    left += other_files([path for path in files if kinds[path] != found], words)
    if ignored:
        left.append(left_out(ignored, "hidden or of the system", warned=False))
    return _Found(found, paths, left, cautions)


def _find_all(root: Path, depth: int, wanted: str | None) -> _Found:
    """Find all files of the wanted kind, or of the first kind there is, `depth` folders or more below `root`."""
    ignored: list[str] = []
    files = list(files_below(root, ignored))
    for kind in _KINDS:
        paths = [path for path in files if kind_of_file(path) == kind and len(path.relative_to(root).parts) > depth]
        if paths and wanted in (None, kind):
            break
    else:
        where = "the sub-folders of " if depth else ""
        raise UserError(f"There are no {wanted or 'image, audio or text'} files in {where}{root}.")
    taken = set(paths)
    left = other_files([path for path in files if path not in taken], ITEMS[kind])
    if ignored:
        left.append(left_out(ignored, "hidden or of the system", warned=False))
    return _Found(kind, paths, left, [])


def _class_folders(root: Path, depth: int) -> list[Path]:
    """Return the folders that name classes, excluding system folders and hidden ones."""
    folders = [root]
    for _ in range(depth + 1):
        below = [path for folder in folders for path in folder.iterdir() if path.is_dir()]
        folders = sorted(path for path in below if not is_of_system(path.name))
    return folders


def _nested_caution(root: Path, deeper: Sequence[Path], taken: int, depth: int, words: str) -> str:
    folders = sorted({path.parent.relative_to(root).as_posix() for path in deeper})
    classes = sorted({path.relative_to(root).parts[depth] for path in deeper})
    return (
        f"{len(deeper)} of {taken} {words} are in deeper folders ({listed(folders, 3)}); each belongs to the class of "
        f"its top-level folder ({', '.join(classes[:3])}{' ...' if len(classes) > 3 else ''}). Exclude them with "
        "?nested=no; if the top-level folders are sites, use partition = 'folder'."
    )


def _nothing_found(root: Path, files: Sequence[Path], usable: Sequence[Path], depth: int, wanted: str | None) -> str:
    words = next((ITEMS[kind] for kind in _KINDS if kind == wanted), "images")
    deeper = [path for path in usable if len(path.relative_to(root).parts) > depth + 2]
    if deeper:
        example = deeper[0].relative_to(root).as_posix()
        return (
            f"{root} has no {words} in a sub-folder per class: all {len(deeper)} files are deeper, such as {example}. "
            "If its sub-folders are sites, use partition = 'folder' (in fedhead data --by-site); if they are splits, "
            f"name one, as in folder:{root / deeper[0].relative_to(root).parts[0]}; if they are classes, ?nested=yes."
        )
    there = ""
    if usable:
        there = f" Its {len(usable)} images, clips or texts are not in class folders, such as {usable[0].name}."
    elif files:
        there = f" It has {len(files)} other files, such as {files[0].relative_to(root).as_posix()}."
    site = "a sub-folder per site with a sub-folder per class" if depth else "a sub-folder per class"
    found = f"has no {words} in the expected structure:" if files else "is empty; expected"
    return (
        f"{root} {found} {site}, each with files such as 1.jpg "
        f"({', '.join(sorted(IMAGE_SUFFIXES))}), sounds ({', '.join(sorted(AUDIO_SUFFIXES))}) or texts "
        f"({', '.join(TEXT_SUFFIXES)}).{there}"
    )


def _samples_of_files(root: Path, kind: Kind, paths: list[Path], *, depth: int | None) -> Samples:
    """Return the samples; the folder number `depth` of a path names its class, or None for no labels."""
    files = Files(root.absolute(), tuple(path.relative_to(root).as_posix() for path in paths), kind)
    stamps = files.stamps()
    names = [UNLABELLED if depth is None else name_of(path.relative_to(root).parts[depth]) for path in paths]
    classes, labels = index_names(names)
    return Samples(
        spec=f"folder:{root.resolve()}",
        classes=classes,
        labels=labels,
        read=files.read,
        name=files.name,
        fingerprint=_fingerprint(files.paths, map(str, stamps)),
        kind=kind,
        former=files.former(_fingerprint(files.paths, [one.former for one in stamps]), stamps),
    )


def _fingerprint(paths: Sequence[str], stamps: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path, one in zip(paths, stamps, strict=True):
        digest.update(f"{path}\0{one}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
