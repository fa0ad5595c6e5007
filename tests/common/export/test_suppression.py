from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fedhead.backbones.geometry import Geometry
from fedhead.export.suppression import add_suppression
from fedhead.tasks.cells import find_boxes
from fedhead.tasks.detection import Detection


def suppressing(classes: int, grid: tuple[int, int]) -> onnxruntime.InferenceSession:
    """Return a program from boxes and scores `[n, P, C, 5]` of all cells to those that are left."""
    task = Detection([f"class {number}" for number in range(classes)])
    model: Any = SimpleNamespace(task=task, backbone=SimpleNamespace(geometry=Geometry(((1, *grid),)), module=None))
    shape = ["batch", grid[0] * grid[1], classes, 5]
    values = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["cells"], ["values"])],
        "graph",
        [values("cells", onnx.TensorProto.FLOAT, shape)],
        [values("values", onnx.TensorProto.FLOAT, shape)],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    add_suppression(proto, model)
    onnx.checker.check_model(proto)
    return onnxruntime.InferenceSession(proto.SerializeToString())


def cells(images: int, places: int, classes: int, generator: torch.Generator) -> torch.Tensor:
    """Return boxes of which many overlap, with and without area, and scores of which many are low."""
    middle = torch.rand(images, places, classes, 2, generator=generator)
    half = torch.rand(images, places, classes, 2, generator=generator) * 0.2 - 0.02
    scores = torch.rand(images, places, classes, 1, generator=generator) ** 6
    return torch.cat([(middle - half).clamp(0, 1), (middle + half).clamp(0, 1), scores], -1)


@pytest.mark.parametrize(("classes", "grid"), [(1, (3, 4)), (3, (9, 8)), (20, (12, 12))])
def test_the_program_finds_the_boxes_of_predict(classes: int, grid: tuple[int, int]) -> None:
    session, places = suppressing(classes, grid), grid[0] * grid[1]
    for images in (1, 4):
        values = cells(images, places, classes, torch.Generator().manual_seed(images))
        boxes, scores, labels = session.run(None, {"cells": values.numpy()})
        assert boxes.shape == (images, min(100, places * classes), 4)
        for own, corners, score, label in zip(values, boxes, scores, labels, strict=True):
            expected = find_boxes(own[..., :4], own[..., 4])
            count = len(expected.labels)
            np.testing.assert_array_equal(label[:count], expected.labels)
            np.testing.assert_allclose(score[:count], expected.scores)
            np.testing.assert_allclose(corners[:count], expected.corners)
            assert (label[count:] == -1).all()
            assert not score[count:].any()


def test_images_without_a_box_have_only_padding() -> None:
    values = cells(2, 12, 2, torch.Generator().manual_seed(0))
    values[..., 4] = 0.0005
    _, scores, labels = suppressing(2, (3, 4)).run(None, {"cells": values.numpy()})
    assert not scores.any()
    assert (labels == -1).all()
