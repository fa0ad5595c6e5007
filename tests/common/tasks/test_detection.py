import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.linear_model import Ridge

from fedhead.backbones.geometry import Geometry
from fedhead.config import RunConfig
from fedhead.data.boxes import Boxes
from fedhead.errors import UserError
from fedhead.evaluation.detection import average_precisions, detection_report
from fedhead.solvers import solve_head
from fedhead.solvers.boxes import PENALTY
from fedhead.sums.detection import DetectionSums, detection_sums, score_bins
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import PLACES
from fedhead.tasks import make_task
from fedhead.tasks.cells import assign, centres, corners_of, find_boxes, within

GRID = (12, 16)
NAMES = ("cell", "plate")
GEOMETRY = Geometry(((5, *GRID), (3, 6, 8)), (96, 128))


def random_boxes(generator, count, classes=2, crowds=0.0):
    middle, size = generator.uniform(0.1, 0.9, (count, 2)), generator.uniform(0.05, 0.5, (count, 2))
    corners = np.hstack([middle - size / 2, middle + size / 2]).clip(0, 1)
    return Boxes(corners, generator.integers(0, classes, count), generator.random(count) < crowds)


def random_items(seed, count=8):
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.normal(size=(count, GEOMETRY.num_values))).float()
    return values, [random_boxes(generator, int(generator.integers(1, 6)), crowds=0.2) for _ in range(count)]


def summed(values, boxes, origin):
    task = make_task("detection", NAMES)
    stats = task.statistics(GEOMETRY.num_features, origin)
    if len(values):
        places = task.expand(values, boxes, GEOMETRY)
        stats.update(places.features, places.targets)
        stats.items += places.items
    return stats


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 8))
def test_any_split_gives_the_pooled_head(seed, cut):
    values, boxes = random_items(seed)
    origin = torch.linspace(-1, 1, GEOMETRY.num_features).double()
    pooled = summed(values, boxes, origin)
    parts = summed(values[:cut], boxes[:cut], origin) + summed(values[cut:], boxes[cut:], origin)
    one, other = solve_head(pooled, "boxes"), solve_head(parts, "boxes")
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-8, atol=1e-8)


def test_each_part_equals_its_own_fit_on_its_places():
    """Shapes equal ridge regression on the features of places with a box and class indicators, unpenalised."""
    values, boxes = random_items(3, count=30)
    origin = torch.full((GEOMETRY.num_features,), 0.3, dtype=torch.float64)
    head = solve_head(summed(values, boxes, origin), "boxes").requires_grad_(False)
    features, labels, shapes, weights = [], [], [], []
    for own, one in zip(GEOMETRY.places(values), boxes, strict=True):
        found = assign(torch.from_numpy(one.corners[~one.ignored]), GRID)
        positive = found.box >= 0
        features.append(own[positive].double())
        labels.append(torch.from_numpy(one.labels[~one.ignored])[found.box[positive]])
        shapes.append(found.shape[positive])
        weights.append(found.weight[positive])
    x, y, t, w = (torch.cat(one) for one in (features, labels, shapes, weights))
    marks = torch.nn.functional.one_hot(y).double() * w[:, None]
    mean, centre = (marks.T @ one / marks.sum(0)[:, None] for one in (t, x))
    slopes = head.weight[4:8]
    torch.testing.assert_close(slopes, head.weight[8:12])
    # scikit-learn's ridge regression on rows centred by class, with the weights of places.
    inside, target = (x - centre[y]).numpy(), (t - mean[y]).numpy()
    scale = round(float(w.sum())) / float(w.sum())
    penalty = PENALTY * scale * float((w[:, None].numpy() * inside**2).sum(0).mean())
    reference = Ridge(penalty, fit_intercept=False).fit(inside, target, sample_weight=scale * w.numpy())
    np.testing.assert_allclose(slopes, reference.coef_, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(head.bias[4:].view(2, 4), mean - centre @ slopes.T, rtol=1e-8, atol=1e-8)


def test_objectness_is_the_mean_of_its_class_and_of_all_classes():
    values, boxes = random_items(4, count=20)
    stats = summed(values, boxes, None)
    head = solve_head(stats, "boxes").requires_grad_(False)
    places = make_task("detection", NAMES).expand(values, boxes, GEOMETRY)
    objectness = places.targets[:, 2:4]

    def against_rest(shares):
        shares = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1)
        own = FeatureStatistics.from_features(places.features, shares, shares.shape[1], kind=PLACES)
        own.items = places.items
        solved = solve_head(own, "lda-shares").requires_grad_(False)(places.features.double())
        return solved[:, :-1] - solved[:, -1:]

    expected = (against_rest(objectness) + against_rest(objectness.sum(1, keepdim=True))) / 2
    torch.testing.assert_close(head(places.features.double())[:, 2:4], expected, rtol=1e-7, atol=1e-7)


