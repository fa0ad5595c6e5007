"""An audit of the stated epsilon by canaries, in one run (Steinke, Nasr and Jagielski, 2023).

Many canaries, rows of random features, are each added to the data with probability 1/2. From the releases, an auditor
who knows all other rows guesses for some of the canaries whether they were added. Under `(epsilon, delta)`-differential
privacy so many right guesses are improbable; the largest epsilon that they refute is a lower bound of the true one. A
bound above the stated epsilon proves an error in sensitivities, noise or accounting.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedhead.backbones import Backbone
from fedhead.client.agreement import Agreement
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.private_sums import blocks, clipped_residuals, private_sums
from fedhead.client.release.guard import Guard
from fedhead.client.site_data import Holding, hold
from fedhead.config import RunConfig
from fedhead.data import IntArray
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.sensitivity import unsvec
from fedhead.privacy.stages import BIAS_FEATURE
from fedhead.protocol.messages import Manifest
from fedhead.protocol.private import PrivateRequest
from fedhead.server.private_run import Released, named_features, solve_private
from fedhead.simulations.sites import SharedData
from fedhead.sums.sums import Arrays

CANARIES, GUESSES = 1000, 200
"""Canaries, and those of them that are guessed: half as added, half as left out. Both are fixed before the run."""

CONFIDENCE = 0.95

FloatArray = npt.NDArray[np.float64]
AddNoise = Callable[[Mechanism, Arrays], Arrays]


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        canaries: their number.
        guesses: the number of guesses.
        right: those that were right.
        stated: the epsilon that was promised.
        delta: the delta.
    """

    canaries: int
    guesses: int
    right: int
    stated: float
    delta: float

    @property
    def measured(self) -> float:
        """The largest epsilon that the guesses refute with `CONFIDENCE`; 0 if they refute none."""
        low, high = 0.0, 50.0
        if self.chance(low) > 1 - CONFIDENCE:
            return 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.chance(middle) <= 1 - CONFIDENCE else (low, middle)
        return low

    def chance(self, epsilon: float) -> float:
        """Return a bound on the probability of so many right guesses under `epsilon` and `delta` (theorem 5.2)."""
        each = 1 / (1 + math.exp(-epsilon))
        total, trials = self.guesses, np.arange(self.guesses + 1)
        logarithms = np.array(
            [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in trials]
        )
        with np.errstate(divide="ignore"):
            logarithms += trials * math.log(each) + (total - trials) * np.log1p(-each)
        chances = np.exp(np.where(np.isnan(logarithms), -np.inf, logarithms))
        # The probability of 1, 2, ... fewer right guesses than there were, over how many fewer they are.
        fewer = np.cumsum(chances[: self.right][::-1]) / np.arange(1, self.right + 1)
        slack = 2 * self.canaries * self.delta * float(fewer.max(initial=0.0))
        return min(float(chances[self.right :].sum()) + slack, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "method": "one-run audit",
            "canaries": self.canaries,
            "guesses": self.guesses,
            "right": self.right,
            "confidence": CONFIDENCE,
            "measured": self.measured,
            "stated": self.stated,
        }


def audit_private(
    config: RunConfig,
    backbone: Backbone,
    shared: SharedData,
    rows: IntArray,
    add_noise: AddNoise = Mechanism.add_noise,
) -> Audit:
    """Audit the releases about training rows of a private run, made once more with canaries among its rows.

    Args:
        config: the run.
        backbone: of the run.
        shared: the features of all rows.
        rows: those of all sites.
        add_noise: adds the noise of a release; only tests have another one.
    """
    probe = shared.probe.cpu()
    agreed = Agreement(Manifest.of("audit", config, backbone, config.classes), probe, None)
    terms = agreed.manifest.privacy
    assert terms is not None
    rng = np.random.default_rng(config.seed)
    mixed = _Mixed(shared, rows, probe, rng)
    added = rng.random(CANARIES) < 0.5
    in_runs, all_of_them = mixed.canaries(added), mixed.canaries(np.ones(CANARIES, np.bool_))
    scores, similarity = np.zeros(CANARIES), np.zeros((CANARIES, CANARIES))

    def ask(request: PrivateRequest) -> Released:
        mechanism = request.mechanism(len(config.classes), backbone.num_features)
        if request.stage == "calibration":
            # Its few sums tell little of single canaries.
            return Released(mechanism, add_noise(mechanism, private_sums([mixed.known], agreed, request)))
        known = private_sums([mixed.known], agreed, request)
        inside = private_sums([in_runs], agreed, request)
        every = private_sums([all_of_them], agreed, request)
        noisy = add_noise(mechanism, {name: array + inside[name] for name, array in known.items()})
        # Half of the canaries are expected to be added.
        rest = {name: (noisy[name] - known[name] - every[name] / 2) / mechanism.sigma(name) ** 2 for name in known}
        own = list(blocks([all_of_them], agreed, request))
        features, labels = torch.cat([block[0] for block in own]), torch.cat([block[1] for block in own])
        scores[:] += _agreement_with(rest, features, labels, request)
        similarity[:] += _similarity(features, labels, request, mechanism)
        return Released(mechanism, noisy)

    solve_private(ask, terms.mu, len(config.classes), config.rounds, named_features(backbone, config.classes))
    # Each is added with probability 1/2: the best linear estimate given all others.
    estimates = np.linalg.solve(similarity + 4 * np.eye(CANARIES), scores)
    order = np.argsort(estimates, kind="stable")
    half = GUESSES // 2
    right = int(added[order[-half:]].sum() + (~added[order[:half]]).sum())
    return Audit(CANARIES, GUESSES, right, terms.epsilon, terms.delta)


