"""Boxes around the objects in images: checked annotations of any format, and the samples made from them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.data.files import Files
from fedhead.data.images import read_image
from fedhead.data.items import Item, UnreadableSampleError
from fedhead.data.labels import name_of
from fedhead.data.samples import LeftOut, Samples, choose_split
from fedhead.data.specs import join_options
from fedhead.errors import UserError
from fedhead.wording import counted, one_line, quoted

MOST_BOXES = 10_000
"""Boxes in one image."""

LARGEST_SIDE = 100_000
"""Pixels of an image's height or width."""

MOST_PATH = 2048
"""Characters of a path from a file of annotations."""

BOX_OPTIONS = ("classes", "empty", "group", "site")
"""Options of every source of boxes."""

SUBFOLDER = "subfolder"
"""Value of the options `site` and `group` for the folder of an image."""

_EXAMPLES = 3


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image.

    Attributes:
        corners: `[m, 4]` float64, left, top, right and bottom as shares of the image's width and height.
        labels: `[m]` int64, class numbers.
        ignored: `[m]` bool, crowds and difficult objects: neither learned from nor counted.
    """

    corners: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)


class Box(NamedTuple):
    """One annotated box in pixels, unchecked."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    ignored: bool = False


@dataclass(frozen=True)
class Drawing:
    """The annotation of one image as its file has it.

    Attributes:
        path: of the image, below the folder of images.
        size: width and height in pixels, of the upright image.
        boxes: in pixels.
        split: of the image; empty if there is none.
        about: texts about the image by field, for the options `site` and `group`.
        beside: further values that decide the annotation, for the fingerprint.
    """

    path: str
    size: tuple[int, int]
    boxes: Sequence[Box]
    split: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""


@dataclass
class _Problems:
    """Boxes and images that are not used, by reason."""

    examples: dict[str, list[str]] = field(default_factory=dict)
    clipped: int = 0

    def note(self, reason: str, name: str) -> None:
        self.examples.setdefault(reason, []).append(name)

    def left_out(self) -> list[LeftOut]:
        found = []
        for reason, names in self.examples.items():
            what = "image" if reason.startswith("no box") else "box"
            things = {"image": ("image", "images"), "box": ("box", "boxes")}[what][len(names) > 1]
            found.append(LeftOut(len(names), things, reason, tuple(names[:_EXAMPLES])))
        return found


def samples_of_boxes(
    source: str,
    given: Path,
    root: Path,
    drawings: Sequence[Drawing],
    classes: Sequence[str],
    options: Mapping[str, str],
    left_out: Sequence[LeftOut] = (),
) -> Samples:
    """Return images with boxes, of which rows without area and beyond their image are left out.

    Args:
        source: name of the source.
        given: path in the spec.
        root: folder of the images.
        drawings: of all annotated images.
        classes: all annotated classes, also those without a box.
        options: `classes` limits and orders the classes, `empty=no` leaves out images without boxes, `site` and `group`
            name a field of `Drawing.about` or are `subfolder`.
        left_out: content that the format could not use.

    Raises:
        UserError: if there are no images, or an option or a class is wrong.
    """
    spec = f"{source}:{join_options(str(given.resolve()), options)}"
    splits = [one.split for one in drawings]
    if any(splits) or "split" in options:
        drawings = [drawings[row] for row in choose_split(splits, options.get("split"), spec)]
    classes = _classes(classes, options, spec)
    problems = _Problems()
    found = [(one, _checked(one, classes, problems)) for one in drawings]
    found, cautions = _chosen(found, problems, keeps_empty=_keeps_empty(options, spec))
    if not found:
        raise UserError(f"{spec} has no annotated images.")
    drawn = _Drawn(root, [one for one, _ in found], [boxes for _, boxes in found])
    return Samples(
        spec=spec,
        classes=classes,
        labels=drawn.present(len(classes)),
        read=drawn.read,
        name=drawn.files.name,
        fingerprint=drawn.fingerprint((*classes, options.get("site", ""), options.get("group", ""))),
        groups=_column("group", [one for one, _ in found], options, spec),
        sites=_column("site", [one for one, _ in found], options, spec),
        splits=[one.split for one, _ in found] if any(splits) else None,
        left_out=(*left_out, *problems.left_out()),
        cautions=tuple(cautions),
        annotation=drawn.boxes.__getitem__,
        annotated="boxes",
    )


@dataclass(frozen=True)
class _Drawn:
    """Images and their boxes by row number."""

    root: Path
    drawings: Sequence[Drawing]
    boxes: Sequence[Boxes]

    @property
    def files(self) -> Files:
        return Files(self.root, [one.path for one in self.drawings])

    def read(self, row: int) -> Item:
        """Return an image.

        Raises:
            UnreadableSampleError: if it cannot be read, or is of another size than its annotation.
        """
        path = self.root / self.drawings[row].path
        image = read_image(path)
        width, height = self.drawings[row].size
        if image.size != (width, height):
            raise UnreadableSampleError(
                f"{path} is {image.width} x {image.height} pixels upright, but its boxes are drawn for {width} x "
                f"{height}; annotate it again or correct the size."
            )
        return image

    def present(self, classes: int) -> npt.NDArray[np.int64]:
        """Return `[n, C]`, whether each image has a box of each class."""
        marks = np.zeros((len(self.boxes), classes), np.int64)
        for row, boxes in enumerate(self.boxes):
            marks[row, boxes.labels[~boxes.ignored]] = 1
        return marks

    def fingerprint(self, names: Sequence[str]) -> str:
        digest = hashlib.sha256(repr(names).encode(errors="surrogatepass"))
        for one, stamp, boxes in zip(self.drawings, self.files.stamps(), self.boxes, strict=True):
            digest.update(f"{one.path}\0{stamp}\0{sorted(one.about.items())}\n".encode(errors="surrogatepass"))
            for part in (boxes.corners, boxes.labels, boxes.ignored):
                digest.update(part.tobytes())
        return digest.hexdigest()


