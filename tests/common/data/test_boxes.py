import json

import numpy as np
import pytest
from PIL import Image

from fedhead.data import UnreadableSampleError, load_samples
from fedhead.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    for name, size in (("a", (100, 50)), ("sub/b", (40, 80)), ("sub/c", (64, 64))):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 90).save(path)
    return folder


def coco(pictures, **changes):
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50, "scanner": "x"},
            {"id": 7, "file_name": "sub/b.png", "width": 40, "height": 80, "scanner": "y"},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 9, "bbox": [10, 5, 50, 25]},
            {"image_id": 1, "category_id": 3, "bbox": [0, 0, 100, 50], "iscrowd": 1},
        ],
        **changes,
    }
    path = pictures.parent / "instances.json"
    path.write_text(json.dumps(content))
    return f"coco:{path}?images={pictures}"


def test_coco_boxes_are_shares_of_their_image(pictures):
    samples = load_samples(coco(pictures))
    assert samples.classes == ("cat", "dog")
    first, second = samples.annotation(0), samples.annotation(1)
    np.testing.assert_allclose(first.corners[0], [0.1, 0.1, 0.6, 0.6])
    assert first.labels.tolist() == [1, 0]
    assert first.ignored.tolist() == [False, True]
    assert len(second) == 0
    assert samples.labels.tolist() == [[0, 1], [0, 0]]
    assert "1 of 2 images have no boxes" in samples.cautions[0]
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


def test_the_same_boxes_in_three_formats(pictures):
    folder = pictures.parent
    (folder / "Annotations/sub").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(pictures)
    element = "<name>dog</name><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>60</xmax><ymax>30</ymax></bndbox>"
    text = "<annotation><size><width>100</width><height>50</height></size><object>{}</object></annotation>"
    (folder / "Annotations/a.xml").write_text(text.format(element))
    (folder / "labels").mkdir()
    (folder / "labels/a.txt").write_text("1 0.35 0.35 0.5 0.5\n")
    (folder / "data.yaml").write_text("names: {0: cat, 1: dog}\ntrain: images\n")
    voc = load_samples(f"voc:{folder}?classes=cat,dog")
    yolo = load_samples(f"yolo:{folder}/data.yaml")
    for samples in (voc, yolo, load_samples(coco(pictures))):
        boxes = samples.annotation(0)
        np.testing.assert_allclose(boxes.corners[0], [0.1, 0.1, 0.6, 0.6], atol=1e-12)
        assert boxes.labels[0] == 1
        assert samples.classes == ("cat", "dog")
        assert samples.annotated == "boxes"
    assert [one.reason for one in voc.left_out] == ["no annotation file"]
    with pytest.raises(UserError, match="is not divided into splits; leave out split=train"):
        load_samples(f"voc:{folder}?split=train")
    assert len(yolo) == 3
    assert len(load_samples(f"yolo:{folder}/data.yaml?empty=no")) == 1


def test_sites_and_groups(pictures):
    samples = load_samples(coco(pictures) + "&site=scanner&group=subfolder")
    assert samples.sites == ["x", "y"]
    assert samples.groups == [".", "sub"]
    with pytest.raises(UserError, match="has no 'hospital' to name its site"):
        load_samples(coco(pictures) + "&site=hospital")


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [([0, 0, 0, 9], "no area"), ([200, 0, 9, 9], "outside its image"), ([5, 5, -3, 4], "no area")],
)
def test_useless_boxes_are_left_out(pictures, bbox, reason):
    boxes = [{"image_id": 1, "category_id": 9, "bbox": one} for one in (bbox, [0, 0, 9, 9])]
    samples = load_samples(coco(pictures, annotations=boxes))
    assert [(one.count, one.reason) for one in samples.left_out] == [(1, reason)]
    assert len(samples.annotation(0)) == 1


def test_boxes_beyond_the_edge_are_cut(pictures):
    boxes = [{"image_id": 1, "category_id": 9, "bbox": [90, 0, 30, 50]}]
    samples = load_samples(coco(pictures, annotations=boxes))
    np.testing.assert_allclose(samples.annotation(0).corners, [[0.9, 0, 1, 1]])
    assert any("reach beyond their image" in one for one in samples.cautions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "of the category 5"),
        ({"annotations": [{"image_id": 2, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "image 2, which it does not list"),
        ({"annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, "1", 1]}]}, "expected .left, top, width"),
        ({"annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1e12, 1]}]}, "expected .left, top, width"),
        ({"images": [{"id": 1, "file_name": "../x.png", "width": 9, "height": 9}], "annotations": []}, "outside the"),
        ({"images": [{"id": 1, "file_name": "/etc/x.png", "width": 9, "height": 9}], "annotations": []}, "outside the"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 9}], "annotations": []}, "0 x 9 pixels"),
        ({"images": [{"id": True, "file_name": "a.png"}]}, "expected a whole number"),
        ({"images": 3}, "expected a list of objects in 'images'"),
        ({"categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "cat"}]}, "repeat a name"),
    ],
)
def test_wrong_coco_files_are_refused_in_a_sentence(pictures, changes, message):
    with pytest.raises(UserError, match=message):
        load_samples(coco(pictures, **changes))


def test_deep_json_is_refused(pictures):
    spec = coco(pictures)
    (pictures.parent / "instances.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not JSON"):
        load_samples(spec)


def test_an_image_of_another_size_is_unreadable(pictures):
    images = [{"id": 1, "file_name": "a.png", "width": 50, "height": 100}]
    samples = load_samples(coco(pictures, images=images, annotations=[]))
    with pytest.raises(UnreadableSampleError, match="100 x 50 pixels upright"):
        samples.read(0)


def test_xml_entities_are_refused(pictures):
    folder = pictures.parent
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").symlink_to(pictures)
    bomb = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]><annotation>&y;</annotation>'
    for text, message in ((bomb, "document type"), ("<annotation>", "not a valid XML"), ("\0", "not a valid XML")):
        (folder / "Annotations/a.xml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_samples(f"voc:{folder}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: &a [cat]\ntrain: *a", "has aliases"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("names: [cat]\ntrain: ../images", "outside the folder"),
        ("names: [cat]\ntrain: [3]", "expected a file name"),
        ("names: {0: cat, 5: dog}\ntrain: images", "needs the names of the classes"),
        ("names: [cat]\ntrain: elsewhere", "neither a folder nor a list"),
        ("3", "expected the keys names and train"),
    ],
)
def test_wrong_yolo_files_are_refused_in_a_sentence(pictures, text, message):
    path = pictures.parent / "data.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_samples(f"yolo:{path}")


def test_yolo_lines_are_checked(pictures):
    folder = pictures.parent
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    for line, message in (("0 0.5 0.5", "expected 'class x y width height'"), ("1 0.5 0.5 1 1", "of the class 1")):
        (folder / "labels/a.txt").write_text(line)
        with pytest.raises(UserError, match=message):
            load_samples(f"yolo:{folder}/data.yaml")
