"""In-memory items with their labels or targets as samples, and the digits of scikit-learn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedhead.data.conversations import CONVERSATION, Conversation, IndexedConversations
from fedhead.data.conversion import to_item
from fedhead.data.files import stamp
from fedhead.data.images import White, has_wide_integers, to_image, white_of
from fedhead.data.items import ITEMS, Clip, Columns, FloatArray, IntArray, Item, Kind, TableRow, UnreadableSampleError
from fedhead.data.labels import index_labels, names_of
from fedhead.data.number_rows import NumberRows
from fedhead.data.numbers import column_of_numbers, warn_of_constants
from fedhead.data.positions import as_plain, by_position, column_names
from fedhead.data.samples import Samples, sources
from fedhead.data.sounds import to_clip
from fedhead.errors import UserError


@dataclass(frozen=True)
class IndexedItems:
    """Items by position.

    Attributes:
        values: values that `to_item` accepts, or the error of an unreadable value.
        kind: the kind of the items.
        spec: the name of the data in messages.
        white: the value of white in integers whose type does not determine it.
    """

    values: Any
    kind: Kind
    spec: str
    white: White | None = None

    def read(self, row: int) -> Item:
        value = self.values[row]
        if isinstance(value, UnreadableSampleError):
            raise value
        if self.white is not None and hasattr(value, "dtype"):
            return to_image(value, self.name(row), self.white)
        return to_item(value, self.kind, self.name(row))

    def name(self, row: int) -> str:
        return f"{self.spec}[{row}]"


@sources.register("digits")
def load_digits(argument: str) -> Samples:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 grey levels (Alpaydin & Kaynak, 1998)."""
    if argument:
        raise UserError(f"The data 'digits' takes no argument, but was given {argument!r}.")
    from sklearn.datasets import load_digits as load

    bunch = load()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return samples_from_arrays(pixels, bunch.target, classes=tuple(map(str, range(10))), spec="digits")


def samples_from_arrays(
    images: Any,
    labels: Any = None,
    *,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    sites: Any = None,
    targets: Any = None,
    subgroups: Any = None,
    spec: str = "arrays",
) -> Samples:
    """Wrap in-memory images with their labels or targets. Everything is read by position.

    Args:
        images: `[n, H, W]` or `[n, H, W, 3]` uint8 or 0..1 floats, `[n, C, H, W]` tensors; or a list or a Series of
            images, arrays, or paths of files.
        labels: `[n]` integers that index `classes`, or class names. For multi-label rows `[n, C]` of 0 and 1, or a
            sequence of each row's classes, by name or index, possibly empty.
        classes: the class names; by default the labels' own values in order, and the columns' names or numbers for
            `[n, C]`.
        groups: `[n]`, the group of each row, which the held-out split must not divide; a missing value for none.
        sites: `[n]`, the site of each row.
        targets: `[n]` or `[n, K]` real targets instead of labels; a frame's columns name them.
        subgroups: `[n]`, the subgroup of each row, by which a head's metrics are divided; a missing value for none.
        spec: the name of the data in messages.

    Raises:
        UserError: if there are no rows, the lengths differ, or a label is missing or not a class.
    """
    values = by_position(images, f"The images of {spec}")
    if (named := column_names(images)) is not None and len(named) == 1:
        values = list(values[:, 0])
    return _samples(values, "image", labels, classes, groups, sites, targets, subgroups, spec)


def samples_from_texts(
    texts: Any,
    labels: Any = None,
    *,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    sites: Any = None,
    targets: Any = None,
    subgroups: Any = None,
    spec: str = "texts",
) -> Samples:
    """Wrap in-memory texts with their labels or targets; see `samples_from_arrays`.

    Conversations have neither labels nor targets.

    Args:
        texts: `n` strings, `Path`s of files, or `Conversation`s.
        labels: see `samples_from_arrays`.
        classes: see `samples_from_arrays`.
        groups: see `samples_from_arrays`.
        sites: see `samples_from_arrays`.
        targets: see `samples_from_arrays`.
        subgroups: see `samples_from_arrays`.
        spec: the name of the data in messages.

    Raises:
        UserError: if there are no rows, the lengths differ, an item is no text, or a label is missing or not a class.
    """
    values = by_position(texts, f"The texts of {spec}")
    if getattr(values, "ndim", 1) == 2 and values.shape[1] == 1:
        values = list(values[:, 0])
    for row, value in enumerate(values):
        if not isinstance(value, str | Path) and value is not None and value == value:
            raise UserError(f"{spec}[{row}] is {type(value).__name__}; expected a text, or the Path of a file.")
    talks = [isinstance(value, Conversation) for value in values]
    if all(talks) and talks and labels is None and targets is None:
        unlabelled = np.zeros(len(talks), dtype=np.int64)
        made = _samples(values, "text", unlabelled, ("conversation",), groups, sites, None, subgroups, spec)
        return replace(made, classes=(), read=IndexedConversations(list(values), spec).read, annotated=CONVERSATION)
    if any(talks):
        raise UserError(
            f"{spec} holds conversations, with {'labels or targets' if all(talks) else 'other texts'}: conversations "
            "have neither, and are given by themselves."
        )
    return _samples(values, "text", labels, classes, groups, sites, targets, subgroups, spec)


