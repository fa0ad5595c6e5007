import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from fedhead.backbones.proposals import Proposals
from fedhead.client.isolation import isolation
from fedhead.data.boxes import Boxes
from fedhead.errors import UserError
from fedhead.solvers import solve_head
from fedhead.tasks import make_task
from fedhead.tasks.dense import ItemPlaces
from fedhead.tasks.proposals import beside, match, refined

from .test_detection import random_boxes

GEOMETRY = Proposals(((6, 1, 40),), (64, 64))


def random_proposals(generator, boxes, count=40):
    """Return proposals: some near boxes, others anywhere, and the last five empty."""
    near = boxes.corners[generator.integers(0, len(boxes), count // 2)] + generator.normal(0, 0.03, (count // 2, 4))
    found = np.vstack([near, random_boxes(generator, count - len(near)).corners]).clip(0, 1)
    found[-5:] = 0
    return torch.from_numpy(found)


def random_items(seed, count=12):
    generator = np.random.default_rng(seed)
    boxes = [random_boxes(generator, int(generator.integers(1, 5)), crowds=0.2) for _ in range(count)]
    proposals = torch.stack([random_proposals(generator, one) for one in boxes]).float()
    features = torch.from_numpy(generator.normal(size=(count, 40, 6))).float()
    features[:, -5:] = 0
    return torch.cat([proposals, features], 2).flatten(1), boxes


def test_proposals_are_matched_and_coded_as_by_torchvision():
    generator = np.random.default_rng(0)
    boxes = random_boxes(generator, 6)
    corners, proposals = torch.from_numpy(boxes.corners), random_proposals(generator, boxes)[:-5]
    found = match(corners, proposals)
    theirs = Matcher(0.5, 0.5, allow_low_quality_matches=False)(box_iou(corners, proposals))
    assert found.box.tolist() == theirs.clamp(min=-1).tolist()
    positive = found.box >= 0
    assert 0 < int(positive.sum()) < len(proposals)
    codes = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(corners[found.box[positive]], proposals[positive])
    torch.testing.assert_close(found.shape[positive], codes)
    torch.testing.assert_close(refined(found.shape[:, None], proposals)[positive, 0], corners[found.box[positive]])
    assert found.objectness.tolist() == positive.double().tolist()


def test_empty_proposals_and_those_in_crowds_are_not_learned_from():
    values, boxes = random_items(1, count=1)
    places = make_task("detection", ("a", "b")).expand(values, boxes, GEOMETRY)
    assert len(places.features) <= 35
    everywhere = Boxes(np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([0]), np.array([True]))
    assert not len(make_task("detection", ("a", "b")).expand(values, [everywhere], GEOMETRY).features)
    inside = beside(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.2, 0.2, 0.7, 0.4], [0.5, 0, 1, 1]]))
    assert inside.tolist() == [True, False]


@pytest.mark.parametrize("cut", [0, 5, 12])
def test_any_split_gives_the_pooled_head(cut):
    values, boxes = random_items(2)
    task = make_task("detection", ("a", "b"))

    def summed(rows):
        stats = task.statistics(6)
        if len(values[rows]):
            places = task.expand(values[rows], boxes[rows], GEOMETRY)
            stats.update(places.features, places.targets)
            stats.items += places.items
        return stats

    one = solve_head(summed(slice(None)), "boxes")
    other = solve_head(summed(slice(0, cut)) + summed(slice(cut, None)), "boxes")
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-8, atol=1e-8)


def test_an_item_without_a_proposal_near_an_object_adds_nothing_to_its_class():
    task = make_task("detection", ("a", "b"))
    boxes = Boxes(np.array([[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]]), np.array([0, 1]), np.zeros(2, bool))
    near_first = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.0, 0.5, 0.4, 1.0]], dtype=torch.float64)
    assert task.summed_classes(boxes, GEOMETRY, near_first).tolist() == [True, False]
    assert task.summed_classes(boxes, GEOMETRY, torch.zeros(2, 4, dtype=torch.float64)).tolist() == [False, False]


def test_means_are_over_real_proposals():
    values, _ = random_items(3, count=2)
    torch.testing.assert_close(GEOMETRY.means(values), GEOMETRY.places(values)[:, :-5].mean(1))
    assert not GEOMETRY.means(torch.zeros(1, GEOMETRY.num_values)).any()


def test_proposals_in_one_image_alone_are_refused_as_isolating():
    """A hostile detector proposes nothing but in images with a mark, so that all sums would be theirs."""
    values, _ = random_items(4, count=30)
    found = isolation(lambda rows: GEOMETRY.means(values[rows]), 6, np.arange(30))
    assert not found.fault()
    values[1:] = 0
    assert isolation(lambda rows: GEOMETRY.means(values[rows]), 6, np.arange(30)).fault()


@pytest.mark.parametrize(("task", "columns"), [("classification", ("a", "b")), ("segmentation", ("a", "b"))])
def test_other_tasks_take_no_proposals(task, columns):
    with pytest.raises(UserError, match=f"which the task '{task}' does not take"):
        ItemPlaces.of(make_task(task, columns), GEOMETRY, None)
