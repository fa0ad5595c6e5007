"""torchvision's detectors without their last layer: all other layers are frozen, and rows are proposals."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms

from fedhead.backbones.backbone import Backbone
from fedhead.backbones.preprocessing import ImagePreprocessing
from fedhead.backbones.proposals import MOST_PROPOSALS, PROPOSALS, Proposer, rows_of, split_proposals
from fedhead.backbones.state_dict import align, fill_weights, without_unneeded
from fedhead.errors import UserError

CLASSES = 91
"""Outputs of torchvision's own detectors, which were trained on COCO."""

SUPPRESSED = 0.7
"""Intersection over union above which a one-stage detector's lower candidate is not a proposal, as in an RPN."""

EXACT_NORMS = (
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
"""Models whose weights torchvision uses with batch norms that add nothing to the variance."""

_STEADY = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.5, 0.6), (0.5, 0.4, 0.9, 0.9), (0.3, 0.3, 0.45, 0.5))
"""Boxes whose features are compared between machines, as shares of the image."""


def names() -> list[str]:
    """Return the names of torchvision's detectors."""
    return list(torchvision.models.list_models(module=detection))


def build(name: str, layer: str, weights: Mapping[str, Tensor] | None, seed: int, path: str) -> Backbone:
    """Build a detector without its last layer.

    Args:
        name: a model's name, optionally with an entry of its weights.
        layer: `proposals`, optionally with their number and the height and width of images.
        weights: of a detector with any number of classes; None for random ones.
        seed: of random weights.
        path: the file of the weights, for messages.

    Raises:
        UserError: for another layer, and for weights of another architecture.
    """
    spec = f"torchvision:{name}"
    asked = split_proposals(PROPOSALS if layer == "penultimate" else layer)
    if asked is None:
        raise UserError(
            f"{spec} is a detector, whose rows are proposals: its only layer is 'proposals', or 'proposals:150@320' "
            f"for 150 in images of 320 x 320, not {layer!r}."
        )
    model = _model(name, CLASSES, seed)
    if weights is not None and (classes := _classes(model, weights)) != CLASSES:
        model = _model(name, classes, seed)
    whole = dict(model.state_dict())
    backbone = detector_backbone(model, number=asked.number, side=asked.side, spec=spec, trained=weights is not None)
    if weights is not None:
        needed = backbone.module.state_dict()
        fit = fill_weights(model, without_unneeded(align(weights, needed, path), whole, needed))
        fit.require(needed.keys(), spec, path)
    return backbone


def detector_backbone(
    model: Any, *, number: int | None = None, side: int | None = None, spec: str = "detector:own", trained: bool = True
) -> Backbone:
    """Return a detector of torchvision's classes, such as `FasterRCNN` or `RetinaNet`, without its last layer.

    A function that a spec `python:MODULE:FUNCTION` names may return it, for a detector of one's own.

    Args:
        model: must not be used otherwise afterwards.
        number: of proposals of an image; by default the model's own, at most 300.
        side: height and width of images; by default the smallest of the model's transform.
        spec: `source:name`.
        trained: False for random weights.

    Raises:
        UserError: for a model of another class, and for images that are too small for it.
    """
    if isinstance(model, detection.FasterRCNN):
        proposer: _Detector = TwoStage(model, number)
    elif type(model) in _OUTPUTS:
        proposer = OneStage(model, number)
    else:
        kinds = ", ".join(["FasterRCNN", *(kind.__name__ for kind in _OUTPUTS)])
        raise UserError(f"A detector is one of torchvision's classes {kinds}, not {type(model).__name__}.")
    usual = int(model.transform.min_size[-1])
    side = side or usual
    if side < usual:
        _require_size(proposer, side, usual, spec)
    mean, std = tuple(model.transform.image_mean), tuple(model.transform.image_std)
    prepared = ImagePreprocessing(3, (side, side), None, mean, std)
    layer = f"{PROPOSALS}:{proposer.count}@{side}"
    return Backbone(spec, proposer, prepared, layer=layer, pooling=PROPOSALS, trained=trained)


