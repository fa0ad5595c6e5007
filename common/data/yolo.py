"""`yolo:DATA.yaml`: images with boxes in text files, as YOLO is trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhead.data.boxes import BOX_OPTIONS, Box, Drawing, bytes_of, path_inside, samples_of_boxes, size_of
from fedhead.data.labels import name_of
from fedhead.data.samples import Samples, sources
from fedhead.data.specs import split_options, to_path
from fedhead.data.walk import files_below, kind_of_file
from fedhead.errors import UserError
from fedhead.wording import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_BYTES = 2**20

SPLITS = ("train", "val", "test")


@sources.register("yolo")
def load_yolo(argument: str) -> Samples:
    """Images with boxes: a YAML file names the classes and, for each split, a folder or a list of images.

    The boxes of `images/a.jpg` are in `labels/a.txt`, lines of `class x y width height` with the centre and the size as
    shares of the image. An image without such a file has no boxes. `split=train` chooses a split; `site=subfolder` and
    `group=subfolder` take the folder of each image.
    """
    spec = f"yolo:{argument}"
    given, options = split_options(argument, {*BOX_OPTIONS, "split"}, spec)
    path = to_path(given).absolute()
    content = _parsed(path)
    names = _names(content, path)
    root = path.parent
    if content.get("path") not in (None, "", "."):
        root = path.parent / path_inside(content["path"], str(path))
    drawings = [
        _drawing(image, root, names, split)
        for split in SPLITS
        if content.get(split)
        for image in _images(content[split], root, path)
    ]
    return samples_of_boxes("yolo", path, root, drawings, names, options)


def _parsed(path: Path) -> "Mapping[str, Any]":
    try:
        import yaml
    except ImportError:
        raise UserError("Data in YOLO's format needs PyYAML: pip install pyyaml.") from None

    text = bytes_of(path, MOST_BYTES)
    try:
        # Aliases can expand without limit.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{path} has aliases, which are not allowed; write the values out.")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not YAML: {one_line(str(error), 100)}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in YOLO's format: expected the keys names and train.")
    return content


def _names(content: "Mapping[str, Any]", path: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(one, str | int) for one in names):
        raise UserError(f"{path} needs the names of the classes, as in 'names: [cat, dog]'.")
    return [name_of(one) for one in names]


def _images(given: object, root: Path, path: Path) -> list[Path]:
    """Return the images of a split."""
    found: list[Path] = []
    for one in given if isinstance(given, list) else [given]:
        where = root / path_inside(one, str(path))
        if where.is_dir():
            found += [file for file in files_below(where) if kind_of_file(file) == "image"]
        elif where.suffix == ".txt" and where.is_file():
            lines = bytes_of(where, 64 * MOST_BYTES).decode(errors="replace").splitlines()
            found += [root / path_inside(line.strip(), str(where)) for line in lines if line.strip()]
        else:
            shown = one_line(str(one), 200)
            raise UserError(f"{path} names {shown!r}, which is neither a folder nor a list of images (.txt) in {root}.")
    return found


def _drawing(image: Path, root: Path, names: list[str], split: str) -> Drawing:
    relative = image.relative_to(root)
    parts = list(relative.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    file = root.joinpath(*parts).with_suffix(".txt")
    width, height = size_of(image) or (1, 1)
    text = bytes_of(file, MOST_BYTES).decode(errors="replace") if file.is_file() else ""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    boxes = [_box(line, file, names, width, height) for line in lines]
    return Drawing(relative.as_posix(), (width, height), boxes, split=split)


def _box(line: list[str], file: Path, names: list[str], width: int, height: int) -> Box:
    shown = one_line(" ".join(line), 80)
    try:
        label = int(line[0])
        x, y, wide, high = (float(one) * side for one, side in zip(line[1:], (width, height) * 2, strict=True))
    except ValueError:
        raise UserError(f"{file} has the line {shown!r}; expected 'class x y width height'.") from None
    if not 0 <= label < len(names):
        raise UserError(f"{file} has a box of the class {label}; the classes are 0 to {len(names) - 1}.")
    return Box(names[label], x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
