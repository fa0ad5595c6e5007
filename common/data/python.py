"""`python:MODULE:FUNCTION`: the data returned by a user function."""

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedhead.data.arrays import (
    ContentDigest,
    samples_from_arrays,
    samples_from_clips,
    samples_from_numbers,
    samples_from_texts,
)
from fedhead.data.conversion import is_frame, kind_of, to_item
from fedhead.data.frames import samples_from_frame
from fedhead.data.images import White, to_image
from fedhead.data.items import ITEMS, Columns, Item, Kind, TableRow, UnreadableSampleError
from fedhead.data.labels import index_labels, names_of
from fedhead.data.positions import by_position
from fedhead.data.samples import Samples, sources
from fedhead.errors import FedheadError, UserError


@dataclass(frozen=True)
class Pairs:
    """The items of a data set of pairs `(item, label)`.

    Attributes:
        pairs: the data set.
        spec: its name in messages.
        kind: the kind of the items.
        white: the value of white in integers whose type does not determine it.
    """

    pairs: Any
    spec: str
    kind: Kind = "image"
    white: White | None = None

    def read(self, row: int) -> Item:
        value = _pair(self.pairs, row, self.name(row))[0]
        if self.white is not None and hasattr(value, "dtype"):
            return to_image(value, self.name(row), self.white)
        return to_item(value, self.kind, self.name(row))

    def name(self, row: int) -> str:
        return f"{self.spec}[{row}]"


def _pair(pairs: Any, row: int, name: str) -> Any:
    """Return an item and its label.

    Raises:
        UnreadableSampleError: if the data set fails to return them.
    """
    try:
        pair = pairs[row]
    except FedheadError:
        raise
    # The data set's own code may read files of any kind.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UnreadableSampleError(
            f"{name} cannot be read: {type(error).__name__}{f': {reason}' if reason else ''}.", lasting=False
        ) from error
    if not isinstance(pair, tuple | list) or len(pair) < 2:
        raise UserError(f"{name} is of type {type(pair).__name__}; expected a pair of an item and its label.")
    return pair


def user_function(spec: str) -> Callable[[], Any]:
    """Return the function named by `python:MODULE:FUNCTION`; the module may be in the current folder.

    Raises:
        UserError: if it does not exist.
    """
    module_name, _, function_name = spec.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise UserError(f"Expected python:MODULE:FUNCTION, not '{spec}'.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"The module of '{spec}' cannot be imported: {error}.") from error
    except AttributeError:
        raise UserError(f"The module {module_name!r} has no function {function_name!r}.") from None
    return function


@sources.register("python")
def load_python(argument: str) -> Samples:
    """The result of a user function: `(items, labels)`, `Samples`, a frame, or a sized data set of pairs.

    A data set (such as torchvision's) returns `(item, label)` by index; its `classes` and `groups` are used if present.
    Images are PIL images, arrays, tensors `[C, H, W]`, or paths; sounds are `Clip`s or `Path`s; texts are strings; rows
    of numbers are arrays `[n, d]` or frames. Labels are as in `samples_from_arrays`. A single frame is read like a
    table.
    """
    spec = f"python:{argument}"
    loaded = _called(spec)
    if isinstance(loaded, Samples):
        return replace(loaded, spec=spec)
    if is_frame(loaded):
        return replace(samples_from_frame(loaded, spec=spec), spec=spec)
    if isinstance(loaded, tuple) and len(loaded) == 2:
        return _of_two(*loaded, spec)
    if hasattr(loaded, "__getitem__") and hasattr(loaded, "__len__") and not isinstance(loaded, str | dict):
        return samples_of_pairs(loaded, spec)
    raise UserError(
        f"'{spec}' returned {type(loaded).__name__}; expected (images, labels), (texts, labels), (clips, labels), "
        "(numbers, labels), a frame, or a data set with a length, indexed for (item, label)."
    )


def _called(spec: str) -> Any:
    function = user_function(spec)
    try:
        return function()
    except FedheadError:
        raise
    # This runs user code, which may raise any error.
    except Exception as error:
        raise UserError(f"The function of '{spec}' failed: {type(error).__name__}: {error}") from error


def _of_two(items: Any, labels: Any, spec: str) -> Samples:
    """Make samples from items and labels, with the kind of the first item."""
    if is_frame(items) and len(items.columns) > 1:
        return samples_from_numbers(items, labels, spec=spec)
    values = by_position(items, f"The items of {spec}")
    if getattr(values, "ndim", 1) == 2 and not is_frame(items):
        return samples_from_numbers(items, labels, spec=spec)
    if len(values) and kind_of(values[0]) == "text":
        return samples_from_texts(items, labels, spec=spec)
    if len(values) and kind_of(values[0]) == "audio":
        return samples_from_clips(items, labels, spec=spec)
    return samples_from_arrays(items, labels, spec=spec)


def samples_of_pairs(pairs: Any, spec: str) -> Samples:
    """Wrap a data set of `(item, label)`; one pass reads labels and content.

    Raises:
        UserError: if a label cannot be read, the items are of several kinds, or there are none.
    """
    labels, kinds = [], dict[Kind, None]()
    digest = hashlib.sha256()
    content, columns = ContentDigest(digest), Columns(())
    for row in range(len(pairs)):
        name = f"{spec}[{row}]"
        try:
            item, label, *_ = _pair(pairs, row, name)
        except UnreadableSampleError as error:
            raise UserError(f"{error} Its label is unknown, so the row cannot be skipped; remove it.") from error
        labels.append(label)
        kind = kind_of(item)
        kinds.setdefault(kind)
        if kind == "audio" and isinstance(item, dict):
            item = to_item(item, kind, name)
        if kind == "table":
            item = to_item(item, kind, name)
            assert isinstance(item, TableRow)
            columns = item.columns
        content.add(item, kind, name)
    if len(kinds) > 1:
        raise UserError(f"{spec} contains {' and '.join(ITEMS[kind] for kind in sorted(kinds))}; expected one kind.")
    kind = next(iter(kinds), "image")
    classes, indices = index_labels(labels, getattr(pairs, "classes", None), spec)
    groups = getattr(pairs, "groups", None)
    named = None if groups is None else names_of(by_position(groups, f"The groups of {spec}"))
    if not isinstance(groups, list | tuple):
        groups = named
    digest.update(repr((classes, labels, groups)).encode(errors="surrogatepass"))
    if indices.ndim == 2:
        # The text of large arrays of labels is abbreviated.
        digest.update(indices.tobytes())
    rows = Pairs(pairs, spec, kind, content.finish())
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=rows.read,
        name=rows.name,
        fingerprint=digest.hexdigest(),
        groups=named,
        kind=kind,
        columns=columns.names,
    )