@torch.no_grad()
def _require_size(proposer: Proposer, side: int, usual: int, spec: str) -> None:
    try:
        proposer.steady(torch.zeros(1, 3, side, side))
    except RuntimeError as error:
        raise UserError(
            f"{spec} takes no images of {side} x {side}, which are too small for its layers; its usual size is {usual}."
        ) from error


def _model(given: str, classes: int, seed: int) -> Any:
    name, _, entry = given.partition(".")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if name in EXACT_NORMS and entry in ("", "COCO_V1"):
        for one in model.modules():
            if isinstance(one, nn.BatchNorm2d):
                one.eps = 0.0
    return model


def _classes(model: Any, weights: Mapping[str, Tensor]) -> int:
    """Return the number of outputs for each anchor of a one-stage detector's weights."""
    for name, own in model.state_dict().items():
        if name.startswith("head.classification_head.") and own.ndim == 4 and not own.shape[0] % CLASSES:
            given = weights.get(name, own)
            # A tensor of another shape may claim any number; it is rejected when the weights are filled in.
            return max(1, given.shape[0] * CLASSES // own.shape[0]) if given.shape[1:] == own.shape[1:] else CLASSES
    return CLASSES


class _Detector(Proposer):
    """A detector of torchvision's, whose weights keep their names.

    Args:
        model: run in eval mode; must not be used otherwise afterwards.
        count: the number of proposals of an image; None for the model's own.
    """

    by_image = True

    def __init__(self, model: Any, count: int | None) -> None:
        super().__init__()
        self.model = model.eval()
        self.count = count or MOST_PROPOSALS

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of the pyramid by level."""
        found = self.model.backbone(images)
        return {"0": found} if isinstance(found, Tensor) else found


class TwoStage(_Detector):
    """Faster R-CNN and its relatives: features are the box head's, of the boxes of the region proposal network."""

    def __init__(self, model: Any, count: int | None) -> None:
        before, after = model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n
        super().__init__(model, count or min(after["testing"], MOST_PROPOSALS))
        before["testing"], after["testing"] = max(self.count, before["testing"]), self.count
        heads = model.roi_heads
        heads.box_predictor = nn.Identity()
        for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(heads, name, None)
        for name in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor"):
            setattr(heads, name, None)

    def forward(self, images: Tensor) -> Tensor:
        maps, sizes = self.maps(images), [(images.shape[2], images.shape[3])] * len(images)
        corners, _ = self.model.rpn(ImageList(images, sizes), maps)
        vectors = torch.split(self._vectors(maps, corners, sizes), [len(one) for one in corners])
        return rows_of(corners, vectors, self.count, images)

    def steady(self, images: Tensor) -> Tensor:
        maps, size = self.maps(images), (images.shape[2], images.shape[3])
        corners = images.new_tensor(_STEADY) * images.new_tensor([size[1], size[0]] * 2)
        vectors = self._vectors(maps, [corners] * len(images), [size] * len(images))
        return vectors.view(len(images), len(corners), -1).mean(1)

    def _vectors(self, maps: dict[str, Tensor], corners: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        heads = self.model.roi_heads
        vectors: Tensor = heads.box_head(heads.box_roi_pool(maps, corners, sizes))
        return vectors.flatten(1)


class _Candidates(NamedTuple):
    """The anchors of `n` images.

    Attributes:
        corners: `[n, A, 4]`, in pixels.
        scores: `[n, A]`, the highest of a class.
        logits: `[n, A, K]`, all outputs of the last layers but the boxes.
        towers: `[n, A / a, T]`, the inputs of these layers; several anchors share a place.
    """

    corners: Tensor
    scores: Tensor
    logits: Tensor
    towers: Tensor


class OneStage(_Detector):
    """RetinaNet, FCOS and SSD, whose last layers are frozen too: their classes' logits are features.

    Proposals are the boxes of anchors with the highest score of a class, without those that overlap a better one. Their
    features are those of the heads' towers of convolutions at the anchor's place, if there are towers, and the logits.
    """

    overlap = SUPPRESSED

    def forward(self, images: Tensor) -> Tensor:
        found = self._candidates(images)
        corners, vectors = [], []
        shared = found.corners.shape[1] // max(found.towers.shape[1], 1)
        for boxes, scores, logits, towers in zip(*found, strict=True):
            best = scores.topk(min(4 * self.count, len(scores))).indices
            best = best[nms(boxes[best], scores[best], self.overlap)[: self.count]]
            corners.append(boxes[best])
            vectors.append(torch.cat([towers[best // shared], logits[best]], 1))
        return rows_of(corners, vectors, self.count, images)

    def steady(self, images: Tensor) -> Tensor:
        found = self._candidates(images)
        return torch.cat([found.towers.mean(1), found.logits.mean(1)], 1)

    def _candidates(self, images: Tensor) -> _Candidates:
        size = (images.shape[2], images.shape[3])
        maps = list(self.maps(images).values())
        anchors = self.model.anchor_generator(ImageList(images, [size] * len(images)), maps)
        outputs = _OUTPUTS[type(self.model)](self.model.head, maps)
        coder = self.model.box_coder
        decode = coder.decode if isinstance(self.model, detection.FCOS) else coder.decode_single
        boxes = torch.stack([decode(one, own) for one, own in zip(outputs.boxes, anchors, strict=True)])
        return _Candidates(clip_boxes_to_image(boxes, size), outputs.scores, outputs.logits, outputs.towers)


class _Outputs(NamedTuple):
    """What the heads give of `n` images: boxes relative to anchors `[n, A, 4]`, and the rest of `_Candidates`."""

    boxes: Tensor
    scores: Tensor
    logits: Tensor
    towers: Tensor


def _by_anchor(maps: Sequence[Tensor], width: int) -> Tensor:
    """Return outputs `[n, A, width]` of all levels, from maps `[n, a * width, height, width]`."""
    parts = [one.view(len(one), -1, width, *one.shape[2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for one in maps]
    return torch.cat(parts, 1)


def _of_retinanet(head: Any, maps: Sequence[Tensor]) -> _Outputs:
    kinds, shapes = head.classification_head, head.regression_head
    first, second = [kinds.conv(one) for one in maps], [shapes.conv(one) for one in maps]
    logits = _by_anchor([kinds.cls_logits(one) for one in first], kinds.num_classes)
    boxes = _by_anchor([shapes.bbox_reg(one) for one in second], 4)
    towers = torch.cat([_by_anchor(one, one[0].shape[1]) for one in (first, second)], 2)
    return _Outputs(boxes, logits.sigmoid().amax(2), logits, towers)


def _of_fcos(head: Any, maps: Sequence[Tensor]) -> _Outputs:
    kinds, shapes = head.classification_head, head.regression_head
    first, second = [kinds.conv(one) for one in maps], [shapes.conv(one) for one in maps]
    logits = _by_anchor([kinds.cls_logits(one) for one in first], kinds.num_classes)
    boxes = _by_anchor([shapes.bbox_reg(one).relu() for one in second], 4)
    central = _by_anchor([shapes.bbox_ctrness(one) for one in second], 1)
    towers = torch.cat([_by_anchor(one, one[0].shape[1]) for one in (first, second)], 2)
    scores = (logits.sigmoid() * central.sigmoid()).sqrt().amax(2)
    return _Outputs(boxes, scores, torch.cat([logits, central], 2), towers)


def _of_ssd(head: Any, maps: Sequence[Tensor]) -> _Outputs:
    found = head(maps)
    logits = found["cls_logits"]
    scores = logits.softmax(2)[..., 1:].amax(2)
    return _Outputs(found["bbox_regression"], scores, logits, logits.new_zeros(len(logits), 1, 0))


_OUTPUTS = {detection.RetinaNet: _of_retinanet, detection.FCOS: _of_fcos, detection.ssd.SSD: _of_ssd}
