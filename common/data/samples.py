"""Samples: labelled rows that are read one at a time, whatever holds them; what every source gives."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.errors import FedheadError, UserError
from fedhead.registry import Registry, suggest

logger = logging.getLogger(__name__)

Kind = Literal["image", "text"]
IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]
Item = Image.Image | str
"""What a row holds: an image of mode L or RGB, or a text."""

GROUP = "fedhead.group"
"""Under this name an image's `info` says what group its own file puts it in (the patient of a DICOM file)."""
MODE = "fedhead.mode"
"""Under this name an image's `info` says what mode it was stored in, where that is another one than its own."""

sources: Registry[Callable[[str], "Samples"]] = Registry(
    "data source",
    {
        "csv": "fedhead.data.tables",
        "digits": "fedhead.data.arrays",
        "folder": "fedhead.data.folder",
        "hf": "fedhead.data.hub",
        "jsonl": "fedhead.data.tables",
        "npz": "fedhead.data.npz",
        "parquet": "fedhead.data.tables",
        "python": "fedhead.data.python",
        "torchvision": "fedhead.data.torchvision",
    },
)


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
        groups: for each row what it must not be parted from by the held-out split (a patient, a writer); None where
            that is only its own content.
        sites: for each row the site that holds it, where the data says so.
        splits: for each row the part of the data that it belongs to (train, test), where the data says so.
        kind: what `read` returns.
    """

    spec: str
    classes: tuple[str, ...]
    labels: IntArray
    read: Callable[[int], Item]
    name: Callable[[int], str]
    fingerprint: str
    groups: Sequence[str | None] | None = None
    sites: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    kind: Kind = "image"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have any number of classes, none included."""
        return self.labels.ndim == 2

    def key(self, row: int, item: Item) -> int:
        """Return the 64-bit identity by which `row` is held out: its group's, or else its content's.

        It is the same in a folder, a table and an archive, since images are told apart by their pixels.
        """
        group = self.group(row, item)
        if group is None:
            return content_key(item)
        return int.from_bytes(hashlib.blake2b(f"group {group}".encode(), digest_size=8).digest(), "little")

    def group(self, row: int, item: Item) -> str | None:
        """Return the group of `row`: the one that the data names, or else the one that its own file does."""
        if self.groups is not None and self.groups[row] is not None:
            return self.groups[row]
        return None if isinstance(item, str) else item.info.get(GROUP)


def content_key(item: Item) -> int:
    """Return the 64-bit identity of an image's mode, size and pixels, or of a text."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, str):
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
    samples = sources[source](argument)
    for names in similar_names(samples.classes):
        logger.warning(
            "The classes %s of %s differ only by case or spaces; they are taken for different classes.",
            " and ".join(map(repr, names)),
            spec,
        )
    return samples


def similar_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the names that differ only by case or spaces, together."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    return [tuple(together) for together in alike.values() if len(together) > 1]


def split_options(argument: str, known: Collection[str], spec: str) -> tuple[str, dict[str, str]]:
    """Part `PATH?name=value&name=value` into what stands before the question mark and the options after it.

    Args:
        argument: of a data spec.
        known: the options that the source takes; empty for any.
        spec: the whole spec, for messages.

    Raises:
        UserError: for an option without a value, given twice, or not known.
    """
    before, _, query = argument.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{spec} has the option {part!r}; expected name=value, as in ?split=train&label=category.")
        if known and name not in known:
            raise UserError(f"{spec} has an unknown option {name!r}. {suggest(name, sorted(known))}")
        if name in options:
            raise UserError(f"{spec} gives the option {name!r} twice.")
        options[name] = value
    return before, options


def local_path(spec: str) -> Path | None:
    """Return the file or folder that a data spec names, resolved; None if it names none that is there."""
    argument = spec.partition(":")[2]
    for given in (argument, argument.partition("?")[0]):
        if given and (path := Path(given).expanduser()).exists():
            return path.resolve()
    return None


def class_names(values: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names in their order: numbers by value, if all are numbers, or else alphabetically.

    So a folder, a table and an array of the same labels give the same classes in the same order.
    """
    distinct = set(values)
    if all(value.isascii() and value.removeprefix("-").isdigit() for value in distinct):
        return tuple(sorted(distinct, key=lambda value: (int(value), value)))
    return tuple(sorted(distinct))


