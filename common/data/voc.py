"""`voc:FOLDER`: images with boxes in the format of Pascal VOC."""

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

from fedhead.data.boxes import (
    BOX_OPTIONS,
    LARGEST_SIDE,
    Box,
    Drawing,
    bytes_of,
    samples_of_boxes,
    size_of,
)
from fedhead.data.labels import class_names, name_of
from fedhead.data.samples import LeftOut, Samples, sources
from fedhead.data.specs import split_options, to_path
from fedhead.data.walk import files_below, kind_of_file
from fedhead.errors import UserError
from fedhead.wording import one_line

MOST_BYTES = 2**23

_EXAMPLES = 3


@sources.register("voc")
def load_voc(argument: str) -> Samples:
    """Images with boxes in a folder with `JPEGImages` and `Annotations`, one XML file for each image.

    `split=train` takes the images that `ImageSets/Main/train.txt` lists. The classes are those of all boxes in the
    folder, or `classes=cat,dog`; name all that were annotated, also those without a box. Boxes marked as difficult are
    neither learned from nor counted. `site=FIELD` and `group=FIELD` name an element of each file, such as `folder` or
    `source/database`, or `subfolder`.
    """
    spec = f"voc:{argument}"
    given, options = split_options(argument, {*BOX_OPTIONS, "split"}, spec)
    folder = to_path(given).absolute()
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    for one in (images, annotations):
        if not one.is_dir():
            raise UserError(f"{folder} has no folder {one.name}; expected JPEGImages and Annotations.")
    pictures = {
        one.relative_to(images).with_suffix("").as_posix(): one.relative_to(images).as_posix()
        for one in files_below(images)
        if kind_of_file(one) == "image"
    }
    splits = _splits(folder)
    files = {
        one.relative_to(annotations).with_suffix("").as_posix(): one
        for one in files_below(annotations)
        if one.suffix.lower() == ".xml"
    }
    drawings = [
        _drawing(file, pictures[stem], images, splits.get(stem, "none" if splits else ""))
        for stem, file in files.items()
        if stem in pictures
    ]
    left = _left([name for stem, name in pictures.items() if stem not in files], "image", "no annotation file")
    left += _left([file.name for stem, file in files.items() if stem not in pictures], "file", "no image of that name")
    found = class_names(box.name for one in drawings for box in one.boxes)
    return samples_of_boxes("voc", folder, images, drawings, found, options, left)


def _left(names: list[str], what: str, reason: str) -> list[LeftOut]:
    things = what if len(names) == 1 else f"{what}s"
    return [LeftOut(len(names), things, reason, tuple(names[:_EXAMPLES]))] if names else []


def _splits(folder: Path) -> dict[str, str]:
    """Return the split of each image by its name without the ending; joint lists such as `trainval` are not used."""
    found: dict[str, str] = {}
    lists = folder / "ImageSets" / "Main"
    for name in ("train", "val", "test"):
        path = lists / f"{name}.txt"
        if path.is_file():
            lines = bytes_of(path, MOST_BYTES).decode(errors="replace").splitlines()
            found |= {line.split()[0]: name for line in lines if line.strip()}
    return found


class _NoTypes(TreeBuilder):
    """A builder that refuses document types, and so entities, which can expand without limit or name other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which is not allowed")


def _root(path: Path) -> Element:
    parser = XMLParser(target=_NoTypes())
    try:
        parser.feed(bytes_of(path, MOST_BYTES))
        root = parser.close()
    except (ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not a valid XML file: {one_line(str(error), 100)}.") from None
    assert isinstance(root, Element)
    return root


def _drawing(path: Path, picture: str, images: Path, split: str) -> Drawing:
    root = _root(path)
    size = tuple(_side(root.findtext(f"size/{name}"), path) for name in ("width", "height"))
    width, height = size if all(size) else size_of(images / picture) or (1, 1)
    about = {one.tag: (one.text or "").strip() for one in root if not len(one) and one.tag != "object"}
    about |= {f"source/{one.tag}": (one.text or "").strip() for one in root.findall("source/*")}
    boxes = [_box(one, path) for one in root.findall("object")]
    return Drawing(picture, (width, height), boxes, split=split, about=about)


def _side(text: str | None, path: Path) -> int:
    """Return a height or width in pixels; 0 if it is not given."""
    if text is None or text.strip() in ("", "0"):
        return 0
    value = _number(text, path)
    if not 1 <= value <= LARGEST_SIDE:
        raise UserError(f"{path} has an image of {text.strip()[:20]} pixels; expected 1 to {LARGEST_SIDE}.")
    return int(value)


def _number(text: str | None, path: Path) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise UserError(f"{path} has {one_line(repr(text), 80)} where a number of pixels is expected.") from None
    # Numbers that are not finite are left out with a reason.
    return value if abs(value) < 1e9 else float("nan")


def _box(one: Element, path: Path) -> Box:
    name = (one.findtext("name") or "").strip()
    if not name or one.find("bndbox") is None:
        raise UserError(f"{path} has an object without a name or without a bndbox.")
    sides = (one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    left, top, right, bottom = (_number(side, path) for side in sides)
    difficult = (one.findtext("difficult") or "0").strip() == "1"
    # The first pixel has the number 1, and both ends belong to the box.
    return Box(name_of(name), left - 1, top - 1, right, bottom, difficult)
