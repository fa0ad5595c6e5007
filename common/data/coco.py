"""`coco:FILE.json?images=FOLDER`: images with boxes in COCO's format of instances."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhead.data.boxes import BOX_OPTIONS, LARGEST_SIDE, Box, Drawing, bytes_of, path_inside, samples_of_boxes
from fedhead.data.labels import name_of
from fedhead.data.samples import LeftOut, Samples, sources
from fedhead.data.specs import split_options, to_path
from fedhead.errors import UserError
from fedhead.wording import one_line

MOST_BYTES = 2**30

_EXAMPLES = 3


@dataclass(frozen=True)
class CocoFile:
    """The images and categories of a file in COCO's format.

    Attributes:
        root: the folder of the images.
        images: the id of each image by its path below `root`.
        categories: the id of each category by its name.
    """

    root: Path
    images: Mapping[str, int]
    categories: Mapping[str, int]


def open_coco(argument: str) -> CocoFile:
    """Return the images and categories of `FILE.json?images=FOLDER`, whether or not the images exist.

    Raises:
        UserError: if the file cannot be read, is of another format, or has another option.
    """
    given, options = split_options(argument, {"images"}, f"coco:{argument}")
    path, root = to_path(given).absolute(), _folder_of(options, f"coco:{argument}")
    content = parsed(path)
    names = {number: path_inside(one.get("file_name"), str(path)) for number, one in images_of(content, path).items()}
    return CocoFile(root, _by_name(names, path), _by_name(categories_of(content, path), path))


def _by_name(names: Mapping[int, str], path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, name in names.items():
        if name in found:
            raise UserError(f"{path} has {name!r} under the ids {found[name]} and {number}; expected one.")
        found[name] = number
    return found


@sources.register("coco")
def load_coco(argument: str) -> Samples:
    """Images with boxes: `images=FOLDER` is the folder of the images that a file in COCO's format names.

    The categories of the file are the classes that it annotates. `iscrowd` boxes are neither learned from nor counted.
    `site=FIELD` and `group=FIELD` name a field of each image, such as `scanner`, or `subfolder`.
    """
    spec = f"coco:{argument}"
    given, options = split_options(argument, {*BOX_OPTIONS, "images"}, spec)
    path = to_path(given).absolute()
    root = _folder_of(options, spec)
    content = parsed(path)
    names = categories_of(content, path)
    boxes = _boxes(content, names, path)
    drawings: list[Drawing] = []
    missing: list[Drawing] = []
    for number, one in images_of(content, path).items():
        drawing = _drawing(one, boxes.pop(number, []), path)
        (drawings if (root / drawing.path).is_file() else missing).append(drawing)
    if boxes:
        raise UserError(f"{path} has annotations of the image {next(iter(boxes))!r}, which it does not list.")
    left = [LeftOut(len(missing), "images", f"not in {root}", tuple(one.path for one in missing[:_EXAMPLES]))]
    return samples_of_boxes(
        "coco",
        path,
        root,
        drawings,
        [names[number] for number in sorted(names)],
        {**options, "images": str(root.resolve())},
        left if missing else (),
    )


def _folder_of(options: Mapping[str, str], spec: str) -> Path:
    if "images" not in options:
        raise UserError(f"{spec} needs the folder of its images, as in 'coco:instances.json?images=FOLDER'.")
    root = to_path(options["images"]).absolute()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of images.")
    return root


def parsed(path: Path) -> Mapping[str, Any]:
    """Return the content of a file in COCO's format: lists of objects in `images`, `annotations` and `categories`.

    Raises:
        UserError: if it cannot be read, is too large, or is not in that format.
    """
    try:
        content = json.loads(bytes_of(path, MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(str(error), 100)}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's format: expected an object with images, annotations and categories.")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list) or not all(isinstance(one, dict) for one in content[name]):
            raise UserError(f"{path} is not in COCO's format: expected a list of objects in {name!r}.")
    return content


def whole_number(value: object, what: str, path: Path) -> int:
    """Return a whole number from a file.

    Raises:
        UserError: if it is none of 64 bits.
    """
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise UserError(f"{path} has {what} {one_line(repr(value), 80)}; expected a whole number.")
    return value


def categories_of(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Return the names of categories by their ids.

    Raises:
        UserError: if one is repeated or has no name.
    """
    names: dict[int, str] = {}
    for one in content["categories"]:
        number = whole_number(one.get("id"), "a category with the id", path)
        if number in names or not isinstance(one.get("name"), str):
            raise UserError(f"{path} repeats the category {number}, or gives it no name.")
        names[number] = name_of(one["name"])
    return names


def images_of(content: Mapping[str, Any], path: Path) -> dict[int, Mapping[str, Any]]:
    """Return the images by their ids.

    Raises:
        UserError: if one is repeated.
    """
    images: dict[int, Mapping[str, Any]] = {}
    for one in content["images"]:
        number = whole_number(one.get("id"), "an image with the id", path)
        if number in images:
            raise UserError(f"{path} lists the image {number} twice.")
        images[number] = one
    return images


def _boxes(content: Mapping[str, Any], names: Mapping[int, str], path: Path) -> dict[int, list[Box]]:
    boxes: dict[int, list[Box]] = {}
    for one in content["annotations"]:
        number = whole_number(one.get("image_id"), "an annotation with the image_id", path)
        category = whole_number(one.get("category_id"), "an annotation with the category_id", path)
        if category not in names:
            raise UserError(
                f"{path} has a box of the category {category} in the image {number}; its categories are "
                f"{', '.join(map(str, sorted(names)[:20]))}."
            )
        sides = one.get("bbox")
        numeric = isinstance(sides, list) and all(type(side) in (int, float) and abs(side) < 1e9 for side in sides)
        if not numeric or len(sides) != 4:
            raise UserError(
                f"{path} has the bbox {one_line(repr(sides), 80)} in the image {number}; expected [left, top, width, "
                "height] in pixels."
            )
        left, top, width, height = map(float, sides)
        crowd = one.get("iscrowd", 0) == 1
        boxes.setdefault(number, []).append(Box(names[category], left, top, left + width, top + height, crowd))
    return boxes


def place_of(one: Mapping[str, Any], path: Path) -> tuple[str, tuple[int, int]]:
    """Return the path of an image below the folder of images, and the width and height that a file states.

    Raises:
        UserError: if it is outside that folder, or has no such size.
    """
    name = path_inside(one.get("file_name"), str(path))
    size = (
        whole_number(one.get("width"), f"for {name} the width", path),
        whole_number(one.get("height"), f"for {name} the height", path),
    )
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise UserError(f"{path} says that {name} is {size[0]} x {size[1]} pixels; expected 1 to {LARGEST_SIDE} each.")
    return name, size


def _drawing(one: Mapping[str, Any], boxes: list[Box], path: Path) -> Drawing:
    name, size = place_of(one, path)
    about = {key: str(value) for key, value in one.items() if isinstance(value, str | int) and key != "file_name"}
    return Drawing(name, size, boxes, about=about)
