"""Images or texts, and their labels, held in memory as samples, and the digits that scikit-learn ships."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fedhead.data.images import to_image
from fedhead.data.samples import Samples, index_labels, sources
from fedhead.errors import UserError


@dataclass(frozen=True)
class IndexedImages:
    """Images that an index gives.

    Attributes:
        images: indexed by row number for what `to_image` takes.
        spec: what messages call the data.
    """

    images: Any
    spec: str

    def read(self, row: int) -> Image.Image:
        return to_image(self.images[row], self.name(row))

    def name(self, row: int) -> str:
        return f"{self.spec}[{row}]"


@dataclass(frozen=True)
class IndexedTexts:
    """Texts that an index gives.

    Attributes:
        texts: by row number.
        spec: what messages call the data.
    """

    texts: Sequence[str]
    spec: str

    def read(self, row: int) -> str:
        return self.texts[row]

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
    classes, indices = index_labels(labels, classes, spec)
    digest = hashlib.sha256(repr(classes).encode())
    digest.update(indices.tobytes())
    for image in images:
        digest_image(digest, image)
    rows = IndexedImages(images, spec)
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=rows.read,
        name=rows.name,
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
    classes, indices = index_labels(labels, classes, spec)
    digest = hashlib.sha256(repr(classes).encode())
    digest.update(indices.tobytes())
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{spec}[{row}] is {type(text).__name__}, not a text like the first row.")
        digest_text(digest, text)
    rows = IndexedTexts(texts, spec)
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=rows.read,
        name=rows.name,
        fingerprint=digest.hexdigest(),
        kind="text",
    )


def digest_text(digest: "hashlib._Hash", text: str) -> None:
    """Take a text and where it ends into a digest."""
    content = text.encode(errors="surrogatepass")
    digest.update(f"text {len(content)} ".encode())
    digest.update(content)


def digest_image(digest: "hashlib._Hash", image: Any) -> None:
    """Take an image's type, shape and values into a digest."""
    array = np.asarray(image)
    digest.update(f"{getattr(image, 'mode', '')} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
