"""`masks:IMAGES?masks=FOLDER`: images with a class for each pixel, from mask images or polygons."""

import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from fedhead.data.boxes import size_of
from fedhead.data.coco import categories_of, images_of, parsed, place_of, whole_number
from fedhead.data.files import Files
from fedhead.data.items import IntArray
from fedhead.data.labels import name_of
from fedhead.data.samples import LeftOut, Samples, sources
from fedhead.data.specs import join_options, split_options, to_path
from fedhead.data.walk import files_below, kind_of_file
from fedhead.errors import UserError
from fedhead.registry import suggest
from fedhead.wording import counted, quoted

Mask = npt.NDArray[np.uint8]

IGNORED = 255
"""Value of pixels without a class in the masks that a data set returns."""

MOST_PIXELS = 2**27
"""Pixels of an image with polygons."""

LARGEST_COORDINATE = 1e6
"""Bar on the coordinates of polygons, in pixels."""

BACKGROUND = "background"
_BINARY = (BACKGROUND, "foreground")
_OPTIONS = ("masks", "coco", "ignore", "classes", "index", "site", "group")
_READERS = 4


@sources.register("masks")
def load_masks(argument: str) -> Samples:
    """Images with masks: `masks=FOLDER` has an image of class numbers for each image, of the same name but the ending.

    Masks of 0 and 255 mean background and foreground. `ignore=255` names the value of pixels without a class, and
    `classes=background,nucleus` the classes of the values 0, 1, and so on; by default the values found. Instead of
    masks, `coco=FILE.json` has polygons in COCO's format. `index=FILE.csv` has columns about the images, of which
    `site=COLUMN` and `group=COLUMN` name the site and the group of each.
    """
    spec = f"masks:{argument}"
    path, options = split_options(argument, _OPTIONS, spec)
    root = to_path(path).absolute()
    if ("masks" in options) == ("coco" in options):
        raise UserError(f"{spec} needs either masks=FOLDER or coco=FILE.json.")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of images.")
    images = [one for one in files_below(root) if kind_of_file(one) == "image"]
    if not images:
        raise UserError(f"{root} has no images.")
    made = _from_folder(images, root, options, spec) if "masks" in options else _from_coco(images, root, options, spec)
    kept, read, stamped, classes, values, left_out = made
    files = Files(root, tuple(one.relative_to(root).as_posix() for one in kept))
    digest = hashlib.sha256()
    for image, stamp, beside in zip(files.paths, files.stamps(), stamped, strict=True):
        digest.update(f"{image}\0{stamp}\0{beside}\n".encode(errors="surrogateescape"))
    digest.update(repr([options.get(name) for name in ("ignore", "classes")]).encode())
    columns = _index(kept, root, options, spec)
    for name in ("site", "group"):
        digest.update(repr(columns.get(name)).encode(errors="surrogatepass"))
    return Samples(
        spec=f"masks:{join_options(str(root.resolve()), _absolute(options))}",
        classes=classes,
        labels=values,
        read=files.read,
        name=files.name,
        fingerprint=digest.hexdigest(),
        groups=columns.get("group"),
        sites=columns.get("site"),
        left_out=tuple(left_out),
        annotation=read,
        annotated="mask",
    )


_Made = tuple[list[Path], Callable[[int], Mask], list[str], tuple[str, ...], IntArray, list[LeftOut]]


def _from_folder(images: Sequence[Path], root: Path, options: Mapping[str, str], spec: str) -> _Made:
    """Return the images that have masks, a reader of masks, their stamps, the classes and each image's classes."""
    folder = to_path(options["masks"]).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of masks.")
    masks = {
        one.relative_to(folder).with_suffix("").as_posix(): one
        for one in files_below(folder)
        if kind_of_file(one) == "image"
    }
    stems = {one: one.relative_to(root).with_suffix("").as_posix() for one in images if folder not in one.parents}
    kept = [one for one, stem in stems.items() if stem in masks]
    if not kept:
        raise UserError(f"No image of {root} has a mask of the same name in {folder}, such as 1.png for 1.jpg.")
    missing = [str(one) for one, stem in stems.items() if stem not in masks]
    paths = [masks[stems[one]] for one in kept]
    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(_values_of, kept, paths))
    ignored = _ignored(options, spec)
    table, classes = _classes(found, ignored, options, spec, paths)
    values = np.array([[bool(own[table == place].any()) for place in range(len(classes))] for own in found], np.int64)
    stamped = [
        str(stamp) for stamp in Files(folder, tuple(one.relative_to(folder).as_posix() for one in paths)).stamps()
    ]
    return kept, lambda row: table[_read(paths[row])], stamped, classes, values, _missing(missing)