def test_weights_of_a_box_grow_with_the_root_of_its_cells():
    corners = torch.tensor([[0.40, 0.40, 0.42, 0.42], [0.1, 0.1, 0.9, 0.9]], dtype=torch.float64)
    found = assign(corners, GRID)
    for box in (0, 1):
        own = found.box == box
        assert float(found.weight[own].sum()) == pytest.approx(float(own.sum()) ** 0.5)
    assert not bool(found.weight[found.box < 0].any())


def test_cells_find_boxes_and_decode_to_them():
    generator = np.random.default_rng(0)
    corners = torch.from_numpy(random_boxes(generator, 6).corners)
    found = assign(corners, GRID)
    positive = found.box >= 0
    assert set(found.box[positive].tolist()) <= set(range(6))
    decoded = corners_of(found.shape[:, None], GRID)[:, 0]
    torch.testing.assert_close(decoded[positive], corners[found.box[positive]])
    assert bool((found.objectness[~positive] == 0).all())
    assert 0 < float(found.objectness[positive].min()) <= float(found.objectness.max()) <= 1
    single = torch.bincount(found.box[positive], minlength=6) == 1
    assert bool((found.objectness[positive][single[found.box[positive]]] > 0.3).all())


def test_every_box_has_the_nearest_cell_and_large_ones_more():
    small, large = [0.40, 0.40, 0.42, 0.42], [0.1, 0.1, 0.9, 0.9]
    found = assign(torch.tensor([small, large], dtype=torch.float64), GRID)
    nearest = int((centres(GRID) - 0.41).mul(torch.tensor([16.0, 12.0])).square().sum(1).argmin())
    assert int(found.box[nearest]) == 0
    assert int((found.box == 0).sum()) == 1
    assert int((found.box == 1).sum()) > 4


def test_no_boxes_no_positives():
    found = assign(torch.zeros(0, 4, dtype=torch.float64), GRID)
    assert bool((found.box == -1).all())
    assert not bool(found.objectness.any())
    assert not bool(within(torch.zeros(0, 4, dtype=torch.float64), GRID).any())


def test_places_in_crowds_are_not_learned_from():
    crowd = Boxes(np.array([[0.0, 0.0, 0.5, 1.0]]), np.array([0]), np.array([True]))
    values, _ = random_items(1, count=1)
    stats = summed(values, [crowd], None)
    assert stats.rows == GRID[0] * GRID[1] / 2
    assert stats.items == 1
    with pytest.raises(UserError, match="have none that may be learned from"):
        solve_head(stats, "boxes")


def test_overlapping_boxes_of_one_class_are_suppressed():
    corners = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]], dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.5, 0.0]], dtype=torch.float64)
    found = find_boxes(corners[:, None].expand(3, 2, 4), scores)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])


