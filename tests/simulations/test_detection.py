"""Detection runs end to end on drawn images with boxes."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.data.inputs import find_inputs
from fedhead.errors import UserError
from fedhead.export import describe_export, export_model
from fedhead.membership import join, leave
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model, predict_inputs
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate
from fedhead.tasks.detection import Detection


def draw(folder: Path, count: int, seed: int = 0) -> str:
    """Write images with a bright square and a dark disc each in COCO's format, and return the data spec."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, boxes = [], []
    for number in range(count):
        pixels = (generator.integers(90, 130, (64, 96, 3))).astype(np.uint8)
        image = Image.fromarray(pixels)
        pen = ImageDraw.Draw(image)
        for category, side, start in ((1, 24, 0), (2, 18, 48)):
            left, top = start + int(generator.integers(0, 20)), int(generator.integers(0, 36))
            shape = [left, top, left + side, top + side]
            pen.rectangle(shape, fill=(240, 220, 40)) if category == 1 else pen.ellipse(shape, fill=(20, 10, 60))
            boxes.append({"image_id": number, "category_id": category, "bbox": [left, top, side + 1, side + 1]})
        image.save(folder / "images" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": 96, "height": 64, "lab": f"lab {number % 3}"}
        )
    names = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    return f"coco:{path}?images={folder / 'images'}&site=lab"


def run(data: str, out: Path, **changes: object) -> RunResult:
    values = {
        "task": "detection",
        "backbone": "torchvision:mobilenet_v2",
        "weights": "random",
        "layer": "features.2+features.3+features.4:map@96",
        "simulation": {"data": data, "sites": 3, "partition": "iid", "min_rows": 4, "min_class_count": 2},
    }
    return simulate(RunConfig(**{**values, **changes}), out=out)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("drawn"), 60)


@pytest.fixture(scope="module")
def finished(drawn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(drawn, out, with_backbone=True)
    return out


def test_shapes_are_found(drawn: str, tmp_path: Path) -> None:
    simulation = {"data": drawn, "partition": "iid", "sites": 3, "min_rows": 4, "min_class_count": 2, "examples": 2}
    result = run(drawn, tmp_path / "run", simulation=simulation)
    assert result.evaluation.ap50.value > 0.55
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("<img") == 4
    assert result.model.classes[:3] == ("square", "disc", "square: objectness")
    assert "AP50 by class" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "detection" in (tmp_path / "run" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_rounds_are_judged_by_average_precision(drawn: str, tmp_path: Path) -> None:
    result = run(drawn, tmp_path / "run", rounds=2, local={"lr": 0.003, "batch_size": 8})
    assert [one.train_loss is None for one in result.history] == [True, False, False]
    assert result.history[2].train_loss < result.history[1].train_loss
    assert result.evaluation.ap50.value > 0.5
    for choice in result.outcome.choices:
        old, new = (one["score"] for one in choice["rivals"])
        assert result.evaluation.ap50.value == pytest.approx(new if result.outcome.kept_round else old, abs=1e-6)


def test_rounds_from_zeros_find_shapes(drawn: str, tmp_path: Path) -> None:
    result = run(drawn, tmp_path / "run", rounds=5, init="zeros", local={"lr": 0.003, "batch_size": 4})
    assert not result.outcome.choices
    assert result.history[5].train_loss < result.history[1].train_loss
    assert result.evaluation.ap50.value > 0.2


def test_sites_of_the_data_and_secure_sums_give_the_same_head(drawn: str, tmp_path: Path) -> None:
    plain = run(drawn, tmp_path / "plain")
    sites = {"data": drawn, "partition": "folder", "min_rows": 4, "min_class_count": 2}
    masked = run(drawn, tmp_path / "masked", simulation=sites, privacy={"secure_sum": True, "max_colluding": 0})
    difference = (plain.model.head.weight - masked.model.head.weight).detach()
    assert float(difference.abs().max()) < 1e-4 * float(plain.model.head.weight.abs().max())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 3, "strategy": {"name": "pooled-lbfgs"}}, "one exchange already solves"),
        ({"layer": "features.1"}, "choose layers with ':map'"),
        ({"privacy": {"epsilon": 1.0}}, "Differential privacy"),
        ({"init": "ridge"}, "'ridge'"),
        ({"classes": ["square", "disc", "star"]}, "does not annotate the class 'star'"),
        ({"classes": ["square"]}, "of the class 'disc', which this run does not know"),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    drawn: str, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(drawn, tmp_path / "run", **changes)


def test_a_model_finds_boxes_and_is_evaluated_and_exported(finished: Path, tmp_path: Path) -> None:
    model = TransferModel.load(finished)
    fresh = load_samples(draw(tmp_path / "fresh", 8, seed=1))
    assert evaluate_model(model, fresh).report.ap50.value > 0.5
    (one,) = predict_inputs(model, find_inputs([fresh.name(0)], "image"))
    assert one.decoded == model.predict([fresh.read(0)])[0]
    assert {"class", "score", "bbox"} == one.decision[0].keys()
    assert one.answers == tuple(float(sum(box["class"] == name for box in one.decision)) for name in ("square", "disc"))
    exported = export_model(model, "torch-export", tmp_path / "model.pt2")
    assert exported.difference < 1e-4
    assert describe_export(model)["output"]["shape"] == ["batch", 24 * 24, 2, 5]