class _Mixed:
    """The run's rows, followed by canaries: random directions about the probe's mean, with random classes."""

    def __init__(self, shared: SharedData, rows: IntArray, probe: Tensor, rng: np.random.Generator) -> None:
        features, labels = shared.data.features[rows].cpu(), shared.data.labels[rows].cpu()
        directions = torch.from_numpy(rng.normal(size=(CANARIES, features.shape[1])))
        classes = torch.from_numpy(rng.integers(0, len(shared.task.columns), CANARIES))
        canaries = (probe.double().mean(0) + directions).to(features.dtype)
        self._shared = shared
        self._first = len(rows)
        self._data = LabelledFeatures(
            torch.cat([features, canaries]), torch.cat([labels, classes.to(labels.dtype)]), loss=shared.task.loss
        )
        # A canary is a group of its own.
        others = np.arange(CANARIES, dtype=shared.keys.dtype) + shared.keys.max(initial=0) + 1
        self._keys = np.concatenate([shared.keys[rows], others])
        self.known = self._holding(np.arange(self._first))

    def canaries(self, chosen: npt.NDArray[np.bool_]) -> Holding:
        """Return some of the canaries alone, as if they were all rows of a site."""
        return self._holding(self._first + np.flatnonzero(chosen))

    def _holding(self, rows: IntArray) -> Holding:
        shared, out = self._shared, np.zeros(len(rows), np.bool_)
        return hold("", rows, out, self._data, self._data.labels.numpy(), self._keys, shared.task, Guard.off())


def _agreement_with(rest: Arrays, rows: Tensor, labels: Tensor, request: PrivateRequest) -> FloatArray:
    """Return `[n]`, the inner product of each row's part of a release with `rest`."""
    parts = {name: torch.from_numpy(np.asarray(array)) for name, array in rest.items()}
    if "gradient" in parts:
        head = {name: torch.from_numpy(np.array(array)).double() for name, array in request.arrays.items()}
        residuals, extended = clipped_residuals(rows, labels, head), nn.functional.pad(rows, (0, 1), value=BIAS_FEATURE)
        scores = (residuals * (extended @ parts["gradient"].T)).sum(1)
    elif "total" in parts:
        scores = parts["count"] + rows @ parts["total"]
    else:
        scores = parts["counts"][labels] + (rows * parts["sums"][labels]).sum(1)
    if "gram" in parts:
        scores = scores + ((rows @ unsvec(parts["gram"], rows.shape[1])) * rows).sum(1)
    found: FloatArray = scores.numpy()
    return found


def _similarity(rows: Tensor, labels: Tensor, request: PrivateRequest, mechanism: Mechanism) -> FloatArray:
    """Return `[n, n]`, inner products of the rows' parts of a release, in units of its noise."""
    weights = {name: mechanism.sigma(name) ** -2 for name in mechanism.arrays}
    products = rows @ rows.T
    same = (labels[:, None] == labels).double()
    if "gradient" in weights:
        head = {name: torch.from_numpy(np.array(array)).double() for name, array in request.arrays.items()}
        residuals = clipped_residuals(rows, labels, head)
        found = weights["gradient"] * (residuals @ residuals.T) * (products + BIAS_FEATURE**2)
    elif "total" in weights:
        found = weights["count"] + weights["total"] * products
    else:
        found = same * (weights["counts"] + weights["sums"] * products)
    if "gram" in weights:
        found = found + weights["gram"] * products.square()
    similarity: FloatArray = found.numpy()
    return similarity