def samples_from_clips(
    clips: Any,
    labels: Any = None,
    *,
    rate: int | None = None,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    sites: Any = None,
    targets: Any = None,
    subgroups: Any = None,
    spec: str = "clips",
) -> Samples:
    """Wrap in-memory sounds with their labels or targets; see `samples_from_arrays`.

    Args:
        clips: `n` `Clip`s, paths of files, `{array, sampling_rate}` as in data sets of Hugging Face, or, with `rate`,
            arrays of samples as in `fedhead.data.to_clip`, possibly of different lengths.
        labels: see `samples_from_arrays`.
        rate: samples per second of all arrays.
        classes: see `samples_from_arrays`.
        groups: see `samples_from_arrays`.
        sites: see `samples_from_arrays`.
        targets: see `samples_from_arrays`.
        subgroups: see `samples_from_arrays`.
        spec: the name of the data in messages.

    Raises:
        UserError: if there are no rows, the lengths differ, arrays have no rate, or a label is missing or not a class.
    """
    given = by_position(clips, f"The clips of {spec}")
    values = [_sound(given[row], rate, f"{spec}[{row}]") for row in range(len(given))]
    return _samples(values, "audio", labels, classes, groups, sites, targets, subgroups, spec)


def _sound(value: Any, rate: int | None, name: str) -> Any:
    """Return a clip, the path or the bytes of a file, or the error of samples that are not a sound."""
    try:
        if isinstance(value, dict) and value.get("array") is not None:
            return to_clip(value["array"], value.get("sampling_rate"), name)
        if isinstance(value, str | Path | bytes | dict | None):
            return value
        if isinstance(value, Clip):
            return to_clip(value.samples, value.rate, name)
        if rate is None:
            raise UserError(f"{name} has no sampling rate; give rate=, or clips as Clip(samples, rate).")
        return to_clip(value, rate, name)
    except UnreadableSampleError as error:
        return error


def samples_from_numbers(
    rows: Any,
    labels: Any = None,
    *,
    columns: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    sites: Any = None,
    targets: Any = None,
    subgroups: Any = None,
    spec: str = "numbers",
) -> Samples:
    """Wrap in-memory rows of numbers with their labels or targets, for the backbone `identity`.

    Args:
        rows: `[n, d]` numbers: an array, a tensor, or a frame, whose columns name the numbers.
        labels: see `samples_from_arrays`.
        columns: `[d]`, the names of the numbers; by default the frame's, or `x0`, `x1` and so on.
        classes: see `samples_from_arrays`.
        groups: see `samples_from_arrays`.
        sites: see `samples_from_arrays`.
        targets: see `samples_from_arrays`.
        subgroups: see `samples_from_arrays`.
        spec: the name of the data in messages.

    Raises:
        UserError: if there are no rows, the lengths differ, a number is missing or not finite, or a label is missing
            or not a class.
    """
    named = columns if columns is not None else column_names(rows)
    table = by_position(rows, f"The rows of {spec}")
    table = table if hasattr(table, "shape") else np.array(table, dtype=object)
    if len(table.shape) != 2 or table.shape[1] == 0:
        raise UserError(f"The rows of {spec} have shape {list(table.shape)}; expected [n, d] numbers.")
    names = tuple(map(str, named)) if named is not None else tuple(f"x{one}" for one in range(table.shape[1]))
    if len(names) != table.shape[1] or len(set(names)) != len(names):
        raise UserError(f"{spec} names {len(set(names))} different columns for {table.shape[1]} numbers a row.")
    by_name = {name: table[:, position].tolist() for position, name in enumerate(names)}
    numbers = NumberRows.of(by_name, lambda row: f"{spec}[{row}]")
    values = [numbers.read(row) for row in range(len(table))]
    samples = _samples(values, "table", labels, classes, groups, sites, targets, subgroups, spec, numbers.columns)
    return replace(samples, incomplete=numbers.incomplete)


