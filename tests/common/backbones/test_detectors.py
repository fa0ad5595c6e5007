"""torchvision's detectors as backbones, against the library's own detections."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.catalogue import layers_of, search
from fedhead.backbones.detectors import EXACT_NORMS, OneStage, build, detector_backbone, names
from fedhead.backbones.proposals import Proposals, rows_of, split_proposals, with_area
from fedhead.errors import UserError
from fedhead.features.extraction import arranged
from fedhead.tasks.cells import find_boxes
from fedhead.tasks.proposals import refined

SIDE = 128
TWO_STAGES = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow),
    pytest.param("maskrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
)
CLASSES = 6


def model_of(name: str, **settings: Any) -> Any:
    """Return a detector of six classes with random weights, whose last layers are not shy."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIDE, max_size=SIDE, **settings
    ).eval()
    if "fasterrcnn" in name or "maskrcnn" in name:
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
        nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            one.running_var.uniform_(0.5, 2.0)
            one.eps = 0.0 if name in EXACT_NORMS else one.eps
    return model


def picture() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0]


def backbone_of(model: Any, name: str, layer: str, path: Path) -> Backbone:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path / "detector.safetensors")
    return load_backbone(f"torchvision:{name}", weights=str(path / "detector.safetensors"), layer=layer)


