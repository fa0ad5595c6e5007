import numpy as np
import pytest
import torch

from fedhead.backbones.geometry import Geometry
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.place_training import train_on_places
from fedhead.config import LocalConfig
from fedhead.data.boxes import Boxes
from fedhead.heads import LinearHead
from fedhead.tasks import dense
from fedhead.tasks.dense import DenseTask, ItemPlaces
from fedhead.tasks.detection import Detection
from fedhead.tasks.segmentation import Segmentation

GEOMETRY = Geometry(((3, 4, 4),), (16, 16))


def problem(task: DenseTask, items: int = 6) -> LabelledFeatures:
    generator = np.random.default_rng(0)
    masks = generator.integers(0, 2, (items, 16, 16)).astype(np.uint8)
    corners = generator.uniform(0, 0.6, (items, 2, 2))
    boxes = [Boxes(np.hstack([one, one + 0.3]), generator.integers(0, 2, 2), np.zeros(2, np.bool_)) for one in corners]
    read = masks.__getitem__ if isinstance(task, Segmentation) else boxes.__getitem__
    features = torch.from_numpy(generator.normal(2, 3, (items, GEOMETRY.num_values)).astype(np.float32))
    scale = (torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64), torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64))
    return LabelledFeatures(features, torch.zeros(items, 2), scale, task.loss, places=ItemPlaces(task, GEOMETRY, read))


def trained(task: DenseTask, data: LabelledFeatures, settings: LocalConfig) -> dict[str, torch.Tensor]:
    head = LinearHead(3, len(task.columns))
    incoming = {name: torch.full_like(value, 0.1) for name, value in head.trainable().items()}
    site = SiteRows("north", np.arange(len(data.features)))
    ((_, found),) = train_on_places(head, incoming, data, [site], settings, seed=0, round_number=1)
    assert found.rows.tolist() == [len(data.features)]
    return {name: value[0] for name, value in found.parameters.items()}


@pytest.mark.parametrize("task", [Segmentation(("a", "b")), Detection(("a", "b"))], ids=lambda task: task.name)
def test_a_step_is_that_of_torch_on_the_mean_loss_of_items(task: DenseTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_PLACES", GEOMETRY.num_places)
    data = problem(task)
    found = trained(task, data, LocalConfig(lr=0.05, batch_size=6))
    assert data.places is not None
    module = torch.nn.Linear(3, len(task.columns))
    torch.nn.init.constant_(module.weight, 0.1)
    torch.nn.init.constant_(module.bias, 0.1)
    assert data.standardisation is not None
    mean, scale = data.standardisation
    loss = torch.zeros(())
    for row in range(6):
        places = task.expand(data.features[row : row + 1], [data.places.annotation(row)], GEOMETRY)
        outputs = module(((places.features - mean) / scale).float())
        loss = loss + task.training_loss(outputs, places.targets[:, : len(task.columns)].float()) / 6
    loss.backward()
    torch.optim.SGD(module.parameters(), 0.05).step()
    torch.testing.assert_close(found["weight"], module.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bias"], module.bias.detach(), rtol=1e-4, atol=1e-5)


def test_masks_give_the_same_head_whichever_items_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    task, settings = Segmentation(("a", "b")), LocalConfig(lr=0.1, batch_size=3, epochs=2, proximal_mu=0.1)
    whole = trained(task, problem(task), settings)
    monkeypatch.setattr(dense, "BLOCK_PLACES", GEOMETRY.num_places)
    for name, value in trained(task, problem(task), settings).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_a_site_without_training_rows_returns_the_incoming_head() -> None:
    task = Segmentation(("a", "b"))
    data, head = problem(task), LinearHead(3, 2)
    incoming = {name: torch.full_like(value, 0.3) for name, value in head.trainable().items()}
    site = SiteRows("north", np.empty(0, np.int64))
    ((_, found),) = train_on_places(head, incoming, data, [site], LocalConfig(), seed=0, round_number=1)
    assert found.rows.tolist() == [0]
    for name, value in found.parameters.items():
        torch.testing.assert_close(value[0], incoming[name])


def test_blocks_of_items_are_the_features_of_their_places() -> None:
    data = problem(Segmentation(("a", "b")))
    blocks = list(data.blocks_of(np.array([1, 4])))
    torch.testing.assert_close(torch.cat(blocks), GEOMETRY.places(data.features[[1, 4]]).flatten(0, 1))
