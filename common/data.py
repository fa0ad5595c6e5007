"""Data specs to samples: `digits`, `folder:PATH`, `python:MODULE:FUNCTION`, or a source users register.

Labels are known at once; images and texts are read one at a time, when asked for.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fedhead.errors import FedheadError, UserError
from fedhead.registry import Registry

Item = Image.Image | str
Kind = Literal["image", "text"]
IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

sources: Registry[Callable[[str], "Samples"]] = Registry("data source")


class UnreadableSampleError(FedheadError):
    """One sample cannot be read; the others can."""


@dataclass(frozen=True)
class Samples:
    """A data set of `n` labelled images, or of `n` labelled texts.

    Attributes:
        spec: what it was loaded from.
        classes: the names that `labels` index.
        labels: `[n]` int64; or for multi-label rows `[n, C]` int64, 1 for each class that a row has and else 0.
        read: row number to image or text; raises `UnreadableSampleError`.
        name: row number to what a person would call the row.
        fingerprint: changes whenever labels or content may have changed.
        groups: for each row what it must not be parted from by the held-out split (a patient, a writer).
        sites: for each row the site that holds it, where the data says so.
        kind: what `read` returns.
    """

    spec: str
    classes: tuple[str, ...]
    labels: IntArray
    read: Callable[[int], Item]
    name: Callable[[int], str]
    fingerprint: str
    groups: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None
    kind: Kind = "image"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have any number of classes, none included."""
        return self.labels.ndim == 2

    def key(self, row: int, item: Item) -> int:
        """Return the 64-bit identity by which `row` is held out: its group's, or else its content's."""
        digest = hashlib.blake2b(digest_size=8)
        if self.groups is not None:
            digest.update(f"group {self.groups[row]}".encode())
        elif isinstance(item, str):
            digest.update(b"text ")
            digest.update(item.encode(errors="surrogatepass"))
        else:
            digest.update(f"{item.mode} {item.size}".encode())
            digest.update(item.tobytes())
        return int.from_bytes(digest.digest(), "little")


def load_samples(spec: str) -> Samples:
    """Load what a data spec `source:argument` names.

    Raises:
        UserError: for an unknown source, a path that is missing or empty, or an argument that does not fit.
    """
    source, _, argument = spec.partition(":")
    return sources[source](argument)


def load_sites(spec: str) -> Samples:
    """Load `folder:PATH` whose every sub-folder is a site with a sub-folder per class.

    Raises:
        UserError: if the spec is of another source or the folders are not laid out so.
    """
    source, _, argument = spec.partition(":")
    if source != "folder":
        raise UserError(f"The partition 'folder' needs data 'folder:PATH', not {spec!r}.")
    root = _existing_folder(argument)
    parts = [_folder_files(site) for site in _subfolders(root)]
    if not parts:
        raise UserError(f"{root} has no sub-folders; the partition 'folder' takes each one as a site.")
    files = [file for part in parts for file in part]
    classes = tuple(sorted({file.parent.name for file in files}))
    sites = tuple(file.parent.parent.name for file in files)
    return replace(_samples_of_files(root, files, classes), sites=sites)


def require_labels(samples: Samples, multi_label: bool) -> None:
    """Check that data is labelled as a run needs it.

    Raises:
        UserError: if it is multi-label and the run is not, or the reverse. It names no file.
    """
    if multi_label and not samples.multi_label:
        raise UserError(
            "This run is multi-label, but its data names one class per row. Label each row with a list of classes, or "
            "all of them with 0 and 1 as [rows, classes]; or run without --multi-label."
        )
    if samples.multi_label and not multi_label:
        raise UserError("This run takes one class per row, but its data names several: run it with --multi-label.")


def require_kind(backbone: str, takes: Kind, held: Kind) -> None:
    """Check that data is what a backbone takes.

    Args:
        backbone: its spec, for the message.
        takes: the backbone's kind.
        held: the data's kind.

    Raises:
        UserError: if they differ. It names no file.
    """
    if takes != held:
        advice = {
            "image": "Take a text backbone, such as hf:NAME or vectors:FILE.",
            "text": "Take an image backbone, such as torchvision:resnet18.",
        }[takes]
        raise UserError(f"The backbone {backbone} takes {takes}s, but the data holds {held}s. {advice}")


