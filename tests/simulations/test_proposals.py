"""Detection runs end to end on the proposals of a detector."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import Image
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.export import export_model
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model
from fedhead.server.app import prepare
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate
from fedhead.tasks.detection import Detection

from .test_detection import draw

SPEC = "torchvision:ssdlite320_mobilenet_v3_large"

ENOUGH = {"partition": "iid", "min_rows": 4, "min_class_count": 2}

OWN = """
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from fedhead.backbones.detectors import detector_backbone

def tiny():
    layers = [(3, 16), (16, 24), (24, 32)]
    trunk = nn.Sequential(*[
        nn.Sequential(nn.Conv2d(one, two, 3, 2, 1), nn.GroupNorm(4, two), nn.LeakyReLU(0.2)) for one, two in layers
    ])
    trunk.out_channels = 32
    anchors = AnchorGenerator(((16, 24, 32),), ((1.0,),))
    model = RetinaNet(trunk, 4, min_size=96, max_size=96, anchor_generator=anchors)
    for one in model.head.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.kaiming_normal_(one.weight)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.001)
    return detector_backbone(model, number=200)
"""


def run(data: str, out: Path, **changes: object) -> RunResult:
    values = {
        "task": "detection",
        "backbone": "python:tiny_detector:tiny",
        "simulation": {"data": data, "sites": 3, **ENOUGH},
    }
    return simulate(RunConfig(**{**values, **changes}), out=out)


@pytest.fixture(scope="module", autouse=True)
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny_detector.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("proposed"), 60)


@pytest.fixture(scope="module")
def finished(drawn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    # Random anchors find no shape by chance; the solved predictor tells and moves them.
    assert run(drawn, out, with_backbone=True).evaluation.ap50.value > 0.5
    return out


def test_a_run_has_its_report_and_card(finished: Path) -> None:
    assert "AP50 by class" in (finished / "report.html").read_text(encoding="utf-8")
    assert "python:tiny_detector:tiny" in (finished / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_secure_sums_give_the_same_head(drawn: str, finished: Path, tmp_path: Path) -> None:
    plain = TransferModel.load(finished).head
    masked = run(drawn, tmp_path / "masked", privacy={"secure_sum": True, "max_colluding": 0}).model.head
    difference = (plain.weight - masked.weight).detach()
    assert float(difference.abs().max()) < 1e-4 * float(plain.weight.detach().abs().max())


def test_a_model_finds_boxes_and_is_evaluated_and_exported(finished: Path, tmp_path: Path) -> None:
    model = TransferModel.load(finished)
    fresh = load_samples(draw(tmp_path / "fresh", 8, seed=1))
    assert evaluate_model(model, fresh).report.ap50.value > 0.4
    found = model.predict([fresh.read(0)])[0]
    assert {one["class"] for one in found} == {"square", "disc"}
    assert export_model(model, "state-dict", tmp_path / "model.safetensors").difference < 1e-4
    with pytest.raises(UserError, match="the number of its boxes depends on the image"):
        export_model(model, "torch-export", tmp_path / "model.pt2")


def test_rounds_start_from_the_solved_predictor(drawn: str, tmp_path: Path) -> None:
    result = run(drawn, tmp_path / "rounds", rounds=1, local={"epochs": 1, "batch_size": 8, "lr": 0.01})
    assert result.evaluation.ap50.value > 0.5


def test_boxes_are_drawn(finished: Path, tmp_path: Path) -> None:
    draw(tmp_path / "fresh", 2, seed=1)
    asked = ["predict", str(finished), str(tmp_path / "fresh" / "images"), "--draw", str(tmp_path / "drawn")]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "boxes.jsonl")])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_examples_of_a_report_have_the_boxes_of_proposals(
    drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[float] = []

    def noted(task: Detection, decoded: list[dict[str, Any]], image: Image) -> Image:
        sides.extend(max(one["bbox"][2:]) / max(image.size) for one in decoded if one["score"] > 0.5)
        return image

    monkeypatch.setattr(Detection, "drawn", noted)
    run(drawn, tmp_path / "run", simulation={"data": drawn, "sites": 3, **ENOUGH, "examples": 2})
    # Objects have a third of the image's side at most; without its proposal, a box has all of it.
    assert sides and max(sides) < 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": "maps@128"}, "rows are proposals and not cells of maps"),
        ({"layer": "layer2:map"}, "its only layer is 'proposals'"),
        ({"layer": "proposals:0"}, "Proposals are named as in"),
        ({"layer": "proposals@9999"}, "Proposals are named as in"),
        ({"head": "mlp:8"}, "linear"),
        ({"backbone": "torchvision:resnet18"}, "is no detector"),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    drawn: str, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(drawn, tmp_path / "run", **{"backbone": SPEC, "weights": "random", "layer": "proposals", **changes})


@pytest.mark.parametrize("task", ["classification", "segmentation", "regression"])
def test_a_coordinator_refuses_other_tasks_before_it_starts(task: str) -> None:
    config = RunConfig(task=task, backbone=SPEC, weights="random", layer="proposals", classes=("a", "b"))
    with pytest.raises(UserError, match=f"which the task '{task}' does not take"):
        prepare(config)