def reference(items, classes):
    """Return COCO's own AP50 and AP of found and true boxes."""
    images = [{"id": number, "width": 100, "height": 100} for number in range(len(items))]
    true, found = [], []
    for number, (boxes, corners, scores, labels) in enumerate(items):
        for corner, label, crowd in zip(boxes.corners, boxes.labels, boxes.ignored, strict=True):
            left, top, right, bottom = (corner * 100).tolist()
            box = [left, top, right - left, bottom - top]
            area = box[2] * box[3]
            mark = {"image_id": number, "category_id": int(label), "bbox": box, "area": area, "iscrowd": int(crowd)}
            true.append({"id": len(true) + 1, **mark})
        for corner, score, label in zip(corners, scores, labels, strict=True):
            left, top, right, bottom = (corner * 100).tolist()
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": number, "category_id": int(label), "bbox": box, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "images": images,
            "annotations": true,
            "categories": [{"id": one, "name": str(one)} for one in range(classes)],
        }
        data.createIndex()
        evaluation = COCOeval(data, data.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return precision.mean(1)


def near_and_far(generator, boxes):
    """Return found boxes: two near each true one, and five elsewhere; with their labels."""
    far = random_boxes(generator, 5)
    near = boxes.corners.repeat(2, 0) + generator.normal(0, 0.03, (2 * len(boxes), 4))
    corners = np.vstack([near, far.corners]).clip(0, 1)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 0.01)
    return corners, np.concatenate([boxes.labels.repeat(2), far.labels])


@pytest.mark.parametrize("crowds", [0.0, 0.3])
@pytest.mark.parametrize(("count", "bound"), [(15, 1e-12), (60, 0.012)])
def test_average_precision_equals_pycocotools(crowds, count, bound):
    """Boxes whose scores share no bin give the same numbers; others nearly the same."""
    generator = np.random.default_rng(5)
    items, total = [], DetectionSums.zeros(2)
    grid = np.linspace(0, 1, 2_000_001)
    _, firsts = np.unique(score_bins(grid), return_index=True)
    free = generator.permutation(grid[firsts]).tolist()
    for _ in range(count):
        boxes = random_boxes(generator, int(generator.integers(1, 6)), crowds=crowds)
        corners, labels = near_and_far(generator, boxes)
        scores = generator.random(len(labels))
        if count == 15:
            scores = np.array([free.pop() for _ in labels])
        items.append((boxes, corners, scores, labels))
        total = total + detection_sums(corners, scores, labels, boxes.corners, boxes.labels, boxes.ignored, 2)
    np.testing.assert_allclose(average_precisions(total), reference(items, 2), atol=bound)
    assert abs(average_precisions(total).mean() - reference(items, 2).mean()) < 0.3 * bound
    report = detection_report(total, NAMES)
    assert report.ap50.low < report.ap50.value < report.ap50.high
    assert report.score is report.ap50


def test_boxes_of_a_confident_detector_are_told_apart():
    generator = np.random.default_rng(6)
    items, total = [], DetectionSums.zeros(2)
    for _ in range(40):
        boxes = random_boxes(generator, int(generator.integers(1, 6)))
        corners, labels = near_and_far(generator, boxes)
        scores = 1 / (
            1 + np.exp(-generator.normal(7, 1.5, len(labels)) + 3 * (np.arange(len(labels)) >= 2 * len(boxes)))
        )
        items.append((boxes, corners, scores, labels))
        total = total + detection_sums(corners, scores, labels, boxes.corners, boxes.labels, boxes.ignored, 2)
    np.testing.assert_allclose(average_precisions(total)[0], reference(items, 2)[0], atol=0.03)


def test_sums_survive_the_wire_and_lies_are_refused():
    boxes = random_boxes(np.random.default_rng(1), 4)
    sums = detection_sums(boxes.corners, np.ones(4), boxes.labels, boxes.corners, boxes.labels, boxes.ignored, 2)
    like = DetectionSums.zeros(2)
    again = DetectionSums.from_arrays(sums.to_arrays(), like)
    assert (again.found == sums.found).all()
    assert (again + like).rows == 1
    assert average_precisions(sums)[0].tolist() == [1.0, 1.0]
    for name, change in (
        ("rows", lambda array: array * 0),
        ("boxes", lambda array: array * 0),
        ("items", lambda array: array + 1),
        ("found", lambda array: array[::-1].copy() + 1),
        ("loss_sum", lambda array: array - 1),
        ("found", lambda array: array.astype(np.int64)),
    ):
        arrays = sums.to_arrays()
        arrays[name] = change(arrays[name])
        with pytest.raises(ValueError):
            DetectionSums.from_arrays(arrays, like)


