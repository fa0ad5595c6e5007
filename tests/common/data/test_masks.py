"""Images with masks: class numbers, 0 and 255, polygons, and what is wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedhead.data import load_samples
from fedhead.data.masks import IGNORED
from fedhead.data.overlays import mask_image, overlay
from fedhead.errors import UserError


def write(folder: Path, masks: list[np.ndarray], *, mode: str = "L") -> str:
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for number, mask in enumerate(masks):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(mask.astype(np.uint8)).convert(mode).save(folder / "masks" / f"{number}.png")
    return f"masks:{folder / 'images'}?masks={folder / 'masks'}"


def mask(value: int, corner: int = 0) -> np.ndarray:
    made = np.zeros((4, 6), np.uint8)
    made[:2, :3], made[3, 5] = value, corner
    return made


def test_binary_masks_are_background_and_foreground(tmp_path: Path) -> None:
    samples = load_samples(write(tmp_path, [mask(255), mask(0)]))
    assert samples.classes == ("background", "foreground")
    assert samples.labels.tolist() == [[1, 1], [1, 0]]
    assert samples.annotation(0).tolist() == (mask(255) > 0).astype(int).tolist()


def test_masks_of_one_bit_are_binary(tmp_path: Path) -> None:
    assert load_samples(write(tmp_path, [mask(255)], mode="1")).classes == ("background", "foreground")


def test_numbers_are_named_and_ignored(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(1, 255), mask(2, 255)])
    samples = load_samples(f"{spec}&ignore=255&classes=none,mild,severe")
    assert samples.classes == ("none", "mild", "severe")
    assert samples.labels.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert samples.annotation(1)[3, 5] == IGNORED
    assert load_samples(f"{spec}&ignore=255").classes == ("0", "1", "2")


def test_a_changed_mask_changes_the_fingerprint(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255), mask(255)])
    before = load_samples(spec).fingerprint
    Image.fromarray(mask(0)).save(tmp_path / "masks" / "0.png")
    assert load_samples(spec).fingerprint != before


def test_sites_and_groups_come_from_a_table(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255), mask(255)])
    (tmp_path / "index.csv").write_text("id,lab,patient\n1,b,p\n0,a,p\n", encoding="utf-8")
    samples = load_samples(f"{spec}&index={tmp_path / 'index.csv'}&site=lab&group=patient")
    assert samples.sites == ["a", "b"]
    assert samples.groups == ["p", "p"]
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


def coco(folder: Path, **changes: object) -> str:
    (folder / "images").mkdir()
    Image.new("RGB", (6, 4)).save(folder / "images" / "a.png")
    Image.new("RGB", (6, 4)).save(folder / "images" / "b.png")
    content = {
        "images": [
            {"id": number, "file_name": name, "width": 6, "height": 4} for number, name in ((1, "a.png"), (2, "b.png"))
        ],
        "categories": [{"id": 7, "name": "cell"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}],
        **changes,
    }
    (folder / "coco.json").write_text(json.dumps(content), encoding="utf-8")
    return f"masks:{folder / 'images'}?coco={folder / 'coco.json'}"


def test_polygons_become_masks(tmp_path: Path) -> None:
    samples = load_samples(coco(tmp_path))
    assert samples.classes == ("background", "cell")
    assert samples.labels.tolist() == [[1, 1], [1, 0]]
    assert samples.annotation(0)[:3, :3].all()
    assert not samples.annotation(1).any()


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ({"category_id": 8, "segmentation": [[0, 0, 2, 0, 2, 2]]}, "unknown category 8"),
        ({"category_id": 7, "segmentation": {"counts": "x", "size": [4, 6]}}, "run-length"),
        ({"category_id": 7, "segmentation": [[0, 0, 2, 0]]}, "three points"),
        ({"category_id": "x", "segmentation": []}, "category_id 'x'; expected a whole number"),
        ({"category_id": 7}, "without a segmentation"),
        ({"category_id": 7, "segmentation": [[float("nan")] * 6]}, "three points"),
        ({"category_id": 7, "segmentation": [[10**400] * 6]}, "three points"),
        ({"category_id": 7, "segmentation": [[1e30] * 6]}, "three points"),
    ],
)
def test_wrong_polygons_are_refused(tmp_path: Path, annotation: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_samples(coco(tmp_path, annotations=[{"id": 1, "image_id": 1, **annotation}]))


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255)])
    Image.new("L", (5, 4)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"5 x 4 pixels, but its image .* 6 x 4"):
        load_samples(spec)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 100_000, "height": 100_000}, "100000 x 100000 pixels, but upright it is 6 x 4"),
        ({"width": 10**9}, "expected 1 to 100000 each"),
        ({"id": float("inf")}, "the id inf; expected a whole number"),
        ({"file_name": f"{'a' * 300}.jpg"}, "longer than a path can be"),
        ({"file_name": "../0.jpg"}, "outside the folder of images"),
    ],
)
def test_polygons_for_other_images_take_no_memory_and_are_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    spec = coco(tmp_path)
    content = json.loads((tmp_path / "coco.json").read_text())
    content["images"][0] |= changes
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        load_samples(spec)


def test_a_file_nested_without_end_is_no_annotation(tmp_path: Path) -> None:
    spec = coco(tmp_path)
    (tmp_path / "coco.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        load_samples(spec)


def test_a_mask_fits_its_image_upright(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255).T])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "0.jpg", exif=exif)
    samples = load_samples(spec)
    assert samples.read(0).size == (4, 6)
    assert samples.annotation(0).shape == (6, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("&classes=none,mild", "has the value 2, and .* names 2 classes"),
        ("&ignore=red", "a number from 0 to 255"),
        ("&site=lab", "needs index=FILE"),
        ("&classes=a,a,b", "repeats a name"),
        ("&coco=x.json", "either masks=FOLDER or coco"),
        ("&colour=1", "unknown option"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_samples(write(tmp_path, [mask(1), mask(2)]) + options)


def test_images_without_masks_are_left_out_and_named(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255), mask(255)])
    (tmp_path / "masks" / "1.png").unlink()
    samples = load_samples(spec)
    assert len(samples) == 1
    assert "no mask" in str(samples.left_out[0])
    (tmp_path / "masks" / "0.png").unlink()
    with pytest.raises(UserError, match="has a mask of the same name"):
        load_samples(spec)


def test_colour_and_damaged_masks_are_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, [mask(255)])
    Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match="mode RGB"):
        load_samples(spec)
    (tmp_path / "masks" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match="cannot be read"):
        load_samples(spec)


def test_drawn_masks_keep_their_numbers(tmp_path: Path) -> None:
    numbers = mask(2, 1)
    mask_image(numbers).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as opened:
        assert opened.mode == "P"
        assert np.array_equal(np.asarray(opened), numbers)
    drawn = np.asarray(overlay(Image.new("RGB", (6, 4), (9, 9, 9)), numbers))
    assert (drawn[0, 0] != 9).any()
    assert (drawn[2, 1] == 9).all() or (drawn[2, 1] > 200).any()
