"""Detection runs end to end on drawn images with boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

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


def test_shapes_are_found(drawn: str, tmp_path: Path) -> None:
    result = run(drawn, tmp_path / "run")
    assert result.evaluation.ap50.value > 0.55
    assert result.model.classes[:3] == ("square", "disc", "objectness")
    assert "AP50 by class" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "detection" in (tmp_path / "run" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_sites_of_the_data_and_secure_sums_give_the_same_head(drawn: str, tmp_path: Path) -> None:
    plain = run(drawn, tmp_path / "plain")
    sites = {"data": drawn, "partition": "folder", "min_rows": 4, "min_class_count": 2}
    masked = run(drawn, tmp_path / "masked", simulation=sites, privacy={"secure_sum": True, "max_colluding": 0})
    difference = (plain.model.head.weight - masked.model.head.weight).detach()
    assert float(difference.abs().max()) < 1e-4 * float(plain.model.head.weight.abs().max())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 3}, "set rounds to 0"),
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


def test_a_model_finds_boxes_and_is_evaluated_and_exported(drawn: str, tmp_path: Path) -> None:
    run(drawn, tmp_path / "run", with_backbone=True)
    model = TransferModel.load(tmp_path / "run")
    fresh = load_samples(draw(tmp_path / "fresh", 8, seed=1))
    assert evaluate_model(model, fresh).report.ap50.value > 0.5
    (one,) = predict_inputs(model, find_inputs([fresh.name(0)], "image"))
    assert one.decoded == model.predict([fresh.read(0)])[0]
    assert {"class", "score", "bbox"} == one.decision[0].keys()
    assert one.answers == tuple(float(sum(box["class"] == name for box in one.decision)) for name in ("square", "disc"))
    exported = export_model(model, "torch-export", tmp_path / "model.pt2")
    assert exported.difference < 1e-4
    assert describe_export(model)["output"]["shape"] == ["batch", 24 * 24, 2, 5]


def test_a_site_joins_and_leaves_exactly(drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another file's guest has a ledger of its own.
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    before = run(drawn, tmp_path / "run").model.head.weight.detach()
    guest = draw(tmp_path / "guest", 24, seed=2)
    joined = join(tmp_path / "run", "laboratory", guest, min_rows=4, min_class_count=2)
    assert joined.rows == 24
    leave(tmp_path / "run", "laboratory")
    after = TransferModel.load(tmp_path / "run").head.weight.detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