def prepared(backbone: Backbone, image: Tensor) -> Tensor:
    mean, std = backbone.preprocessing.mean, backbone.preprocessing.std  # type: ignore[attr-defined]
    return ((image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


@pytest.mark.parametrize("name", TWO_STAGES)
@torch.no_grad()
def test_the_librarys_predictor_on_proposals_gives_the_librarys_boxes(name: str, tmp_path: Path) -> None:
    model = model_of(name, rpn_score_thresh=0.0, box_score_thresh=0.05)
    # The threshold of torchvision's MobileNet is its default and no argument here.
    count = min(model.rpn.post_nms_top_n(), 300)
    model.rpn._post_nms_top_n["testing"] = count
    backbone = backbone_of(model, name, f"proposals@{SIDE}", tmp_path)
    backbone.module.model.rpn.score_thresh = 0.0  # type: ignore[union-attr]
    assert backbone.layer == f"proposals:{count}@{SIDE}"
    values = backbone.features(prepared(backbone, picture()))
    geometry = backbone.geometry
    assert geometry is not None
    proposals, features = geometry.proposals(values), geometry.places(values)
    predictor = model.roi_heads.box_predictor
    logits, moves = predictor(features[0])
    shapes = (moves.view(len(moves), CLASSES, 4) / torch.tensor([10.0, 10.0, 5.0, 5.0]))[:, 1:]
    real = with_area(proposals[0])
    found = find_boxes(refined(shapes, proposals[0])[real], logits.softmax(1)[real, 1:], 0.05)
    theirs = model([picture()])[0]
    assert len(theirs["scores"]) > 20
    torch.testing.assert_close(found.scores, theirs["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.labels + 1, theirs["labels"])
    torch.testing.assert_close(found.corners.float() * SIDE, theirs["boxes"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn", pytest.param("retinanet_resnet50_fpn_v2", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_logits_of_anchors_give_retinanets_boxes(name: str, tmp_path: Path) -> None:
    model = model_of(name, score_thresh=0.05, detections_per_img=10**5, topk_candidates=10**5)
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.03)
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.02)
    backbone = backbone_of(model, name, f"proposals:2000@{SIDE}", tmp_path)
    anchors = 9 * sum((SIDE // stride) ** 2 for stride in (8, 16, 32, 64, 128))
    assert isinstance(backbone.module, OneStage)
    backbone.module.overlap, backbone.module.count = 1.1, anchors
    backbone.__dict__.pop("geometry", None)
    values = backbone.features(prepared(backbone, picture()))
    geometry = backbone.geometry
    assert geometry is not None
    scores = geometry.places(values)[0, :, -CLASSES:].sigmoid()
    proposals = geometry.proposals(values)[0]
    theirs = model([picture()])[0]
    # RetinaNet keeps boxes that are outside the image, without area.
    theirs = {key: value[with_area(theirs["boxes"])][:100] for key, value in theirs.items()}
    found = find_boxes(proposals[:, None].expand(-1, CLASSES, 4), scores, 0.05)
    assert len(theirs["scores"]) > 20
    torch.testing.assert_close(found.scores, theirs["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.labels, theirs["labels"])
    torch.testing.assert_close(found.corners.float() * SIDE, theirs["boxes"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", *(pytest.param(one, marks=pytest.mark.slow) for one in names())]
)
def test_a_detector_is_the_same_from_its_file(name: str, tmp_path: Path) -> None:
    layer = "proposals:20@300" if name == "ssd300_vgg16" else "proposals:20@96"
    backbone = load_backbone(f"torchvision:{name}", weights="random", layer=layer)
    assert backbone.layer == layer
    assert isinstance(backbone.geometry, Proposals)
    assert not any("predictor" in key for key in backbone.tensors())
    backbone.save(tmp_path / "backbone.safetensors")
    again = Backbone.load(tmp_path / "backbone.safetensors")
    items = backbone.preprocessing.probes()
    assert torch.equal(backbone.features_of(items), again.features_of(items))
    assert again.probe().shape == (len(items), backbone.num_features)
    torch.testing.assert_close(arranged(backbone, 10).probe(), backbone.probe(), rtol=1e-4, atol=1e-4)
    found = backbone.geometry.proposals(backbone.features_of(items))
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.slow
def test_images_that_are_too_small_for_a_detector_are_rejected() -> None:
    with pytest.raises(UserError, match="takes no images of 96 x 96"):
        load_backbone("torchvision:ssd300_vgg16", weights="random", layer="proposals@96")


def test_an_image_with_few_proposals_is_filled_up() -> None:
    rows = rows_of([torch.tensor([[0.0, 16, 32, 32]])], [torch.ones(1, 2)], 3, torch.zeros(1, 3, 32, 64))
    assert rows.tolist() == [[[0.0, 0.5, 0.5, 1.0, 1.0, 1.0], [0.0] * 6, [0.0] * 6]]


def test_detectors_are_listed() -> None:
    assert {one.spec for one in search("torchvision:retinanet*")} >= {"torchvision:retinanet_resnet50_fpn"}
    assert list(layers_of("torchvision:fcos_resnet50_fpn")) == ["proposals"]


@pytest.mark.parametrize(
    "layer", ["proposals:0", "proposals:2001", "proposals@63", "proposals:", "proposals:9@", "proposals:a"]
)
def test_unknown_numbers_and_sizes_are_rejected(layer: str) -> None:
    with pytest.raises(UserError, match="Proposals are named as in"):
        split_proposals(layer)


def test_weights_of_another_architecture_are_rejected(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="are not those of torchvision:ssdlite320_mobilenet_v3_large; missing"):
        load_backbone("torchvision:ssdlite320_mobilenet_v3_large", weights=str(tmp_path / "other.safetensors"))


def test_a_claimed_number_of_classes_takes_no_memory(tmp_path: Path) -> None:
    name = "head.classification_head.module_list.0.1.weight"
    save_file({name: torch.zeros(10**7, 1, 1, 1)}, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match=f"of another shape: {name}"):
        load_backbone("torchvision:ssdlite320_mobilenet_v3_large", weights=str(tmp_path / "large.safetensors"))


def test_only_torchvisions_detectors_are_wrapped() -> None:
    with pytest.raises(UserError, match="A detector is one of torchvision's classes FasterRCNN, RetinaNet"):
        detector_backbone(nn.Linear(2, 2))


@pytest.mark.parametrize("name", names())
def test_the_listed_size_is_the_detectors_own(name: str) -> None:
    # Without memory for weights, which say nothing about sizes.
    with torch.device("meta"):
        backbone = build(name, "proposals", None, 0, "")
    (entry,) = (one for one in search(f"torchvision:{name}") if one.spec == backbone.spec)
    assert backbone.layer.endswith(f"@{entry.input.split()[0]}")
