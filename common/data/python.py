"""`python:MODULE:FUNCTION`: what a function of the user's returns."""

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedhead.data.arrays import digest_image, digest_text, samples_from_arrays, samples_from_texts
from fedhead.data.images import to_image
from fedhead.data.samples import Item, Kind, Samples, index_labels, sources
from fedhead.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """The images or texts of a data set that is indexed for `(image, label)` or `(text, label)`.

    Attributes:
        pairs: the data set.
        spec: what messages call it.
    """

    pairs: Any
    spec: str

    def read(self, row: int) -> Item:
        item = self.pairs[row][0]
        return item if isinstance(item, str) else to_image(item, self.name(row))

    def name(self, row: int) -> str:
        return f"{self.spec}[{row}]"


def user_function(spec: str) -> Callable[[], Any]:
    """Return the function that `python:MODULE:FUNCTION` names; the module may be in the current folder.

    Raises:
        UserError: if there is none.
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
    """What a function of the user's returns: `(images, labels)`, `Samples`, or a sized data set of pairs.

    A data set (such as torchvision's) is indexed for `(image, label)`; its `classes` and `groups` are used
    where it has them. Images are PIL images, uint8 arrays `[H, W]` or `[H, W, 3]`, float arrays in 0..1, or
    tensors `[C, H, W]`; texts are strings, and stand in the place of images. Multi-label rows are labelled as
    `samples_from_arrays` says.
    """
    loaded = user_function(f"python:{argument}")()
    if isinstance(loaded, Samples):
        return replace(loaded, spec=f"python:{argument}")
    if isinstance(loaded, tuple) and len(loaded) == 2:
        items, labels = loaded
        if len(items) and isinstance(items[0], str):
            return samples_from_texts(items, labels, spec=f"python:{argument}")
        return samples_from_arrays(items, labels, spec=f"python:{argument}")
    if hasattr(loaded, "__getitem__") and hasattr(loaded, "__len__"):
        return samples_of_pairs(loaded, f"python:{argument}")
    raise UserError(
        f"'python:{argument}' returned {type(loaded).__name__}; expected (images, labels), (texts, labels) or a data "
        "set with a length, indexed for (image, label) or (text, label)."
    )


def samples_of_pairs(pairs: Any, spec: str) -> Samples:
    """Wrap a data set of `(image, label)` or `(text, label)`; one pass reads labels and content."""
    labels = []
    kinds: set[Kind] = set()
    digest = hashlib.sha256()
    for row in range(len(pairs)):
        item, label = pairs[row]
        labels.append(label)
        kinds.add("text" if isinstance(item, str) else "image")
        if isinstance(item, str):
            digest_text(digest, item)
        else:
            digest_image(digest, item)
    if len(kinds) == 2:
        raise UserError(f"{spec} holds images and texts; expected one of them.")
    classes, indices = index_labels(labels, getattr(pairs, "classes", None), spec)
    groups = getattr(pairs, "groups", None)
    digest.update(repr((classes, labels, groups)).encode())
    rows = Pairs(pairs, spec)
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=rows.read,
        name=rows.name,
        fingerprint=digest.hexdigest(),
        groups=None if groups is None else tuple(map(str, groups)),
        kind=kinds.pop(),
    )
