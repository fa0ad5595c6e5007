"""Tails that train on other objectives than the task's loss, against plain training of the unfrozen model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.objectives import cut
from fedhead.backbones.pooling import pool
from fedhead.client.labelled_features import SiteRows
from fedhead.client.minibatches import shuffled
from fedhead.client.tails import LabelledActivations
from fedhead.client.training import evaluate_head, train_heads
from fedhead.config import LocalConfig
from fedhead.data import load_samples
from fedhead.features.boundary import BoundaryStore
from fedhead.heads import LinearHead, ObjectiveHead
from fedhead.heads.views import view_of
from fedhead.tasks.losses import CrossEntropy
from fedhead.tuning import ObjectiveName, parse_tune

ROWS, CLASSES, SEED, ROUND = 60, 3, 4, 2
SGD = LocalConfig(epochs=2, batch_size=16, lr=0.02, momentum=0.9, weight_decay=0.01)

pytestmark = pytest.mark.usefixtures("one_thread")


class Pictures:
    """Random pictures of three classes, and a head on a tail that trains by an objective."""

    def __init__(self, folder: Path, objective: ObjectiveName) -> None:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
        self.labels = torch.from_numpy(generator.integers(0, CLASSES, ROWS))
        np.savez(folder / "pictures.npz", images=images, labels=self.labels.numpy())
        self.samples = load_samples(f"npz:{folder / 'pictures.npz'}")
        self.backbone: Backbone = load_backbone("bundled:glyphnet", weights="random", seed=1)
        made = cut(self.backbone, parse_tune("last:1"), objective)
        self.trunk, self.tail = made.split
        self.store = BoundaryStore.open(
            self.trunk, self.tail, self.samples, np.arange(ROWS), root=folder, number="float32"
        )
        head = LinearHead(self.backbone.num_features, CLASSES)
        head.randomise(torch.Generator().manual_seed(2))
        self.scale = (torch.full((head.num_features,), 0.1), torch.full((head.num_features,), 0.7))
        assert made.objective is not None
        self.objective = made.objective
        self.head = ObjectiveHead(made.objective, self.tail, head, self.scale)
        self.data = LabelledActivations(torch.zeros(ROWS, 1), self.labels, loss=CrossEntropy(), store=self.store)

    def batch(self, rows: np.ndarray) -> Tensor:
        items = [self.samples.read(int(row)) for row in rows]
        batch = self.backbone.preprocessing.collate([self.backbone.preprocessing(item) for item in items])
        assert isinstance(batch, Tensor)
        return batch


def contrast(unit: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrast with sums of exponentials, as in its authors' code without a second view."""
    mask = (labels[:, None] == labels).float().fill_diagonal_(0)
    logits = unit @ unit.T / 0.1
    others = torch.ones_like(mask).fill_diagonal_(0)
    logs = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    positives = mask.sum(1)
    return -((mask * logs).sum(1)[positives > 0] / positives[positives > 0]).mean()


