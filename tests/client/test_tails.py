"""Training of tails at sites, against `torch.optim` on the unfrozen model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.pooling import pool
from fedhead.backbones.split import split
from fedhead.client.averaging import average_heads
from fedhead.client.labelled_features import SiteRows
from fedhead.client.minibatches import shuffled
from fedhead.client.tails import LabelledActivations
from fedhead.client.training import evaluate_head, train_heads
from fedhead.config import LocalConfig
from fedhead.data import load_samples
from fedhead.features.boundary import BoundaryStore
from fedhead.heads import LinearHead, TunedHead
from fedhead.sums.heads import CURVE
from fedhead.tasks.losses import CrossEntropy
from fedhead.tuning import parse_tune

ROWS, CLASSES, SEED, ROUND = 60, 3, 4, 2
LOCAL = LocalConfig(epochs=2, batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0.01)
SGD = LocalConfig(epochs=2, batch_size=16, lr=0.02, momentum=0.9, weight_decay=0.01)

pytestmark = pytest.mark.usefixtures("one_thread")


class Pictures:
    """Random pictures of three classes, and a tuned head with a store of their activations."""

    def __init__(self, folder: Path, spec: str, layers: str, side: int, decay: float = 1.0) -> None:
        self.decay = decay
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (ROWS, side, side, 3), dtype=np.uint8)
        self.labels = torch.from_numpy(generator.integers(0, CLASSES, ROWS))
        np.savez(folder / "pictures.npz", images=images, labels=self.labels.numpy())
        self.samples = load_samples(f"npz:{folder / 'pictures.npz'}")
        self.backbone: Backbone = load_backbone(spec, weights="random", seed=1)
        self.trunk, self.tail = split(self.backbone, parse_tune(layers))
        self.store = BoundaryStore.open(
            self.trunk, self.tail, self.samples, np.arange(ROWS), root=folder, number="float32"
        )
        head = LinearHead(self.backbone.num_features, CLASSES)
        head.randomise(torch.Generator().manual_seed(2))
        self.scale = (torch.full((head.num_features,), 0.1), torch.full((head.num_features,), 0.7))
        self.head = TunedHead(self.tail, head, self.scale, decay=decay)
        self.data = LabelledActivations(torch.zeros(ROWS, 1), self.labels, loss=CrossEntropy(), store=self.store)

    def batch(self, rows: np.ndarray) -> Tensor:
        items = [self.samples.read(int(row)) for row in rows]
        batch = self.backbone.preprocessing.collate([self.backbone.preprocessing(item) for item in items])
        assert isinstance(batch, Tensor)
        return batch


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return Pictures(tmp_path, "bundled:glyphnet", "last:1", 8)


def train_alone(pictures: Pictures, site: SiteRows, local: LocalConfig) -> tuple[dict[str, Tensor], float]:
    """Unfreeze the tail in the whole backbone, and train it as one would without fedhead."""
    backbone = copy.copy(pictures.backbone)
    backbone.module = copy.deepcopy(pictures.backbone.module)
    head = nn.Linear(pictures.backbone.num_features, CLASSES)
    with torch.no_grad():
        head.weight.copy_(pictures.head.head.weight)
        head.bias.copy_(pictures.head.head.bias)
    named = dict(backbone.module.named_parameters())
    unfrozen = {name: named[name].requires_grad_() for name in pictures.tail.trainable()}
    every: Any = [*head.parameters(), *unfrozen.values()]
    if (decay := pictures.decay) != 1:
        slow = [
            {"params": [one], "lr": local.lr / decay ** pictures.tail.depths[name]} for name, one in unfrozen.items()
        ]
        every = [{"params": list(head.parameters())}, *slow]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(every, lr=local.lr, weight_decay=local.weight_decay)
    if local.optimizer == "sgd":
        optimizer = torch.optim.SGD(every, lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay)
    mean, scale = pictures.scale
    total = 0.0
    for epoch in range(local.epochs):
        total = 0.0
        order = site.rows[shuffled(SEED, site.name, ROUND, epoch, len(site.rows))]
        for start in range(0, len(order), LOCAL.batch_size):
            rows = order[start : start + LOCAL.batch_size]
            features = pool(backbone.module(pictures.batch(rows)), backbone.pooling)
            loss = functional.cross_entropy(head((features - mean) / scale), pictures.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
    trained = {f"tail.{name}": value.detach() for name, value in unfrozen.items()}
    return {"head.weight": head.weight.detach(), "head.bias": head.bias.detach(), **trained}, total / len(site.rows)


@pytest.mark.parametrize(("local", "tolerance"), [(SGD, 1e-4), (LOCAL, 1e-2)])
def test_training_equals_torch_optim_on_the_unfrozen_model(
    pictures: Pictures, local: LocalConfig, tolerance: float
) -> None:
    # AdamW's first steps have the size of the learning rate even where rounding decides a gradient's sign.
    site = SiteRows("a", np.arange(5, 44))
    incoming = pictures.head.trainable()
    trained = train_heads(pictures.head, incoming, pictures.data, [site], local, seed=SEED, round_number=ROUND)
    expected, loss = train_alone(pictures, site, local)
    assert trained.parameters.keys() == expected.keys()
    assert trained.losses[0] == pytest.approx(loss, rel=1e-3)
    for name, value in expected.items():
        moved = (value - incoming[name]).norm()
        assert moved > 0
        assert (trained.parameters[name][0] - value).norm() < tolerance * moved


@pytest.mark.parametrize("local", [SGD, LOCAL])
def test_lower_blocks_learn_more_slowly(tmp_path: Path, local: LocalConfig) -> None:
    slowed = Pictures(tmp_path, "bundled:glyphnet", "last:2", 8, decay=2.6)
    site, incoming = SiteRows("a", np.arange(5, 44)), slowed.head.trainable()
    trained = train_heads(slowed.head, incoming, slowed.data, [site], local, seed=SEED, round_number=ROUND)
    expected, _ = train_alone(slowed, site, local)
    for name, value in expected.items():
        assert (trained.parameters[name][0] - value).norm() < 1e-2 * (value - incoming[name]).norm()


def test_a_site_trains_the_same_beside_others_as_alone(pictures: Pictures) -> None:
    sites = [SiteRows("a", np.arange(0, 20)), SiteRows("b", np.arange(20, 50)), SiteRows("none", np.arange(0))]
    incoming = pictures.head.trainable()
    together = train_heads(pictures.head, incoming, pictures.data, sites, LOCAL, seed=SEED, round_number=ROUND)
    alone = train_heads(pictures.head, incoming, pictures.data, sites[1:2], LOCAL, seed=SEED, round_number=ROUND)
    averaged, evaluation = average_heads(
        pictures.head, incoming, pictures.data, sites, LOCAL, sites, seed=SEED, round_number=ROUND
    )
    assert evaluation.curves.shape == (3, len(CURVE))
    for name, value in incoming.items():
        assert torch.equal(together.parameters[name][1], alone.parameters[name][0])
        assert torch.equal(together.parameters[name][2], value)
        mean = (20 * together.parameters[name][0] + 30 * together.parameters[name][1]) / 50
        torch.testing.assert_close(averaged.parameters[name], mean)


def test_losses_at_temperatures_are_those_of_divided_logits(pictures: Pictures) -> None:
    site = SiteRows("a", np.arange(30))
    evaluation = evaluate_head(pictures.head, pictures.head.trainable(), pictures.data, [site])
    with torch.no_grad():
        logits = pictures.head(pictures.store.take(site.rows))
    losses = [
        float(functional.cross_entropy(logits / temperature, pictures.labels[:30], reduction="sum"))
        for temperature in CURVE
    ]
    np.testing.assert_allclose(evaluation.curves[0], losses, rtol=1e-4)
    assert evaluation.losses[0] == pytest.approx(losses[len(CURVE) // 2], rel=1e-4)


def test_adjustment_hides_a_sites_class_shares(pictures: Pictures) -> None:
    shares = torch.tensor([0.2, 0.3, 0.5])
    data = LabelledActivations(
        torch.zeros(ROWS, 1), pictures.labels, loss=CrossEntropy(), store=pictures.store, shares=shares
    )
    site = SiteRows("a", np.flatnonzero(pictures.labels.numpy() != 2))
    counts = np.bincount(pictures.labels[site.rows], minlength=CLASSES)
    outputs = torch.zeros(1, len(site.rows), CLASSES)
    targets = pictures.labels[site.rows][None]
    own = torch.tensor(np.maximum(counts, 0.5) / counts.sum()).log() - shares.log()
    expected = functional.cross_entropy(own.float().expand(len(site.rows), -1), targets[0], reduction="none")
    torch.testing.assert_close(data.loss_at([site]).values(outputs, targets)[0], expected)


def test_a_version_that_diverged_is_a_bad_one_and_no_broken_reply(pictures: Pictures) -> None:
    broken = {name: torch.full_like(value, torch.nan) for name, value in pictures.head.trainable().items()}
    evaluation = evaluate_head(pictures.head, broken, pictures.data, [SiteRows("a", np.arange(10))])
    assert np.isfinite(evaluation.losses).all()
    assert (evaluation.curves >= 10 * 50).all()
