"""A problem of stated size for all that are compared: the same rows, the same batches, the same first head."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources, load_backbone
from fedhead.client.minibatches import shuffled
from fedhead.config import RunConfig
from fedhead.data import IntArray, Samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.simulations.partition import divide
from fedhead.simulations.result import RunResult
from fedhead.simulations.simulate import simulate
from fedhead.sums.moments import FeatureMoments

Head = tuple[Tensor, Tensor]
"""Weight `[C, d]` and bias `[C]`."""

CLASSES = 10
HEIGHT = 8
SEED = 0
TOLERANCE = 1e-3
"""Relative, after rounds of float32 arithmetic in different orders."""


@backbone_sources.register("benchmark")
def grey_values(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build `benchmark:D`: an image's own `D` grey values, so that features are what a benchmark says they are."""
    if not name.isdecimal() or int(name) % HEIGHT:
        raise UserError(f"A benchmark's features are a multiple of {HEIGHT}, not {name!r}.")
    preprocessing = ImagePreprocessing(1, (HEIGHT, int(name) // HEIGHT), None, (0.5,), (0.25,))
    return Backbone(f"benchmark:{name}", nn.Flatten(), preprocessing)


def grey() -> tuple[nn.Module, ImagePreprocessing]:
    """Return the same of 64 grey values for `python:`, whose features do not depend on their batch in any bit."""
    return nn.Flatten(), ImagePreprocessing(1, (HEIGHT, HEIGHT), None, (0.5,), (0.25,))


@dataclass(frozen=True)
class Problem:
    """A softmax head on features, federated.

    Attributes:
        sites: `S`.
        rows: at each site.
        features: `d`.
        rounds: of FedAvg, every site in every round.
        batch_size: of plain SGD, one epoch a round.
        lr: its learning rate.
    """

    sites: int = 100
    rows: int = 50
    features: int = 512
    rounds: int = 20
    batch_size: int = 10
    lr: float = 0.01

    def config(self, **changes: object) -> RunConfig:
        """Return the configuration that peers compute as well: from zeros, nothing held out and no guard."""
        return RunConfig(
            backbone=f"benchmark:{self.features}",
            init="zeros",
            rounds=self.rounds,
            holdout=0.0,
            seed=SEED,
            keep_sums="none",
            diagnose=False,
            local={"batch_size": self.batch_size, "lr": self.lr},
            simulation={
                "sites": self.sites,
                "partition": "iid",
                "min_class_count": 0,
                "min_rows": 0,
                "device": "cpu",
            },
        ).changed(changes)

    def samples(self) -> Samples:
        """Return images of overlapping classes."""
        generator = np.random.default_rng(SEED)
        count = self.sites * self.rows
        labels = generator.integers(0, CLASSES, count)
        means = generator.uniform(80, 175, (CLASSES, self.features)).astype(np.float32)
        images = np.empty((count, HEIGHT, self.features // HEIGHT), dtype=np.uint8)
        for start in range(0, count, 10_000):
            block = labels[start : start + 10_000]
            noise = generator.standard_normal((len(block), self.features), dtype=np.float32)
            images[start : start + 10_000] = (means[block] + 70 * noise).clip(0, 255).reshape(-1, *images.shape[1:])
        # Every class at its own index.
        return samples_from_arrays(images, labels, classes=[str(c) for c in range(CLASSES)], spec="benchmark")

    def simulate(self, samples: Samples, out: Path) -> RunResult:
        """Run it as a user would."""
        return simulate(self.config(), samples, self.sites, out=out)

    def tables(self, samples: Samples) -> "Tables":
        """Return the training data of peers: the same standardised features, in memory, by site."""
        store = FeatureStore.open(load_backbone(f"benchmark:{self.features}"), samples)
        moments = FeatureMoments.empty(store.features[:1].mean(0)).updated(store.features)
        mean, scale = moments.mean().float(), moments.scale().float()
        parts = divide("iid", samples.labels, self.sites, SEED)
        rows = torch.from_numpy(np.stack(list(parts.values())))
        features = (store.features[rows] - mean) / scale
        return Tables(self, tuple(parts), features, torch.from_numpy(samples.labels)[rows], mean, scale)


@dataclass(frozen=True)
class Tables:
    """Every site's rows.

    Attributes:
        problem: their problem.
        names: of the sites.
        features: `[S, n, d]`, standardised.
        labels: `[S, n]`.
        mean: `[d]`.
        scale: `[d]`.
    """

    problem: Problem
    names: tuple[str, ...]
    features: Tensor
    labels: Tensor
    mean: Tensor
    scale: Tensor

    def order(self, site: int, round_number: int) -> IntArray:
        """Return the order of a site's rows in a round, which is ours."""
        return shuffled(SEED, self.names[site], round_number, 0, self.problem.rows)

    def check(self, name: str, head: Head, result: RunResult) -> None:
        """Check a peer's head on standardised features against the run's.

        Raises:
            FedheadError: if they are not of the same computation.
        """
        ours = result.outcome.head.state_dict()
        weight, bias = head
        folded = weight / self.scale
        for key, value in (("weight", folded), ("bias", bias - folded @ self.mean)):
            distance = float((value - ours[key]).norm() / ours[key].norm())
            if not distance <= TOLERANCE:
                raise FedheadError(f"{name} computes another {key}: it differs by {distance:.1g} of the norm.")


@contextmanager
def own_home() -> Iterator[Path]:
    """Keep features and runs in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedhead-benchmark-") as folder, patch.dict(environ, FEDHEAD_HOME=folder):
        yield Path(folder)