def index_names(names: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """Return `class_names` and each name's index in them, `[n]`."""
    classes = class_names(names)
    index = {name: label for label, name in enumerate(classes)}
    return classes, np.fromiter((index[name] for name in names), dtype=np.int64, count=len(names))


def mark_names(names: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], IntArray]:
    """Return `class_names` and for each row which of them it has, `[n, C]` of 0 and 1."""
    classes = class_names(name for row in names for name in row)
    index = {name: label for label, name in enumerate(classes)}
    marked = np.zeros((len(names), len(classes)), dtype=np.int64)
    for row, having in enumerate(names):
        marked[row, [index[name] for name in having]] = 1
    return classes, marked


def choose_split(splits: Sequence[str], wanted: str | None, spec: str) -> IntArray:
    """Return the rows of the wanted parts of the data, all of them if none is asked for.

    Args:
        splits: `[n]`, the part that each row belongs to.
        wanted: names with commas between, or None.
        spec: what the data was loaded from, for messages.

    Raises:
        UserError: if there is no such part.
    """
    present = sorted(set(splits))
    if wanted is None:
        if len(present) > 1:
            logger.warning(
                "%s has the splits %s, and all rows are taken; choose one, as in ?split=%s.",
                spec,
                ", ".join(present),
                present[0],
            )
        return np.arange(len(splits))
    chosen = [name.strip() for name in wanted.split(",")]
    for name in chosen:
        if name not in present:
            raise UserError(f"{spec} has no rows of the split {name!r}. {suggest(name, present)}")
    kept = set(chosen)
    return np.flatnonzero(np.fromiter((split in kept for split in splits), dtype=np.bool_, count=len(splits)))


def require_labels(samples: Samples, multi_label: bool) -> None:
    """Check that data is labelled as a run needs it.

    Raises:
        UserError: if it is multi-label and the run is not, or the reverse. It names no file.
    """
    if multi_label and not samples.multi_label:
        raise UserError(
            "This run is multi-label, but its data names one class per row. Label each row with a list of classes, or "
            "all of them with 0 and 1 as [rows, classes], or say what parts the labels of a table, as in "
            "'csv:FILE?separator=;'; or run without --multi-label."
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
            alike = [other for other in classes if len(similar_names((name, other))) == 1]
            hint = f" It differs from {alike[0]!r} only by case or spaces: make them equal." if alike else ""
            raise UserError(
                f"{samples.name(row)} is of class {name!r}, which this run does not know. "
                f"Its classes are: {', '.join(classes)}.{hint}"
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
    equal content or group never straddle.

    Args:
        keys: `[n]` 64-bit row keys.
        share: the expected share of rows, in 0..1.
        seed: the run's.
    """
    start = int.from_bytes(hashlib.blake2b(f"held out {seed}".encode(), digest_size=8).digest(), "little")
    mixed = mix(keys ^ np.uint64(start))
    below: BoolArray = (mixed >> np.uint64(11)) < np.uint64(share * 2**53)
    return below


def mix(keys: KeyArray) -> KeyArray:
    """Return 64-bit numbers that look random, one for one: SplitMix64's mixing (Steele, Lea & Flood, OOPSLA 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    mixed: KeyArray = keys ^ (keys >> np.uint64(31))
    return mixed


def index_labels(labels: Any, classes: Sequence[str] | None, spec: str) -> tuple[tuple[str, ...], IntArray]:
    """Return class names, and labels `[n]` or `[n, C]` that index them, of labels as `samples_from_arrays` takes them.

    Raises:
        UserError: if there are no rows, they are not labelled alike, or a label names no class.
    """
    dimensions = {np.ndim(label) for label in labels}
    if dimensions == {1}:
        return _mark_labels([np.asarray(label) for label in labels], classes, spec)
    if dimensions - {0}:
        raise UserError(f"{spec} does not label its rows alike; expected one label a row, or a list for every row.")
    labels = np.asarray(labels)
    if len(labels) == 0:
        raise UserError(f"{spec} holds no rows.")
    if classes is None:
        if labels.dtype.kind == "U":
            return index_names(labels.tolist())
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
    if classes is None and named and all(isinstance(value, str) for value in named):
        return mark_names([label.tolist() for label in labels])
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