@pytest.mark.parametrize("task", [make_task("detection", NAMES), make_task("segmentation", NAMES)])
@pytest.mark.parametrize("factor", [-1.0, 1e-3, 1e3])
def test_no_site_sends_sums_of_shares_that_no_shares_have(task, factor):
    like = task.statistics(3)
    honest = task.statistics(3)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)))
    shares = torch.rand(50, honest.num_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    honest.update(features, shares)
    honest.items = 9
    arrays = honest.to_arrays()
    assert like.from_arrays(arrays, like).items == 9
    arrays["target_totals"] = arrays["target_totals"].copy()
    arrays["target_totals"][0] *= factor
    arrays["target_squares"] = arrays["target_squares"] * max(1.0, factor**2)
    with pytest.raises(ValueError, match="a sum that no shares have"):
        like.from_arrays(arrays, like)


def test_a_class_without_boxes_has_no_average_precision():
    report = detection_report(DetectionSums.zeros(2), NAMES)
    assert report.ap50.value is None
    assert report.loss is None
    assert report.to_dict()["boxes"][0]["boxes"] == 0


def test_columns_follow_from_classes():
    task = make_task("detection", ["a"])
    assert task.classes == ("a",)
    assert make_task("detection", task.columns).columns == task.columns
    assert len(make_task("detection", NAMES).columns) == 12
    for wrong in ([], ["a", "a"], ["a", "a: objectness"]):
        with pytest.raises(UserError):
            make_task("detection", wrong)


def test_found_boxes_are_counted_drawn_and_exported():
    task = make_task("detection", NAMES)
    outputs = torch.full((GRID[0] * GRID[1], len(task.columns)), -9.0)
    outputs[104] = torch.tensor([9.0, -9, 9, -9, 0, 0, -1.0, -1.0, 0, 0, -2.0, -2.0])
    found = task.decode(outputs, GEOMETRY, (60, 80))
    assert [one["class"] for one in found] == ["cell"]
    left, top, width, height = found[0]["bbox"]
    assert (width, height) == (pytest.approx(80 * np.exp(-1), abs=0.01), pytest.approx(60 * np.exp(-1), abs=0.01))
    row, column = divmod(104, GRID[1])
    assert left + width / 2 == pytest.approx(80 * (column + 0.5) / GRID[1], abs=0.02)
    assert top + height / 2 == pytest.approx(60 * (row + 0.5) / GRID[0], abs=0.02)
    shown, numbers = task.summarise(found)
    assert numbers == (1.0, 0.0)
    assert task.cells(shown, numbers, ()) == ["1", "0"]
    image = Image.new("L", (80, 60))
    drawn = task.drawings(found, image)["-boxes.png"]
    assert drawn.size == image.size
    assert np.asarray(drawn).any()
    answers = task.program(outputs[None], torch.zeros(len(task.columns), dtype=torch.bool), GEOMETRY)
    assert answers.shape == (1, 192, 2, 5)
    corners = answers[0, 104, 0, :4] * torch.tensor([80, 60, 80, 60])
    assert corners.tolist() == pytest.approx([left, top, left + width, top + height], abs=0.02)


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, "places"),
        ({"layer": "maps"}, "maps/8"),
        ({"layer": "maps@640"}, "maps/8@640"),
        ({"layer": "maps/4@512"}, "maps/4@512"),
        ({"layer": "layer2:map"}, "layer2:map"),
    ],
)
def test_a_detector_takes_maps_from_stride_8(given, settled):
    assert RunConfig(task="detection", **given).settled().layer == settled
    own = {"layer": given["layer"]} if given else {}
    assert RunConfig(task="segmentation", **own).settled().layer == own.get("layer", "maps")