def relabel(samples: Samples, classes: Sequence[str]) -> IntArray:
    """Return labels for `classes`, of which the samples may hold any subset: `[n]` or, if multi-label, `[n, C]`.

    Raises:
        UserError: if a sample's class is not among `classes`, with its name and the known ones.
    """
    known = {name: index for index, name in enumerate(classes)}
    held = np.flatnonzero(samples.labels.any(0)) if samples.multi_label else np.unique(samples.labels)
    for label in held:
        if (name := samples.classes[label]) not in known:
            having = samples.labels[:, label] if samples.multi_label else samples.labels == label
            row = int(np.flatnonzero(having)[0])
            raise UserError(
                f"{samples.name(row)} is of class {name!r}, which this run does not know. "
                f"Its classes are: {', '.join(classes)}."
            )
    if samples.multi_label:
        ordered = np.zeros((len(samples), len(classes)), dtype=np.int64)
        ordered[:, [known[samples.classes[label]] for label in held]] = samples.labels[:, held]
        return ordered
    table = np.full(len(samples.classes), -1, dtype=np.int64)
    table[held] = [known[samples.classes[label]] for label in held]
    return table[samples.labels]


def held_out(keys: KeyArray, share: float, seed: int) -> BoolArray:
    """Return which rows are held out: those with `hash(seed, key) < share`.

    The choice depends on nothing but a row's own key, so it is the same under any partition, and rows of
    equal content or group never straddle. Mixing is SplitMix64's (Steele, Lea & Flood, OOPSLA 2014).

    Args:
        keys: `[n]` 64-bit row keys.
        share: the expected share of rows, in 0..1.
        seed: the run's.
    """
    start = int.from_bytes(hashlib.blake2b(f"held out {seed}".encode(), digest_size=8).digest(), "little")
    mixed = keys ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    below: BoolArray = (mixed >> np.uint64(11)) < np.uint64(share * 2**53)
    return below


