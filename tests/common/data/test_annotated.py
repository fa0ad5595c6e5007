import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedhead.cli import app


def look(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "80"})


def summary(spec: str) -> dict[str, Any]:
    result = look(spec, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def words_of(spec: str) -> str:
    result = look(spec)
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def test_conversations_have_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    words = words_of(f"jsonl:{path}")
    assert "Rows 2 conversations" in words
    assert "class" not in words


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Four images, of which one has no mask and one has pixels without a class."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(4):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        mask = np.zeros((10, 20), np.uint8)
        mask[:, : 5 * number] = 1
        mask[0, 19] = 255 if number == 2 else 0
        if number:
            Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def test_masks_are_counted_by_pixels_and_images(masked: Path) -> None:
    spec = f"masks:{masked}/images?masks={masked}/masks&ignore=255&classes=background,cell"
    found = summary(spec)
    assert found["classes"] == {"background": 3, "cell": 3}
    assert found["annotated"] == {"marks": {"background": 299, "cell": 300}, "images": 3, "without_class": 1}
    assert ["1 image left out (no mask)" in one for one in found["left_out"]] == [True]
    text = words_of(spec)
    for words in ("3 images with masks of 2 classes", "cell 3 100.0 % 50.1 %", "600 in 3 masks; 0.2 % without a class"):
        assert words in text


def test_the_page_shows_masks_on_images(masked: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    spec = f"masks:{masked}/images?masks={masked}/masks&ignore=255&classes=background,cell"
    assert look(spec, "--html", str(page)).exit_code == 0
    assert page.read_text().count("<img") == 6


def drawings(root: Path) -> str:
    """Write three images: one with two boxes and a crowd, one with a box beyond its edge, one without boxes."""
    (root / "images").mkdir()
    boxes = [(1, [10, 10, 50, 20], 0), (1, [2, 2, 2, 2], 0), (1, [0, 0, 9, 9], 1), (2, [90, 40, 30, 10], 0)]
    images = [{"id": one, "file_name": f"{one}.png", "width": 100, "height": 50} for one in (1, 2, 3)]
    annotations = [
        {"id": row, "image_id": image, "category_id": 5, "bbox": sides, "iscrowd": crowd}
        for row, (image, sides, crowd) in enumerate(boxes)
    ]
    for one in (1, 2, 3):
        Image.new("RGB", (100, 50), (one, 0, 0)).save(root / "images" / f"{one}.png")
    categories = [{"id": 5, "name": "cell"}, {"id": 6, "name": "rod"}]
    (root / "boxes.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return f"coco:{root}/boxes.json?images={root}/images"


def test_boxes_are_counted_by_class_and_image(tmp_path: Path) -> None:
    spec = drawings(tmp_path)
    found = summary(spec)
    assert found["annotated"]["marks"] == {"cell": 3, "rod": 0}
    assert (found["annotated"]["ignored"], found["annotated"]["empty"], found["annotated"]["small"]) == (1, 1, 1)
    assert found["annotated"]["per_image"] == {"least": 0, "median": 1, "greatest": 3}
    assert found["annotated"]["area"]["greatest"] == pytest.approx(0.2)
    text = words_of(spec)
    for words in (
        "3 images with boxes of 2 classes",
        "3, and 1 crowds or difficult objects; 0 to 3 (half up to 1) per image",
        "No boxes 1 image",
        "0.08 % to 20 % of the image's area",
        "Classes without a box, which nothing is learned of: 'rod'.",
        "reach beyond their image",
        "1 of the boxes cover less than 0.1 % of their image",
    ):
        assert words in text


def test_the_page_shows_boxes_on_images(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert look(drawings(tmp_path), "--html", str(page)).exit_code == 0
    assert page.read_text().count("<img") == 2


def test_sentences_have_entities_by_type(tmp_path: Path) -> None:
    path = tmp_path / "t.conll"
    path.write_text("Ann B-PER\nLee I-PER\nmet O\nBo I-PER\n\nrain O\n\nin O\nRome S-LOC\n")
    found = summary(f"conll:{path}")["annotated"]
    assert found == {
        "marks": {"LOC": 1, "PER": 2},
        "sentences": 3,
        "words": {"least": 1, "median": 2, "greatest": 4},
        "plain": 1,
    }
    text = words_of(f"conll:{path}")
    assert "7 words of sentences, with 4 tags" in text
    assert "Entities 3: LOC 1, PER 2" in text


def test_times_have_events_and_censored_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,t,e\n1,5,1\n2,8,0\n3,9,1\n")
    spec = f"csv:{path}?time=t&event=e"
    found = summary(spec)
    assert (found["annotated"]["events"], found["annotated"]["censored"]) == (2, 1)
    assert found["annotated"]["event_times"] == {"least": 5, "median": 7, "greatest": 9, "mean": 7}
    assert not found["cautions"]
    assert "2 (66.7 %); 1 row followed without one (censored)" in words_of(spec)
    path.write_text("x,t,e\n1,5,0\n2,8,0\n")
    assert any("no events" in one for one in summary(spec)["cautions"])


def test_plain_classes_have_no_annotations() -> None:
    assert summary("digits")["annotated"] is None
