"""Suppression of overlapping boxes as a part of an ONNX program, so that it returns the boxes that `predict` finds."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhead.errors import FedheadError, UserError
from fedhead.export.classifier import Outputs, by_image, input_names, sample_inputs
from fedhead.export.description import DOCUMENT, batch_of
from fedhead.export.programs import image_by_image, in_runtime
from fedhead.export.verification import BATCH_SIZES, TOLERANCE
from fedhead.extras import require
from fedhead.model import TransferModel
from fedhead.tasks.cells import LEAST_SCORE, MOST, OVERLAP, find_boxes
from fedhead.tasks.detection import Detection

BOXES, SCORES, LABELS = "boxes", "scores", "labels"
"""Names of the outputs."""

MEANING = (
    "The boxes of each image by descending score: left, top, right and bottom as shares of its width and height; a "
    "score; and the number of a class, from 0. Overlapping ones are suppressed. Rows with the score 0 and the label "
    "-1 are padding."
)


def require_boxes(model: TransferModel, file_format: str) -> None:
    """Check that a model finds boxes, and that a format can suppress overlapping ones.

    Raises:
        UserError: if not.
    """
    if not isinstance(model.task, Detection):
        raise UserError(f"--nms suppresses overlapping boxes, but this model is {model.task.description}.")
    if file_format != "onnx":
        raise UserError(f"--nms is for --format onnx; the format {file_format!r} returns the boxes of all cells.")


def describe_boxes(model: TransferModel) -> dict[str, Any]:
    """Return the description of the outputs as JSON types."""
    most = _most(model)
    batch = batch_of(model.backbone)
    shapes = {BOXES: [batch, most, 4], SCORES: [batch, most], LABELS: [batch, most]}
    return {"names": [BOXES, SCORES, LABELS], "shapes": shapes, "meaning": MEANING}


def _most(model: TransferModel) -> int:
    assert isinstance(model.task, Detection) and model.backbone.geometry is not None
    places, classes, _ = model.task.program_shape(model.backbone.geometry)
    return min(MOST, places * classes)


def with_suppression(content: bytes, model: TransferModel) -> tuple[bytes, Callable[..., tuple[Tensor, ...]]]:
    """Return an ONNX file of a detector with suppression of overlapping boxes, and its program in ONNX Runtime."""
    onnx = require("onnx", "onnx", "An export to ONNX")
    proto = onnx.load_from_string(content)
    add_suppression(proto, model)
    assert isinstance(model.task, Detection)
    (document,) = (one for one in proto.metadata_props if one.key == DOCUMENT)
    described = {**json.loads(document.value), "output": describe_boxes(model), "classes": list(model.task.classes)}
    document.value = json.dumps(described, ensure_ascii=False, indent=1)
    onnx.checker.check_model(proto)
    changed: bytes = proto.SerializeToString()
    run = in_runtime(changed, input_names(model.backbone), (BOXES, SCORES, LABELS))
    return changed, image_by_image(run) if by_image(model.backbone) else run


def add_suppression(proto: Any, model: TransferModel) -> None:
    """Replace the output `[n, P, C, 5]` of an ONNX program by the boxes that `find_boxes` finds, in place.

    Boxes differ by class, so that every class of an image is an item of its own for `NonMaxSuppression`.

    Args:
        proto: the program, an `onnx.ModelProto`.
        model: a detector.
    """
    onnx = require("onnx", "onnx", "An export to ONNX")
    assert isinstance(model.task, Detection) and model.backbone.geometry is not None
    places, classes, _ = model.task.program_shape(model.backbone.geometry)
    graph, numpy = proto.graph, onnx.numpy_helper
    most = _most(model)

    def value(name: str, content: Any, kind: Any = np.int64) -> str:
        graph.initializer.append(numpy.from_array(np.array(content, kind), f"nms/{name}"))
        return f"nms/{name}"

    def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        named = [one if one in (BOXES, SCORES, LABELS) else f"nms/{one}" for one in outputs]
        graph.node.append(onnx.helper.make_node(kind, list(inputs), named, name=f"nms/{named[0]}", **attributes))

    zero, one = value("zero", 0.0, np.float32), value("one", [1])
    node("Transpose", [model.task.answer_name], ["by class"], perm=[0, 2, 1, 3])
    node("Split", ["nms/by class", value("parts", [4, 1])], ["corners", "score"], axis=3)
    node("Split", ["nms/corners", value("halves", [2, 2])], ["first", "last"], axis=3)
    node("Sub", ["nms/last", "nms/first"], ["sides"])
    node("ReduceMin", ["nms/sides", value("axis", [3])], ["shorter"], keepdims=1)
    node("Greater", ["nms/shorter", zero], ["has area"])
    node("Where", ["nms/has area", "nms/score", zero], ["usable"])
    node("Reshape", ["nms/corners", value("per class", [-1, places, 4])], ["candidates"])
    node("Reshape", ["nms/usable", value("one class", [-1, 1, places])], ["candidate scores"])
    # The operator leaves out scores that are equal to the least one.
    least = np.nextafter(np.float32(LEAST_SCORE), np.float32(0))
    limits = [value("most", [most]), value("overlap", [OVERLAP], np.float32), value("least", [least], np.float32)]
    node("NonMaxSuppression", ["nms/candidates", "nms/candidate scores", *limits], ["kept"])
    # Numbers of the kept boxes among those of all images and classes.
    node("Split", ["nms/kept", value("columns", [1, 1, 1])], ["item", "of one", "cell"], axis=1)
    node("Mul", ["nms/item", value("places", [places])], ["start"])
    node("Add", ["nms/start", "nms/cell"], ["number"])
    node("Reshape", ["nms/usable", value("flat", [-1])], ["all scores"])
    node("GatherND", ["nms/all scores", "nms/number"], ["kept scores"])
    node("Mul", ["nms/all scores", zero], ["none"])
    node("ScatterND", ["nms/none", "nms/number", "nms/kept scores"], ["sparse"])
    node("Reshape", ["nms/sparse", value("per image", [-1, classes * places])], ["of image"])
    node("TopK", ["nms/of image", value("count", [most])], [SCORES, "place"], axis=1, largest=1, sorted=1)
    node("Unsqueeze", ["nms/place", value("end", [2])], ["places of boxes"])
    node("Reshape", ["nms/corners", value("boxes of image", [-1, classes * places, 4])], ["all boxes"])
    node("GatherND", ["nms/all boxes", "nms/places of boxes"], [BOXES], batch_dims=1)
    node("Div", ["nms/place", value("cells", [places])], ["class"])
    node("Greater", [SCORES, zero], ["found"])
    node("Neg", [one], ["minus one"])
    node("Where", ["nms/found", "nms/class", "nms/minus one"], [LABELS])
    del graph.output[:]
    real, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    for name, kind, shape in ((BOXES, real, [most, 4]), (SCORES, real, [most]), (LABELS, whole, [most])):
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, [batch_of(model.backbone), *shape]))


def require_same_boxes(
    model: TransferModel, raw: Callable[..., Outputs], suppressed: Callable[..., tuple[Tensor, ...]]
) -> float:
    """Return the largest difference between the boxes of a program and those of `find_boxes`, on samples.

    Args:
        model: a detector.
        raw: the program without suppression.
        suppressed: the program that returns boxes, scores and labels.

    Raises:
        FedheadError: if it is above `TOLERANCE`.
    """
    largest = 0.0
    for rows in BATCH_SIZES:
        inputs = sample_inputs(model.backbone, rows)
        answers, found = raw(*inputs), suppressed(*inputs)
        assert isinstance(answers, Tensor)
        for own, boxes, scores, labels in zip(answers, *found, strict=True):
            largest = max(largest, _difference(own, boxes, scores, labels))
    if not largest <= TOLERANCE:
        raise FedheadError(
            f"The boxes of the export differ from the model's by {largest:.2g}, and the limit is {TOLERANCE:g}. "
            "Nothing was written."
        )
    return largest


def _difference(answers: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> float:
    expected = find_boxes(answers[..., :4], answers[..., 4])
    count = int((labels >= 0).sum())
    if count != len(expected.scores):
        return float("inf")
    given = torch.cat([boxes[:count], scores[:count, None]], 1)
    wanted = torch.cat([expected.corners, expected.scores[:, None]], 1)
    # Boxes with equal scores may come in any order.
    apart = (given[:, None] - wanted).abs().amax(2)
    apart = apart.masked_fill(labels[:count, None] != expected.labels, torch.inf)
    return float(torch.maximum(apart.amin(0), apart.amin(1)).max()) if count else 0.0