@pytest.mark.slow
def test_an_exported_program_with_suppression_finds_the_boxes_of_predict(finished: Path, tmp_path: Path) -> None:
    model = TransferModel.load(finished)
    fresh = load_samples(draw(tmp_path / "fresh", 5, seed=1))
    out = tmp_path / "cells.onnx"
    arguments = ["export", str(finished), "--format", "onnx", "--nms", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(out)
    images = [fresh.read(row) for row in range(len(fresh))]
    pixels = model.backbone.preprocessing.collate([model.backbone.preprocessing(one) for one in images])
    found = session.run(None, {"pixels": pixels.numpy()})
    geometry = model.backbone.geometry
    with torch.no_grad():
        outputs = model.outputs(model.backbone.features(pixels)).float()
    for own, boxes, scores, labels in zip(outputs, *found, strict=True):
        expected = model.task.found(own, geometry)
        count = int((labels >= 0).sum())
        assert count == len(expected.labels) > 1
        assert (scores[count:] == 0).all()
        np.testing.assert_array_equal(labels[:count], expected.labels)
        np.testing.assert_allclose(scores[:count], expected.scores, atol=1e-4)
        np.testing.assert_allclose(boxes[:count], expected.corners, atol=1e-4)
    for written, boxes in zip(model.predict(images), found[0], strict=True):
        sides = np.array([one["bbox"] for one in written])
        corners = np.hstack([sides[:, :2], sides[:, :2] + sides[:, 2:]]) / np.tile([96, 64], 2)
        np.testing.assert_allclose(boxes[: len(corners)], corners, atol=0.011 / 64)
    described = json.loads(session.get_modelmeta().custom_metadata_map["fedhead"])
    assert described["classes"] == ["square", "disc"]
    assert described["output"]["shapes"]["boxes"] == ["batch", 100, 4]
    assert [one.shape for one in session.get_outputs()] == [["batch", 100, 4], ["batch", 100], ["batch", 100]]


def test_suppression_is_for_onnx(finished: Path, tmp_path: Path) -> None:
    arguments = ["export", str(finished), "--format", "torch-export", "--nms", "--out", str(tmp_path / "model.pt2")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--nms is for --format onnx" in result.output


def test_pycocotools_evaluates_the_written_boxes(finished: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "fresh", 8, seed=1)
    path = tmp_path / "fresh" / "boxes.json"
    content = json.loads(path.read_text())
    for one in [*content["images"], *content["annotations"]]:
        one["id" if "file_name" in one else "image_id"] += 500
    for one in [*content["categories"], *content["annotations"]]:
        one["id" if "name" in one else "category_id"] *= 7
    content["annotations"] = [
        {**one, "id": row, "iscrowd": 0, "area": 400} for row, one in enumerate(content["annotations"], 1)
    ]
    path.write_text(json.dumps(content))
    out = tmp_path / "out.json"
    asked = data.removesuffix("&site=lab")
    result = CliRunner().invoke(app, ["predict", str(finished), asked, "--out", str(out)])
    assert result.exit_code == 0, result.output
    truth = COCO(str(path))
    judged = COCOeval(truth, truth.loadRes(str(out)), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    assert judged.stats[1] > 0.8
    boxes = json.loads(out.read_text())
    model, fresh = TransferModel.load(finished), load_samples(data)
    for row in range(len(fresh)):
        number = 500 + int(Path(fresh.name(row)).stem)
        given = [[*one["bbox"], one["score"]] for one in boxes if one["image_id"] == number]
        expected = [[*one["bbox"], one["score"]] for one in model.predict([fresh.read(row)])[0]]
        np.testing.assert_allclose(given, expected, atol=0.011, rtol=0)
    assert {one["category_id"] for one in boxes} == {7, 14}
    assert {one["image_id"] for one in boxes} == set(range(500, 508))


def test_written_boxes_of_a_folder_go_by_name(finished: Path, tmp_path: Path) -> None:
    draw(tmp_path / "fresh", 2, seed=1)
    images = tmp_path / "fresh" / "images"
    (images / "2.png").write_bytes(b"no image")
    result = CliRunner().invoke(app, ["predict", str(finished), str(images), "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 1
    assert "they have no boxes in the file" in result.output
    boxes = json.loads((tmp_path / "out.json").read_text())
    assert {one["image_id"] for one in boxes} == {str(images / "0.png"), str(images / "1.png")}
    assert {one["category_id"] for one in boxes} <= {1, 2}


@pytest.mark.parametrize(
    ("changed", "more", "said"),
    [
        (("square", "oblong"), [], "has no category 'square'"),
        (("1.png", "0.png"), [], "under the ids 0 and 1"),
        (("", ""), ["images"], "one 'coco:' path and no others"),
        (("", ""), [], None),
    ],
)
def test_ids_that_do_not_fit_are_rejected(
    finished: Path, tmp_path: Path, changed: tuple[str, str], more: list[str], said: str | None
) -> None:
    data = draw(tmp_path / "fresh", 2, seed=1).removesuffix("&site=lab")
    path = tmp_path / "fresh" / "boxes.json"
    path.write_text(path.read_text().replace(*changed) if changed[0] else path.read_text())
    paths = [data, *(str(tmp_path / "fresh" / one) for one in more)]
    result = CliRunner().invoke(app, ["predict", str(finished), *paths, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == (2 if said else 0)
    assert said is None or said in " ".join(result.output.split())
    assert (tmp_path / "out.json").exists() == (said is None)


def test_a_site_joins_and_leaves_exactly(drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another file's guest has a ledger of its own.
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    before = run(drawn, tmp_path / "run").model.head.weight.detach()
    guest = draw(tmp_path / "guest", 24, seed=2)
    joined = join(tmp_path / "run", "laboratory", guest, min_rows=4, min_class_count=2)
    assert joined.rows == 24
    assert joined.rows_after - joined.rows_before == 24
    assert joined.summary()["classes"] == list(Detection.shown(joined.classes)) != list(joined.classes)
    leave(tmp_path / "run", "laboratory")
    after = TransferModel.load(tmp_path / "run").head.weight.detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