def train_alone(pictures: Pictures, site: SiteRows, loss_of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Unfreeze the tail in the whole backbone, and train it as one would without fedhead."""
    module = copy.deepcopy(pictures.backbone.module)
    head = nn.Linear(pictures.backbone.num_features, CLASSES)
    with torch.no_grad():
        head.weight.copy_(pictures.head.head.weight)
        head.bias.copy_(pictures.head.head.bias)
    named = dict(module.named_parameters())
    unfrozen = {name: named[name].requires_grad_() for name in pictures.tail.trainable()}
    every: Any = [*head.parameters(), *unfrozen.values()]
    optimizer = torch.optim.SGD(every, lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    mean, scale = pictures.scale
    for epoch in range(SGD.epochs):
        order = site.rows[shuffled(SEED, site.name, ROUND, epoch, len(site.rows))]
        for start in range(0, len(order), SGD.batch_size):
            rows = order[start : start + SGD.batch_size]
            features = (pool(module(pictures.batch(rows)), pictures.backbone.pooling) - mean) / scale
            labels = pictures.labels[rows]
            followed = functional.cross_entropy(head(features.detach()), labels)
            optimizer.zero_grad()
            (loss_of(features, labels) + followed).backward()
            optimizer.step()
    trained = {f"tail.{name}": value.detach() for name, value in unfrozen.items()}
    return {"head.weight": head.weight.detach(), "head.bias": head.bias.detach(), **trained}


def test_contrast_at_one_site_equals_plain_training(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, "supcon")
    site, incoming = SiteRows("a", np.arange(5, 44)), pictures.head.trainable()
    trained = train_heads(pictures.head, incoming, pictures.data, [site], SGD, seed=SEED, round_number=ROUND)
    expected = train_alone(pictures, site, lambda rows, labels: contrast(functional.normalize(rows), labels))
    assert trained.parameters.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - incoming[name]).norm()
        assert moved > 0
        assert (trained.parameters[name][0] - value).norm() < 1e-3 * moved


def negative_cosine(predicted: Tensor, seen: Tensor) -> Tensor:
    """`D` in algorithm 1 of Chen & He (2021)."""
    return -(functional.normalize(predicted, dim=1) * functional.normalize(seen.detach(), dim=1)).sum(1).mean()


def test_agreement_of_views_at_one_site_equals_plain_training(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, "simsiam")
    site, incoming = SiteRows("a", np.arange(5, 44)), pictures.head.trainable()
    generator = torch.Generator().manual_seed(7)
    pictures.head.seed_draws = lambda stream: pictures.head.draw_from(generator)  # type: ignore[method-assign]
    trained = train_heads(pictures.head, incoming, pictures.data, [site], SGD, seed=SEED, round_number=ROUND)

    width, generator = pictures.backbone.num_features, torch.Generator().manual_seed(7)
    tail = copy.deepcopy(pictures.tail)
    first, second = nn.Linear(width, width // 4, bias=False), nn.Linear(width // 4, width)
    norms = [nn.BatchNorm1d(size, affine=False) for size in (width, width // 4)]
    head = nn.Linear(width, CLASSES)
    modules = {"objective.predictor.first": first, "objective.predictor.second": second, "head": head}
    with torch.no_grad():
        for name, module in modules.items():
            for part, value in module.named_parameters():
                value.copy_(incoming[f"{name}.{part}"])
    unfrozen = {name: value for name, value in tail.named_parameters() if value.requires_grad}
    every: Any = [*unfrozen.values(), *(one for module in modules.values() for one in module.parameters())]
    optimizer = torch.optim.SGD(every, lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    mean, scale = pictures.scale
    for epoch in range(SGD.epochs):
        order = site.rows[shuffled(SEED, site.name, ROUND, epoch, len(site.rows))]
        for start in range(0, len(order), SGD.batch_size):
            rows = order[start : start + SGD.batch_size]
            maps = pictures.trunk.boundary(pictures.batch(rows)).values
            seen = [norms[0](tail(view)) for view in [view_of(maps, generator), view_of(maps, generator)]]
            predicted = [second(functional.relu(norms[1](first(one)))) for one in seen]
            loss = (negative_cosine(predicted[0], seen[1]) + negative_cosine(predicted[1], seen[0])) / 2
            features = ((tail(maps) - mean) / scale).detach()
            optimizer.zero_grad()
            (loss + functional.cross_entropy(head(features), pictures.labels[rows])).backward()
            optimizer.step()
    expected = {f"tail.{name.removeprefix(tail.prefix)}": value for name, value in unfrozen.items()}
    for name, module in modules.items():
        expected |= {f"{name}.{part}": value for part, value in module.named_parameters()}
    assert trained.parameters.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - incoming[name]).norm()
        assert moved > 0
        assert (trained.parameters[name][0] - value).norm() < 1e-3 * moved


def test_agreement_of_views_uses_no_labels(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, "simsiam")
    site, incoming = SiteRows("a", np.arange(5, 44)), pictures.head.trainable()
    shuffled_labels = replace(pictures.data, labels=pictures.labels.flip(0))
    one, other = (
        train_heads(pictures.head, incoming, data, [site], SGD, seed=SEED, round_number=ROUND).parameters
        for data in (pictures.data, shuffled_labels)
    )
    for name in incoming:
        assert torch.equal(one[name], other[name]) == (not name.startswith("head."))


@pytest.mark.parametrize("objective", ["supcon", "simsiam"])
def test_a_site_trains_the_same_beside_others_as_alone(tmp_path: Path, objective: ObjectiveName) -> None:
    pictures = Pictures(tmp_path, objective)
    sites = [SiteRows("a", np.arange(0, 20)), SiteRows("b", np.arange(20, 50)), SiteRows("none", np.arange(0))]
    incoming = pictures.head.trainable()
    together = train_heads(pictures.head, incoming, pictures.data, sites, SGD, seed=SEED, round_number=ROUND)
    alone = train_heads(pictures.head, incoming, pictures.data, sites[1:2], SGD, seed=SEED, round_number=ROUND)
    for name, value in incoming.items():
        assert torch.equal(together.parameters[name][1], alone.parameters[name][0])
        assert torch.equal(together.parameters[name][2], value)


def test_the_head_follows_without_a_gradient_into_the_tail(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, "supcon")
    site = SiteRows("a", np.flatnonzero(pictures.labels.numpy() == 0)[:1])
    incoming = pictures.head.trainable()
    local = SGD.model_copy(update={"weight_decay": 0.0})
    trained = train_heads(pictures.head, incoming, pictures.data, [site], local, seed=SEED, round_number=ROUND)
    # A single row has no other one to be compared with.
    for name, value in incoming.items():
        assert torch.equal(trained.parameters[name][0], value) == name.startswith("tail.")
    before, after = (
        evaluate_head(pictures.head, parameters, pictures.data, [site]).losses[0]
        for parameters in (incoming, {name: value[0] for name, value in trained.parameters.items()})
    )
    assert after < before
