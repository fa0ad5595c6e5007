"""Detectors of transformers as backbones, against the library's own detections."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.hf_detectors import build
from fedhead.backbones.proposals import Proposals
from fedhead.errors import UserError

transformers = pytest.importorskip("transformers")

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 12,
    "num_labels": 3,
}


def yolos() -> Any:
    config = transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 64],
        num_detection_tokens=10, num_labels=3,
    )  # fmt: skip
    return transformers.YolosForObjectDetection(config)


def detr() -> Any:
    trunk = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=trunk, **DETR)
    return transformers.DetrForObjectDetection(config)


def rt_detr() -> Any:
    trunk = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=trunk, encoder_hidden_dim=32, encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[32, 32, 32], **DETR,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


KINDS = {
    "yolos": (yolos, transformers.YolosImageProcessor),
    "detr": (detr, transformers.DetrImageProcessor),
    "rt_detr": (rt_detr, transformers.RTDetrImageProcessor),
}


def saved(kind: str, folder: Path) -> tuple[Any, Any]:
    """Write a small random detector in the library's format; return it and its image processor."""
    make, processor = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    for name, one in model.named_modules():
        if isinstance(one, nn.Linear) and ("class" in name or "bbox" in name):
            nn.init.normal_(one.weight, std=0.3)
    model.save_pretrained(folder)
    made = processor()
    made.save_pretrained(folder)
    return model, made


def pictures(count: int = 2) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 8, 8, generator=generator)
    large = nn.functional.interpolate(pixels, (96, 128), mode="bilinear").permute(0, 2, 3, 1) * 255
    return [Image.fromarray(one.byte().numpy()) for one in large]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_queries_and_the_librarys_classifier_give_the_librarys_boxes(kind: str, tmp_path: Path) -> None:
    model, processor = saved(kind, tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}", layer="proposals@96")
    geometry = backbone.geometry
    assert isinstance(geometry, Proposals)
    items = pictures()
    values = backbone.features_of(items)
    states, corners = geometry.places(values), geometry.proposals(values)
    batch = torch.stack([backbone.preprocessing(one) for one in items])
    theirs = model(batch)
    last = model.model.decoder.class_embed[-1] if kind == "rt_detr" else model.class_labels_classifier
    torch.testing.assert_close(last(states), theirs.logits, atol=1e-5, rtol=1e-5)
    threshold = 0.3
    found = processor.post_process_object_detection(theirs, threshold, target_sizes=[(1, 1)] * len(items))
    for own, boxes, one in zip(last(states), corners, found, strict=True):
        clipped = one["boxes"].clamp(0, 1).double()
        if kind == "rt_detr":
            scores, flat = own.sigmoid().flatten().topk(len(own))
            boxes, scores = boxes[flat // own.shape[1]][scores > threshold], scores[scores > threshold]
        else:
            scores = own.softmax(-1)[:, :-1].amax(-1)
            boxes, scores = boxes[scores > threshold], scores[scores > threshold]
        assert len(scores) > 2
        torch.testing.assert_close(scores, one["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes, clipped, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_detector_needs_no_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    saved(kind, tmp_path / "model")
    backbone = load_backbone(f"hf:{tmp_path / 'model'}", layer="proposals:8@96")
    backbone.save(tmp_path / "backbone.safetensors")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    again = Backbone.load(tmp_path / "backbone.safetensors")
    assert (again.layer, again.num_values) == ("proposals:8@96", 8 * 36)
    assert torch.equal(again.features_of(pictures()), backbone.features_of(pictures()))
    assert again.probe().shape == (2, 32)


def test_the_default_layer_is_the_detectors_own(tmp_path: Path) -> None:
    saved("detr", tmp_path)
    assert load_backbone(f"hf:{tmp_path}", weights="random").layer == "proposals:12@640"
    assert load_backbone(f"hf:{tmp_path}", weights="random", layer="places").layer == "proposals:12@640"


@pytest.mark.parametrize(
    ("query", "layer", "said"),
    [
        ("", "hidden:1", "its only layer is 'proposals'"),
        ("", "proposals:13", "has 12 queries"),
        ("?max_length=9", "proposals", "only revision applies"),
    ],
)
def test_requests_that_do_not_fit_are_rejected(query: str, layer: str, said: str, tmp_path: Path) -> None:
    saved("detr", tmp_path)
    with pytest.raises(UserError, match=said):
        load_backbone(f"hf:{tmp_path}{query}", layer=layer)


def test_descriptions_from_elsewhere_are_checked(tmp_path: Path) -> None:
    saved("detr", tmp_path)
    files = dict(load_backbone(f"hf:{tmp_path}", layer="proposals@96").files)
    features = json.loads(files["features.json"])
    for changed in (
        {"config.json": "[]"},
        {"features.json": json.dumps({**features, "image": None})},
        {"features.json": json.dumps({**features, "image": [1]})},
    ):
        with pytest.raises(UserError, match="no valid description"):
            build("hf:x", None, {**files, **changed}, "received", "proposals", 0)
