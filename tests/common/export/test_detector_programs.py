"""Detectors as ONNX programs, from an image to boxes, against their models in PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.detectors import detector_backbone
from fedhead.errors import UserError
from fedhead.export import export_model
from fedhead.heads import LinearHead
from fedhead.model import TransferModel
from fedhead.tasks import make_task

CLASSES = ("square", "disc")


def tiny(kind: Any, **settings: Any) -> Backbone:
    """Return a detector of torchvision's with a small trunk and random weights that are not shy."""
    torch.manual_seed(0)
    layers = [(3, 16), (16, 24), (24, 32)]
    trunk = nn.Sequential(
        *[nn.Sequential(nn.Conv2d(one, two, 3, 2, 1), nn.GroupNorm(4, two), nn.ReLU()) for one, two in layers]
    )
    trunk.out_channels = 32  # type: ignore[assignment]
    model = kind(trunk, 4, min_size=96, max_size=96, **settings)
    for one in [*model.modules()]:
        if isinstance(one, nn.Conv2d) and one.kernel_size == (3, 3):
            nn.init.kaiming_normal_(one.weight)
    return detector_backbone(model, number=20, spec="python:own:tiny")


def retinanet() -> Backbone:
    return tiny(detection.RetinaNet, anchor_generator=AnchorGenerator(((16, 24, 32),), ((1.0,),)))


def fcos() -> Backbone:
    return tiny(detection.FCOS, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))


def faster_rcnn() -> Backbone:
    return tiny(detection.FasterRCNN, rpn_anchor_generator=AnchorGenerator(((16, 24, 32),), ((0.5, 1.0),)))


def of_transformers(kind: str, folder: Path) -> Backbone:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    trunk = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    if kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=[64, 64],
            num_detection_tokens=10, num_labels=3,
        )  # fmt: skip
        model, processor = transformers.YolosForObjectDetection(config), transformers.YolosImageProcessor
    else:
        own = {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 12,
            "num_labels": 3,
        }  # fmt: skip
        part = transformers.RTDetrResNetConfig(**trunk, out_features=["stage2", "stage3", "stage4"])
        config = transformers.RTDetrConfig(
            backbone_config=part, encoder_hidden_dim=32, encoder_in_channels=[8, 16, 16],
            decoder_in_channels=[32, 32, 32], **own,
        )  # fmt: skip
        model, processor = transformers.RTDetrForObjectDetection(config), transformers.RTDetrImageProcessor
    model.save_pretrained(folder)
    processor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return load_backbone(f"hf:{folder}")


def solved(backbone: Backbone) -> TransferModel:
    """Return a model with a head of random weights, whose logits are of the size of solved ones."""
    columns = make_task("detection", CLASSES).columns
    features = backbone.geometry.places(backbone.features_of(pictures(3))).flatten(0, 1)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(len(columns), backbone.num_features, generator=generator)
    weight = weight / (features @ weight.T).std(0).clamp_min(1e-6)[:, None]
    weight[2 * len(CLASSES) :] *= 0.1
    return TransferModel(
        backbone, LinearHead.from_weights(weight, torch.zeros(len(columns))), columns, task="detection"
    )


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(5)
    coarse = generator.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((90, 70), Image.Resampling.BICUBIC) for one in coarse]


@torch.no_grad()
def check(model: TransferModel, folder: Path, batch: int | str) -> None:
    """Compare a program without and with suppression with the model, on images that the export never saw."""
    backbone = model.backbone
    images = pictures(4)
    given = backbone.batch_of(images)
    raw, suppressed = folder / "raw.onnx", folder / "boxes.onnx"
    assert export_model(model, "onnx", raw).difference < 1e-4
    assert export_model(model, "onnx", suppressed, nms=True).difference < 1e-4
    described = json.loads({one.key: one.value for one in onnx.load(raw).metadata_props}["fedhead"])
    assert described["input"]["shapes"]["pixels"][0] == described["output"]["shape"][0] == batch
    stored = backbone.features_of(images)
    geometry = backbone.geometry
    assert geometry is not None
    outputs, proposals = model.head(geometry.places(stored)), geometry.proposals(stored)
    expected = model.task.program(outputs, torch.zeros(outputs.shape[2], dtype=torch.bool), geometry, proposals)
    for path in (raw, suppressed):
        session = onnxruntime.InferenceSession(path)
        for row in range(len(images)):
            found = session.run(None, {"pixels": given[row : row + 1].numpy()})
            if path == raw:
                distance = torch.cdist(torch.from_numpy(found[0]).flatten(2), expected[row : row + 1].flatten(2))
                assert float(torch.maximum(distance.amin(1), distance.amin(2)).max()) < 1e-3
                continue
            boxes, scores, labels = (one[0][found[2][0] >= 0] for one in found)
            wanted = model.predict([images[row]])[0]
            assert len(wanted) == len(boxes) > 0
            sides = np.array([one["bbox"] for one in wanted])
            corners = np.hstack([sides[:, :2], sides[:, :2] + sides[:, 2:]]) / np.tile(images[row].size, 2)
            own = np.hstack([boxes, scores[:, None], labels[:, None]])
            theirs = [
                [*box, one["score"], CLASSES.index(one["class"])] for box, one in zip(corners, wanted, strict=True)
            ]
            apart = np.abs(own[:, None] - np.array(theirs)).max(2)
            assert max(apart.min(0).max(), apart.min(1).max()) < 1e-3


@pytest.mark.parametrize("make", [retinanet, fcos, faster_rcnn])
def test_programs_of_torchvisions_detectors_take_one_image(make: Any, tmp_path: Path) -> None:
    model = solved(make())
    check(model, tmp_path, 1)
    with pytest.raises(UserError, match="number of its boxes depends on the image"):
        export_model(model, "torch-export", tmp_path / "model.pt2")


@pytest.mark.parametrize("kind", ["yolos"])
def test_programs_of_queries_take_any_number_of_images(kind: str, tmp_path: Path) -> None:
    check(solved(of_transformers(kind, tmp_path / "model")), tmp_path, "batch")


@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_detectors_that_choose_their_queries_are_refused(file_format: str, tmp_path: Path) -> None:
    model = solved(of_transformers("rt_detr", tmp_path / "model"))
    with pytest.raises(UserError, match="the family 'rt_detr' chooses its queries by the content of an image"):
        export_model(model, file_format, tmp_path / "model.out")
    assert not (tmp_path / "model.out").exists()