def _missing(images: Sequence[str]) -> list[LeftOut]:
    if not images:
        return []
    return [LeftOut(len(images), "images" if len(images) > 1 else "image", "no mask", tuple(images[:3]))]


def _ignored(options: Mapping[str, str], spec: str) -> int | None:
    text = options.get("ignore")
    if text is None:
        return None
    if not text.isdigit() or int(text) > 255:
        raise UserError(f"The option ignore of {spec} is a number from 0 to 255, not {text!r}.")
    return int(text)


def _values_of(image: Path, mask: Path) -> npt.NDArray[np.bool_]:
    """Return `[256]`, whether a mask has each value.

    Raises:
        UserError: if the mask is not of the image's size.
    """
    pixels = _read(mask)
    # An image that cannot be opened is reported when it is read.
    width, height = size_of(image) or pixels.shape[::-1]
    if pixels.shape != (height, width):
        raise UserError(
            f"{mask} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image {image} is {width} x "
            f"{height} upright; make them equal."
        )
    return np.bincount(pixels.ravel(), minlength=256) > 0


def _read(path: Path) -> Mask:
    """Return a mask's values, uint8 `[height, width]`; a palette's are its numbers."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image)
    # Pillow's decoders may raise any error on damaged input.
    except Exception as error:
        raise UserError(f"The mask {path} cannot be read: {error}.") from None
    if mode == "1":
        return np.where(pixels, np.uint8(255), np.uint8(0))
    if pixels.ndim == 3 and mode in ("RGB", "RGBA") and (pixels[..., :3] == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "ui" or pixels.max(initial=0) > 255 or pixels.min(initial=0) < 0:
        raise UserError(
            f"The mask {path} has mode {mode}; expected class numbers from 0 to 255 (modes L and P), or 0 and 255."
        )
    return pixels.astype(np.uint8)


def _classes(
    found: Sequence[npt.NDArray[np.bool_]],
    ignored: int | None,
    options: Mapping[str, str],
    spec: str,
    paths: Sequence[Path],
) -> tuple[Mask, tuple[str, ...]]:
    """Return the class number of each value, `[256]`, and the class names."""
    table = np.full(256, IGNORED, np.uint8)
    present = np.flatnonzero(np.any(found, axis=0)).tolist()
    present = [value for value in present if value != ignored]
    given = tuple(name_of(name) for name in options["classes"].split(",")) if "classes" in options else ()
    if any(given.count(name) > 1 or not name for name in given):
        raise UserError(f"The option classes of {spec} repeats a name, or has an empty one.")
    if set(present) <= {0, 255} and len(given) in (0, 2) and ignored != 255 and 255 in present:
        table[0], table[255] = 0, 1
        return table, given or _BINARY
    if not given:
        if len(present) >= IGNORED:
            raise UserError(f"The masks of {spec} have {len(present)} values; expected class numbers.")
        table[present] = np.arange(len(present))
        return table, tuple(map(str, present))
    if unknown := [value for value in present if value >= len(given)]:
        row = next(place for place, own in enumerate(found) if own[unknown[0]])
        raise UserError(
            f"The mask {paths[row]} has the value {unknown[0]}, and {spec} names "
            f"{counted(len(given), 'class', 'classes')}, 0 to {len(given) - 1}. If its pixels have no class, add "
            f"ignore={unknown[0]}."
        )
    numbers = [value for value in range(len(given)) if value != ignored]
    table[numbers] = np.arange(len(numbers))
    return table, tuple(given[value] for value in numbers)


def _from_coco(images: Sequence[Path], root: Path, options: Mapping[str, str], spec: str) -> _Made:
    """Return the same of polygons: later ones cover earlier ones, and other pixels are background."""
    path = to_path(options["coco"]).absolute()
    content = parsed(path)
    names = categories_of(content, path)
    described = {number: place_of(one, path) for number, one in images_of(content, path).items()}
    shapes: dict[int, list[tuple[int, Any]]] = {}
    for one in content["annotations"]:
        number = whole_number(one.get("image_id"), "an annotation with the image_id", path)
        category = whole_number(one.get("category_id"), "an annotation with the category_id", path)
        shapes.setdefault(number, []).append((category, one.get("segmentation")))
    places = {category: place + 1 for place, category in enumerate(sorted(names))}
    classes = (BACKGROUND, *(names[category] for category in sorted(names)))
    if len(set(classes)) < len(classes) or len(classes) >= IGNORED:
        raise UserError(f"The categories of {path} repeat a name, or there are more than {IGNORED - 2}.")
    by_name = {name: number for number, (name, _) in described.items()}
    kept = [one for one in images if one.relative_to(root).as_posix() in by_name]
    if not kept:
        raise UserError(f"None of the images of {path} is in {root}.")
    numbers = [by_name[one.relative_to(root).as_posix()] for one in kept]
    for number, image in zip(numbers, kept, strict=True):
        _check_size(described[number][1], image, path)
        _check_shapes(shapes.get(number, []), described[number][0], places, path)

    def read(row: int) -> Mask:
        _, (width, height) = described[numbers[row]]
        return _drawn(shapes.get(numbers[row], []), places, width, height)

    values = np.array(
        [np.bincount(read(row).ravel(), minlength=len(classes)) > 0 for row in range(len(kept))], np.int64
    )
    stamped = [hashlib.sha256(repr(shapes.get(number)).encode()).hexdigest() for number in numbers]
    left = [str(one) for one in images if one.relative_to(root).as_posix() not in by_name]
    return kept, read, stamped, classes, values, _missing(left)


def _check_size(size: tuple[int, int], image: Path, path: Path) -> None:
    """Check that polygons are drawn for an image as large as it is, so that masks take no more memory than images."""
    found = size_of(image)
    if found is not None and found != size:
        raise UserError(
            f"{path} says that {image} is {size[0]} x {size[1]} pixels, but upright it is {found[0]} x {found[1]}; "
            "make them equal."
        )
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(f"{path} says that {image} is {size[0]} x {size[1]} pixels; at most {MOST_PIXELS} are read.")


def _check_shapes(shapes: Sequence[tuple[int, Any]], name: str, places: Mapping[int, int], path: Path) -> None:
    for category, polygons in shapes:
        if category not in places:
            raise UserError(f"{path} has an annotation of {name} with the unknown category {category}.")
        if polygons is None:
            raise UserError(f"{path} has an annotation of {name} without a segmentation.")
        if not isinstance(polygons, list):
            raise UserError(
                f"{path} has a run-length mask of {name}; only polygons are read. Convert it to mask images."
            )
        for polygon in polygons:
            numeric = isinstance(polygon, list) and all(
                type(one) in (int, float) and abs(one) < LARGEST_COORDINATE for one in polygon
            )
            if not numeric or len(polygon) < 6 or len(polygon) % 2:
                raise UserError(f"{path} has a polygon of {name} that is not x and y of three points or more.")


def _drawn(shapes: Sequence[tuple[int, Any]], places: Mapping[int, int], width: int, height: int) -> Mask:
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    for category, polygons in shapes:
        for polygon in polygons:
            draw.polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], fill=places[category])
    return np.asarray(image).astype(np.uint8)


def _index(kept: Sequence[Path], root: Path, options: Mapping[str, str], spec: str) -> dict[str, list[str]]:
    """Return the site and the group of each image from the columns of a table."""
    wanted = {name: options[name] for name in ("site", "group") if name in options}
    if not wanted:
        return {}
    if "index" not in options:
        raise UserError(f"{spec} needs index=FILE.csv, a table with the {quoted(sorted(wanted))} of each image.")
    path = to_path(options["index"])
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = list(reader.fieldnames or ())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table: {error}.") from None
    for column in wanted.values():
        if column not in header:
            raise UserError(f"{path} has no column {column!r}. {suggest(column, header)}")
    for key in header:
        by_image = {str(row[key] or ""): row for row in rows}
        named = [_named(one, root, by_image) for one in kept]
        if all(name is not None for name in named):
            return {
                name: [str(by_image[str(one)][column] or "").strip() for one in named]
                for name, column in wanted.items()
            }
    raise UserError(f"No column of {path} names all images of {root}, by their file names with or without the ending.")


def _named(image: Path, root: Path, known: Mapping[str, Any]) -> str | None:
    inside = image.relative_to(root)
    for name in (inside.as_posix(), inside.with_suffix("").as_posix(), image.name, image.stem):
        if name in known:
            return name
    return None


def _absolute(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options with absolute paths, so that a run can be resumed from another folder."""
    paths = ("masks", "coco", "index")
    return {name: str(to_path(value).resolve()) if name in paths else value for name, value in options.items()}