@sources.register("digits")
def load_digits(argument: str) -> Samples:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 grey levels (Alpaydin & Kaynak, 1998)."""
    if argument:
        raise UserError(f"The data 'digits' takes no argument, but was given {argument!r}.")
    from sklearn.datasets import load_digits as load

    bunch = load()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return samples_from_arrays(pixels, bunch.target, classes=tuple(map(str, range(10))), spec="digits")


@sources.register("folder")
def load_folder(argument: str) -> Samples:
    """A folder with a sub-folder of images per class."""
    root = _existing_folder(argument)
    files = _folder_files(root)
    return _samples_of_files(root, files, tuple(sorted({file.parent.name for file in files})))


@sources.register("python")
def load_python(argument: str) -> Samples:
    """What a function of the user's returns: `(images, labels)`, `Samples`, or a sized data set of pairs.

    A data set (such as torchvision's) is indexed for `(image, label)`; its `classes` and `groups` are used
    where it has them. Images are PIL images, uint8 arrays `[H, W]` or `[H, W, 3]`, float arrays in 0..1, or
    tensors `[C, H, W]`; texts are strings, and stand in the place of images. Multi-label rows are labelled as
    `samples_from_arrays` says.
    """
    module_name, _, function_name = argument.partition(":")
    if not module_name or not function_name:
        raise UserError(f"Expected python:MODULE:FUNCTION, not 'python:{argument}'.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"The module of 'python:{argument}' cannot be imported: {error}.") from error
    except AttributeError:
        raise UserError(f"The module {module_name!r} has no function {function_name!r}.") from None
    loaded = function()
    if isinstance(loaded, Samples):
        return replace(loaded, spec=f"python:{argument}")
    if isinstance(loaded, tuple) and len(loaded) == 2:
        items, labels = loaded
        if len(items) and isinstance(items[0], str):
            return samples_from_texts(items, labels, spec=f"python:{argument}")
        return samples_from_arrays(items, labels, spec=f"python:{argument}")
    if hasattr(loaded, "__getitem__") and hasattr(loaded, "__len__"):
        return _samples_of_pairs(loaded, f"python:{argument}")
    raise UserError(
        f"'python:{argument}' returned {type(loaded).__name__}; expected (images, labels), (texts, labels) or a data "
        "set with a length, indexed for (image, label) or (text, label)."
    )


def samples_from_arrays(
    images: Any, labels: Any, *, classes: Sequence[str] | None = None, spec: str = "arrays"
) -> Samples:
    """Wrap images and labels held in memory.

    Args:
        images: `[n, H, W]` or `[n, H, W, 3]` uint8 or 0..1 floats, `[n, C, H, W]` tensors, or a list of images.
        labels: `[n]` integers that index `classes`, or class names. For multi-label rows `[n, C]` of 0 and 1, or for
            each row a sequence of the classes that it has, by name or index, perhaps none.
        classes: the class names; by default the labels' own values in order, and the columns' numbers for `[n, C]`.
        spec: what messages call the data.

    Raises:
        UserError: if there are no rows, the lengths differ, or a label names no class.
    """
    if len(images) != len(labels):
        raise UserError(f"{spec} has {len(images)} images but {len(labels)} labels.")
    classes, indices = _index_labels(labels, classes, spec)
    digest = hashlib.sha256(repr(classes).encode())
    digest.update(indices.tobytes())
    for image in images:
        _digest_image(digest, image)
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=lambda row: to_image(images[row], f"{spec}[{row}]"),
        name=lambda row: f"{spec}[{row}]",
        fingerprint=digest.hexdigest(),
    )


def samples_from_texts(
    texts: Sequence[str], labels: Any, *, classes: Sequence[str] | None = None, spec: str = "texts"
) -> Samples:
    """Wrap texts and labels held in memory.

    Args:
        texts: `n` strings.
        labels: see `samples_from_arrays`.
        classes: see `samples_from_arrays`.
        spec: what messages call the data.

    Raises:
        UserError: if there are no rows, the lengths differ, a text is none, or a label names no class.
    """
    if len(texts) != len(labels):
        raise UserError(f"{spec} has {len(texts)} texts but {len(labels)} labels.")
    classes, indices = _index_labels(labels, classes, spec)
    digest = hashlib.sha256(repr(classes).encode())
    digest.update(indices.tobytes())
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{spec}[{row}] is {type(text).__name__}, not a text like the first row.")
        _digest_text(digest, text)
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=lambda row: texts[row],
        name=lambda row: f"{spec}[{row}]",
        fingerprint=digest.hexdigest(),
        kind="text",
    )


def to_image(value: Any, name: str) -> Image.Image:
    """Turn a PIL image, an array or a tensor into a PIL image of mode L or RGB.

    Raises:
        UnreadableSampleError: if its shape or its values are not an image's.
    """
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise UnreadableSampleError(f"{name} has shape {list(array.shape)}, which is not a grey or colour image's.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UnreadableSampleError(f"{name} has values outside 0..1 (or not finite), as floats must be.")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableSampleError(f"{name} has values of type {array.dtype}; expected uint8, or floats in 0..1.")
    return Image.fromarray(np.ascontiguousarray(array))


def read_image(path: Path) -> Image.Image:
    """Decode an image file whole, turned as its EXIF data says.

    Raises:
        UnreadableSampleError: if it is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # Pillow's decoders raise nearly anything on damaged input.
    except Exception as error:
        raise UnreadableSampleError(f"{path} cannot be read as an image: {error}.") from error


def read_text(path: Path) -> str:
    """Read a file whole, as one text in UTF-8.

    Raises:
        UnreadableSampleError: if it is missing or in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnreadableSampleError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(f"{path} is not a text in UTF-8 (byte {error.start}); save it as such.") from None


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
    files = [path for folder in _subfolders(root) for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        nested = any(_subfolders(folder) for folder in _subfolders(root))
        advice = " If its sub-folders are sites, say partition = 'folder'." if nested else ""
        raise UserError(
            f"{root} holds no images. Expected a sub-folder per class, each with files such as 1.jpg "
            f"({', '.join(IMAGE_SUFFIXES)}).{advice}"
        )
    return files


def _samples_of_files(root: Path, files: list[Path], classes: tuple[str, ...]) -> Samples:
    digest = hashlib.sha256()
    for file in files:
        # A link to nothing is a file that cannot be read, as others are: it is skipped when its turn comes.
        stat = file.stat() if file.exists() else file.lstat()
        digest.update(f"{file.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    index = {name: label for label, name in enumerate(classes)}
    return Samples(
        spec=f"folder:{root.resolve()}",
        classes=classes,
        labels=np.array([index[file.parent.name] for file in files], dtype=np.int64),
        read=lambda row: read_image(files[row]),
        name=lambda row: str(files[row]),
        fingerprint=digest.hexdigest(),
    )


def _samples_of_pairs(pairs: Any, spec: str) -> Samples:
    """Wrap a data set of `(image, label)` or `(text, label)`; one pass reads labels and content."""
    labels = []
    kinds: set[Kind] = set()
    digest = hashlib.sha256()
    for row in range(len(pairs)):
        item, label = pairs[row]
        labels.append(label)
        kinds.add("text" if isinstance(item, str) else "image")
        if isinstance(item, str):
            _digest_text(digest, item)
        else:
            _digest_image(digest, item)
    if len(kinds) == 2:
        raise UserError(f"{spec} holds images and texts; expected one of them.")
    classes, indices = _index_labels(labels, getattr(pairs, "classes", None), spec)
    groups = getattr(pairs, "groups", None)
    digest.update(repr((classes, labels, groups)).encode())
    kind = kinds.pop()
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=lambda row: pairs[row][0] if kind == "text" else to_image(pairs[row][0], f"{spec}[{row}]"),
        name=lambda row: f"{spec}[{row}]",
        fingerprint=digest.hexdigest(),
        groups=None if groups is None else tuple(map(str, groups)),
        kind=kind,
    )


def _digest_text(digest: "hashlib._Hash", text: str) -> None:
    content = text.encode(errors="surrogatepass")
    digest.update(f"text {len(content)} ".encode())
    digest.update(content)


def _digest_image(digest: "hashlib._Hash", image: Any) -> None:
    array = np.asarray(image)
    digest.update(f"{getattr(image, 'mode', '')} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())


def _index_labels(labels: Any, classes: Sequence[str] | None, spec: str) -> tuple[tuple[str, ...], IntArray]:
    dimensions = {np.ndim(label) for label in labels}
    if dimensions == {1}:
        return _mark_labels([np.asarray(label) for label in labels], classes, spec)
    if dimensions - {0}:
        raise UserError(f"{spec} does not label its rows alike; expected one label a row, or a list for every row.")
    labels = np.asarray(labels)
    if len(labels) == 0:
        raise UserError(f"{spec} holds no rows.")
    if classes is None:
        values, indices = np.unique(labels, return_inverse=True)
        return tuple(map(str, values.tolist())), indices.astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise UserError(f"{spec} names its classes, so its labels must be their indices, not {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{spec} has labels from {labels.min()} to {labels.max()} for {len(classes)} classes.")
    return tuple(map(str, classes)), labels.astype(np.int64)


def _mark_labels(
    labels: list[npt.NDArray[Any]], classes: Sequence[str] | None, spec: str
) -> tuple[tuple[str, ...], IntArray]:
    """Return classes, and labels `[n, C]` of 0 and 1, of rows that are labelled so or by the classes they have."""
    width = len(labels[0]) if classes is None else len(classes)
    if width > 1 and all(label.shape == (width,) and np.isin(label, (0, 1)).all() for label in labels):
        return tuple(map(str, range(width) if classes is None else classes)), np.stack(labels).astype(np.int64)
    named = [value for label in labels for value in label.tolist()]
    if classes is None:
        values, columns = np.unique(np.array(named), return_inverse=True)
        classes = tuple(map(str, values.tolist()))
    else:
        columns = _columns(named, classes, spec)
    marked = np.zeros((len(labels), len(classes)), dtype=np.int64)
    marked[np.repeat(np.arange(len(labels)), [len(label) for label in labels]), columns] = 1
    return tuple(map(str, classes)), marked


def _columns(named: list[Any], classes: Sequence[str], spec: str) -> IntArray:
    known: dict[Any, int] = {index: index for index in range(len(classes))}
    known.update((str(name), index) for index, name in enumerate(classes))
    if unknown := [value for value in named if value not in known]:
        raise UserError(
            f"{spec} has a row of class {unknown[0]!r}, which is none of its classes ({', '.join(map(str, classes))}) "
            "nor the index of one."
        )
    return np.array([known[value] for value in named], dtype=np.int64)