def _samples(
    values: Any,
    kind: Kind,
    labels: Any,
    classes: Sequence[str] | None,
    groups: Any,
    sites: Any,
    targets: Any,
    subgroups: Any,
    spec: str,
    columns: Columns | None = None,
) -> Samples:
    """Make samples from items by position and their annotations."""
    words = "rows" if kind == "table" else ITEMS[kind]
    if (labels is None) == (targets is None):
        raise UserError(f"{spec} has {'no labels' if labels is None else 'labels and targets'}; expected one of them.")
    given = {"labels": labels, "targets": targets, "groups": groups, "sites": sites, "subgroups": subgroups}
    for what, annotation in given.items():
        if annotation is None:
            continue
        if column_names(annotation) is None:
            given[what] = by_position(annotation, f"The {what} of {spec}")
        if len(values) != len(given[what]):
            raise UserError(f"{spec} has {len(values)} {words} but {len(given[what])} {what}.")
    labels, targets, groups, sites, subgroups = given.values()
    names, indices, real, target_names = _annotations(labels, classes, targets, spec)
    digest = hashlib.sha256(repr(names).encode(errors="surrogatepass"))
    digest.update(indices.tobytes())
    if real is not None:
        digest.update(repr(target_names).encode(errors="surrogatepass") + real.tobytes())
    named = None if groups is None else names_of(by_position(groups, f"The groups of {spec}"))
    digest.update(b"" if named is None else repr(named).encode(errors="surrogatepass"))
    content = ContentDigest(digest)
    kept = [content.add(values[row], kind, f"{spec}[{row}]") for row in range(len(values))]
    # Rows of an array are already contiguous.
    rows = IndexedItems(values if isinstance(values, np.ndarray) else kept, kind, spec, content.finish())
    return Samples(
        spec=spec,
        classes=names,
        labels=indices,
        read=rows.read,
        name=rows.name,
        fingerprint=digest.hexdigest(),
        groups=named,
        sites=None if sites is None else _sites(sites, spec),
        kind=kind,
        targets=real,
        target_names=target_names,
        columns=columns.names if columns else (),
        subgroups=None if subgroups is None else names_of(by_position(subgroups, f"The subgroups of {spec}")),
    )


def _annotations(
    labels: Any, classes: Sequence[str] | None, targets: Any, spec: str
) -> tuple[tuple[str, ...], IntArray, FloatArray | None, tuple[str, ...]]:
    """Return class names and labels, and targets and their names."""
    if targets is None:
        return *index_labels(labels, classes, spec), None, ()
    columns = column_names(targets)
    held = by_position(targets, f"The targets of {spec}")
    held = held if hasattr(held, "shape") else np.array(held, dtype=object)
    if len(held) == 0:
        raise UserError(f"{spec} has no rows.")
    table = held.reshape(len(held), -1)
    width = table.shape[1]
    names = columns or (("target",) if width == 1 else tuple(f"target[{position}]" for position in range(width)))
    place = f"{spec}[{{}}]".format
    real = [column_of_numbers(table[:, one].tolist(), names[one], place) for one in range(width)]
    warn_of_constants(np.stack(real, axis=1), names, spec)
    return (), np.zeros(len(table), dtype=np.int64), np.stack(real, axis=1), names


def _sites(sites: Any, spec: str) -> list[str]:
    named = names_of(by_position(sites, f"The sites of {spec}"))
    if None in named:
        raise UserError(f"{spec}[{named.index(None)}] has no site, although other rows do.")
    return [str(name) for name in named]


class ContentDigest:
    """Adds items to a digest, so that equal digests imply equal items.

    Args:
        digest: the digest to update.
    """

    def __init__(self, digest: "hashlib._Hash") -> None:
        self._digest = digest
        self._white: White | None = None

    def add(self, value: Any, kind: Kind, name: str) -> Any:
        """Add a value, and return the value to keep: a plain image in place of a PIL image with an open file."""
        if isinstance(value, str) and kind == "text":
            self._text(value)
        elif isinstance(value, Clip):
            self._digest.update(f"clip {value.rate} {len(value.samples)} ".encode() + value.samples.tobytes())
        elif isinstance(value, UnreadableSampleError):
            self._digest.update(f"unreadable {value}".encode(errors="surrogatepass"))
        elif isinstance(value, TableRow):
            self._digest.update(repr(value.columns.names).encode(errors="surrogatepass") + value.values.tobytes())
        elif isinstance(value, str | Path):
            self._digest.update(f"file {value} {stamp(value)}".encode(errors="surrogatepass"))
        elif isinstance(value, Image.Image):
            return self._pillow(value, name)
        elif kind != "image" or isinstance(value, dict | bytes) or value is None:
            self._digest.update(repr(value).encode(errors="surrogatepass"))
        else:
            self._array(value)
        return value

    def finish(self) -> White | None:
        """Return the value of white in integers whose type does not determine it; None without such integers."""
        if self._white is not None:
            self._digest.update(f"white {self._white}".encode())
        return self._white

    def _text(self, text: str) -> None:
        content = text.encode(errors="surrogatepass")
        self._digest.update(f"text {len(content)} ".encode())
        self._digest.update(content)

    def _pillow(self, image: Image.Image, name: str) -> Image.Image | UnreadableSampleError:
        try:
            plain = to_image(image, name)
        except UnreadableSampleError as error:
            self._digest.update(f"unreadable {error}".encode(errors="surrogatepass"))
            return error
        # Mode, palette, transparency and orientation determine the conversion of an image that is not plain.
        self._digest.update(b"" if plain is image else b"converted ")
        self._pixels(np.asarray(plain), plain.mode)
        return plain

    def _array(self, value: Any) -> None:
        array = np.asarray(as_plain(value))
        if has_wide_integers(array.dtype):
            self._white = max(self._white or 255, white_of(array))
        self._pixels(array, "")

    def _pixels(self, array: Any, mode: str) -> None:
        self._digest.update(f"{mode} {array.dtype} {array.shape}".encode())
        self._digest.update(array.tobytes())
