"""Samples: labelled rows that are read one at a time; every source returns these."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhead.data.items import (
    GROUP,
    ITEMS,
    BoolArray,
    Clip,
    FloatArray,
    IntArray,
    Item,
    KeyArray,
    Kind,
    TableRow,
    content_key,
)
from fedhead.data.labels import name_of
from fedhead.errors import UserError
from fedhead.registry import Registry, suggest

logger = logging.getLogger(__name__)

_TASKS_OF = {
    "mask": "segmentation",
    "boxes": "detection",
}
"""The task for which each kind of annotation is made."""

sources: Registry[Callable[[str], "Samples"]] = Registry(
    "data source",
    {
        "coco": "fedhead.data.coco",
        "conll": "fedhead.data.conll",
        "csv": "fedhead.data.tables",
        "digits": "fedhead.data.arrays",
        "features": "fedhead.data.features_file",
        "folder": "fedhead.data.folder",
        "hf": "fedhead.data.hub",
        "jsonl": "fedhead.data.tables",
        "masks": "fedhead.data.masks",
        "npz": "fedhead.data.npz",
        "parquet": "fedhead.data.tables",
        "python": "fedhead.data.python",
        "torchvision": "fedhead.data.torchvision",
        "voc": "fedhead.data.voc",
        "yolo": "fedhead.data.yolo",
    },
)


@dataclass(frozen=True)
class Former:
    """The fingerprint of the previous version, for data whose content is in files.

    Attributes:
        fingerprint: of paths, sizes and times; renamed or backdated files could share it.
        changed: the time of the last change of any file, in ns. Features cached after it are of these files.
        fault: returns the reason, as a clause, if features cached under it are wrong; otherwise an empty text.
    """

    fingerprint: str
    changed: int = 0
    fault: Callable[[], str] = str


@dataclass(frozen=True)
class LeftOut:
    """An unused part of the data.

    Attributes:
        count: the number of things.
        things: their kind, such as "files" or "columns".
        reason: the reason in a few words.
        examples: a few of them.
        warned: whether loading the data logs a warning.
    """

    count: int
    things: str
    reason: str
    examples: tuple[str, ...]
    warned: bool = True

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} {self.things} left out ({self.reason}): {', '.join(self.examples)}{more}"


@dataclass(frozen=True)
class Samples:
    """A data set of `n` images, texts, clips or rows of numbers, with a class, several classes or real targets each.

    Attributes:
        spec: the data spec.
        classes: the names that `labels` index; empty if the rows have real targets.
        labels: `[n]` int64; for multi-label rows `[n, C]` int64, 1 for each class of a row and else 0; zeros `[n]` if
            the rows have real targets.
        read: returns the item of a row; raises `UnreadableSampleError`.
        name: returns the name of a row for readers.
        fingerprint: changes whenever labels or content may have changed.
        groups: the group of each row (a patient, a writer), which the held-out split must not divide; None for rows
            that are a group of their own.
        subgroups: the subgroup of each row (a sex, a scanner) by which a head's metrics are divided; None for rows
            without one.
        sites: the site of each row, if the data names sites.
        splits: the split of each row (train, test), if the data has splits.
        kind: the kind of item that `read` returns.
        targets: `[n, K]` float64, finite real targets for regression; None for classes.
        target_names: `[K]`, the names of the targets; empty for classes.
        columns: `[d]`, the names of the numbers in each row, for the kind "table"; otherwise empty.
        incomplete: the columns with missing numbers.
        former: the fingerprint of the previous version, if it differs.
        left_out: unused parts of the data.
        annotation: reads what the places of a row are, for dense tasks: a mask, boxes, or tags.
        annotated: the kind of annotations, such as "mask"; empty if there are none.
        sequences: `[n, 2]` int64, the number of the sequence that a row belongs to, and its position there, for rows
            that are words of sentences; None for rows on their own.
        cautions: sentences on ambiguous data and its interpretation.
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
    targets: FloatArray | None = None
    target_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    former: Former | None = None
    left_out: tuple[LeftOut, ...] = ()
    cautions: tuple[str, ...] = ()
    annotation: Callable[[int], Any] | None = None
    annotated: str = ""
    sequences: IntArray | None = None
    subgroups: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have any number of classes, including none."""
        return self.labels.ndim == 2

    def key(self, row: int, item: Item) -> int:
        """Return the 64-bit identity that decides whether `row` is held out: of its group, or else of its content.

        It is the same in a folder, a table and an archive, because images are identified by their pixels.
        """
        return self.keys(row, item)[0]

    def keys(self, row: int, item: Item) -> tuple[int, int]:
        """Return two 64-bit identities of `row`: the one for holding out (see `key`), and that of its content."""
        content, group = content_key(item), self.group(row, item)
        if group is None:
            return content, content
        of_group = int.from_bytes(
            hashlib.blake2b(f"group {group}".encode(errors="surrogatepass"), digest_size=8).digest(), "little"
        )
        return of_group, content

    def group(self, row: int, item: Item) -> str | None:
        """Return the group of `row`: the one in the data, or else the one in its own file."""
        if self.groups is not None and self.groups[row] is not None:
            return self.groups[row]
        return None if isinstance(item, str | TableRow | Clip) else item.info.get(GROUP)


def load_samples(spec: str) -> Samples:
    """Load data by its spec `source:argument`.

    Raises:
        UserError: for an unknown source, a path that is missing or empty, or an invalid argument.
    """
    samples = look_up(spec)
    warn_of(samples)
    return samples


def look_up(spec: str) -> Samples:
    """Load data as `load_samples` does, without warnings about unused parts."""
    source, _, argument = spec.partition(":")
    return sources[source](argument)


def warn_of(samples: Samples) -> None:
    """Log unused parts of the data, and ambiguities."""
    for one in samples.left_out:
        if one.warned:
            logger.warning("%s: %s.", samples.spec, one)
    for caution in samples.cautions:
        logger.warning("%s: %s", samples.spec, caution)
    named = {group for group in samples.groups or () if group is not None}
    if len(named) == 1 and None not in (samples.groups or ()) and len(samples) > 1:
        logger.warning(
            "%s: all %d rows have one group, %r, so all or none of them are held out.",
            samples.spec,
            len(samples),
            next(iter(named)),
        )
    for names in similar_names(samples.classes):
        logger.warning(
            "The classes %s of %s differ only by case or spaces; they are treated as different classes.",
            " and ".join(map(repr, names)),
            samples.spec,
        )


def similar_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return groups of names that differ only by case or spaces."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    return [tuple(together) for together in alike.values() if len(together) > 1]


def choose_split(splits: Sequence[str], wanted: str | None, spec: str) -> IntArray:
    """Return the rows of the selected splits, or all rows if none is selected.

    Args:
        splits: `[n]`, the split of each row.
        wanted: comma-separated names, or None.
        spec: the data spec, for messages.

    Raises:
        UserError: if there is no such split.
    """
    present = sorted(set(splits))
    if wanted is None:
        if len(present) > 1:
            logger.warning(
                "%s has the splits %s, and all rows are used; choose one, as in ?split=%s.",
                spec,
                ", ".join(present),
                present[0],
            )
        return np.arange(len(splits))
    chosen = [name.strip() for name in wanted.split(",")]
    if not any(present):
        raise UserError(f"{spec} is not divided into splits; leave out split={wanted}.")
    for name in chosen:
        if name not in present:
            raise UserError(f"{spec} has no rows of the split {name!r}. {suggest(name, present)}")
    kept = set(chosen)
    return np.flatnonzero(np.fromiter((split in kept for split in splits), dtype=np.bool_, count=len(splits)))


def require_labels(samples: Samples, multi_label: bool) -> None:
    """Check that data has the labels that a classification run needs.

    Raises:
        UserError: if it has real targets, or only one of data and run is multi-label. Names no file.
    """
    if samples.targets is not None:
        raise UserError(
            f"This run predicts classes, but its data has real targets ({', '.join(samples.target_names[:5])}). Name a "
            "column of classes, as in ?label=COLUMN, instead of ?target=."
        )
    if multi_label and not samples.multi_label:
        raise UserError(
            "This run is multi-label, but its data names one class per row. Label each row with a list of classes, or "
            "all of them with 0 and 1 as [rows, classes], or give the separator of labels in a table, as in "
            "'csv:FILE?separator=;'; or run without --multi-label."
        )
    if samples.multi_label and not multi_label:
        made_for = _TASKS_OF.get(samples.annotated)
        advice = "run it with --multi-label"
        if made_for:
            advice = f"run it with --task {made_for}, or with --multi-label to predict only which classes an image has"
        raise UserError(f"This run takes one class per row, but its data names several: {advice}.")


def require_kind(backbone: str, takes: Kind, held: Kind) -> None:
    """Check that a backbone takes the kind of items in the data.

    Args:
        backbone: the spec of the backbone, for the message.
        takes: the backbone's kind.
        held: the data's kind.

    Raises:
        UserError: if they differ. The message contains no file name.
    """
    if takes != held:
        advice = {
            "image": "Use an image backbone, such as torchvision:resnet18.",
            "text": "Use a text backbone, such as hf:NAME or vectors:FILE.",
            "table": "Use the backbone identity, whose features are the numbers themselves.",
            "audio": "Use a backbone of sounds, such as bundled:logmel or hf:openai/whisper-tiny.",
        }[held]
        raise UserError(f"The backbone {backbone} takes {ITEMS[takes]}, but the data contains {ITEMS[held]}. {advice}")


def relabel(samples: Samples, classes: Sequence[str]) -> IntArray:
    """Return labels for `classes`, which may include unused ones: `[n]` or, if multi-label, `[n, C]`.

    Raises:
        UserError: if a sample's class is not among `classes`, with its name and the known ones.
    """
    known = {name_of(name): index for index, name in enumerate(classes)}
    named = [name_of(name) for name in samples.classes]
    held = np.flatnonzero(samples.labels.any(0)) if samples.multi_label else np.unique(samples.labels)
    for label in held:
        if (name := named[label]) not in known:
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
        ordered[:, [known[named[label]] for label in held]] = samples.labels[:, held]
        return ordered
    table = np.full(len(samples.classes), -1, dtype=np.int64)
    table[held] = [known[named[label]] for label in held]
    return table[samples.labels]


def held_out(keys: KeyArray, share: float) -> BoolArray:
    """Return which rows are held out: those with `hash(key) < share`.

    The choice depends only on a row's own key, so it is the same in every run and partition, and rows of equal content
    or group are never divided. The salt of the hash is constant: a party that could choose it could isolate rows by
    two runs with slightly different held-out rows.

    Args:
        keys: `[n]` 64-bit row keys.
        share: the expected share of rows, in 0..1.
    """
    return _chosen(keys, share, b"held out 0")


def calibration_half(keys: KeyArray) -> BoolArray:
    """Return which held-out rows choose a calibration; the others evaluate it. See `held_out`.

    Args:
        keys: `[n]` 64-bit row keys.
    """
    return _chosen(keys, 0.5, b"held out -1")


def _chosen(keys: KeyArray, share: float, salt: bytes) -> BoolArray:
    start = int.from_bytes(hashlib.blake2b(salt, digest_size=8).digest(), "little")
    mixed = mix(keys ^ np.uint64(start))
    below: BoolArray = (mixed >> np.uint64(11)) < np.uint64(share * 2**53)
    return below


def mix(keys: KeyArray) -> KeyArray:
    """Map 64-bit numbers bijectively to pseudorandom ones: SplitMix64's mixing (Steele, Lea & Flood, OOPSLA 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    mixed: KeyArray = keys ^ (keys >> np.uint64(31))
    return mixed