def _chosen(
    found: list[tuple[Drawing, Boxes]], problems: _Problems, *, keeps_empty: bool
) -> tuple[list[tuple[Drawing, Boxes]], list[str]]:
    """Return the images to use, and warnings about them; note images without boxes that are left out."""
    empty = [one for one, boxes in found if not len(boxes)]
    cautions = [_about_empty(len(empty), len(found))] if empty and keeps_empty else []
    if not keeps_empty:
        for one in empty:
            problems.note("no box, by empty=no", one.path)
        found = [(one, boxes) for one, boxes in found if len(boxes)]
    if problems.clipped:
        cautions.append(
            f"{counted(problems.clipped, 'box', 'boxes')} reach beyond their image and are cut at its edge."
        )
    return found, cautions


def _keeps_empty(options: Mapping[str, str], spec: str) -> bool:
    if (given := options.get("empty", "yes")) not in ("yes", "no"):
        raise UserError(f"The option empty of {spec!r} is yes or no, not {given!r}.")
    return given == "yes"


def _about_empty(empty: int, images: int) -> str:
    return (
        f"{empty} of {counted(images, 'image')} have no boxes and count as images without objects. If they were not "
        "annotated, leave them out with ?empty=no."
    )


def _classes(found: Sequence[str], options: Mapping[str, str], spec: str) -> tuple[str, ...]:
    """Return the classes in the order of the option, if given.

    Raises:
        UserError: if there are none, or a name is empty or repeated.
    """
    given = options.get("classes")
    classes = tuple(name_of(one) for one in (given.split(",") if given else found))
    if not classes:
        raise UserError(f"{spec} names no classes.")
    if "" in classes or len(set(classes)) < len(classes):
        raise UserError(f"The classes of {spec} repeat a name or have an empty one: {quoted(classes)}.")
    return classes


def _checked(drawing: Drawing, classes: Sequence[str], problems: _Problems) -> Boxes:
    """Return the boxes of an image that have a class, an area and are inside it."""
    width, height = drawing.size
    places = {name: place for place, name in enumerate(classes)}
    kept: list[tuple[float, float, float, float, int, bool]] = []
    if len(drawing.boxes) > MOST_BOXES:
        raise UserError(f"{drawing.path} has {len(drawing.boxes)} boxes; at most {MOST_BOXES} are read of an image.")
    for box in drawing.boxes:
        numbers = (box.left / width, box.top / height, box.right / width, box.bottom / height)
        left, top, right, bottom = (min(max(one, 0.0), 1.0) for one in numbers)
        if box.name not in places:
            problems.note(f"of the class {one_line(box.name, 60)!r}, which is not among the classes", drawing.path)
        elif not all(map(math.isfinite, numbers)):
            problems.note("a corner that is not finite", drawing.path)
        elif box.right <= box.left or box.bottom <= box.top:
            problems.note("no area", drawing.path)
        elif right <= left or bottom <= top:
            problems.note("outside its image", drawing.path)
        else:
            slack = 1 / width, 1 / height
            beyond = zip(numbers, (left, top, right, bottom), (*slack, *slack), strict=True)
            problems.clipped += any(abs(one - cut) > most for one, cut, most in beyond)
            kept.append((left, top, right, bottom, places[box.name], box.ignored))
    table = np.array(kept, np.float64).reshape(-1, 6)
    return Boxes(np.ascontiguousarray(table[:, :4]), table[:, 4].astype(np.int64), table[:, 5].astype(np.bool_))


def _column(name: str, drawings: Sequence[Drawing], options: Mapping[str, str], spec: str) -> list[str] | None:
    """Return the site or the group of each image; None if no option names it."""
    wanted = options.get(name)
    if wanted is None:
        return None
    if wanted == SUBFOLDER:
        return [name_of(PurePosixPath(one.path).parent.as_posix()) for one in drawings]
    values = []
    for one in drawings:
        if wanted not in one.about:
            known = sorted({key for drawing in drawings for key in drawing.about})
            raise UserError(
                f"The image {one.path} of {spec} has no {wanted!r} to name its {name}. Known are: "
                f"{quoted([*known, SUBFOLDER])}."
            )
        values.append(name_of(one.about[wanted]))
    return values


def path_inside(given: object, where: str) -> str:
    """Return a relative path from a file of annotations.

    Raises:
        UserError: if it is not one inside the folder of images.
    """
    if not isinstance(given, str) or not given or "\0" in given:
        raise UserError(f"{where} names an image by {one_line(repr(given), 80)}; expected a file name.")
    path = PurePosixPath(given.replace("\\", "/"))
    if len(given) > MOST_PATH or any(len(part.encode(errors="surrogatepass")) > 255 for part in path.parts):
        raise UserError(f"{where} names an image by {len(given)} characters, longer than a path can be.")
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UserError(f"{where} names the image {one_line(given, 200)!r}, which is outside the folder of images.")
    return path.as_posix()


def bytes_of(path: Path, most: int) -> bytes:
    """Return the content of a file of annotations.

    Raises:
        UserError: if it cannot be read or has more than `most` bytes.
    """
    try:
        if (found := path.stat().st_size) > most:
            raise UserError(f"{path} has {found} bytes; at most {most} are read of such a file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def size_of(path: Path) -> tuple[int, int] | None:
    """Return the width and height of an upright image from its header; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    # Pillow's decoders may raise any error on damaged input; the image is reported when it is read.
    except Exception:
        return None
    return (height, width) if turned else (width, height)
