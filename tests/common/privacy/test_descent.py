"""Rounds of gradients after a head that was solved from sums."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedhead.client.private_sums import clipped_residuals
from fedhead.privacy.descent import LENGTH, descend
from fedhead.privacy.heads import NoisySums, solve_noisy
from fedhead.privacy.sensitivity import svec, unit_rows
from fedhead.privacy.stages import (
    BIAS_FEATURE,
    CLIP,
    LDA_NOISE,
    LEAST_ROUNDS,
    ROUNDS_NOISE,
    TEMPERATURES,
    better_solver,
    descends,
    noise_level,
)
from fedhead.protocol.private import PrivateRequest
from fedhead.server.private_run import Released, solve_private

CLASSES, FEATURES, ROWS = 3, 5, 400


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    means = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    drawn = means[labels] + torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return unit_rows(drawn), labels


def sums_of(rows: Tensor, labels: Tensor) -> NoisySums:
    one_hot = functional.one_hot(labels, CLASSES).double()
    return NoisySums(one_hot.sum(0), one_hot.T @ rows, svec(rows.T @ rows), 1e-9, 1e-9, 1e-9)


def test_rounds_without_noise_lower_the_loss(rows: tuple[Tensor, Tensor]) -> None:
    features, labels = rows
    noisy = sums_of(features, labels)
    weight, bias = (part.float() for part in solve_noisy(noisy).affine())
    asked = []

    def gradient(step: int, weight: Tensor, bias: Tensor) -> Tensor:
        asked.append(step)
        residuals = torch.softmax(features @ weight.double().T + bias.double(), 1) - functional.one_hot(labels, CLASSES)
        return torch.cat([residuals.T @ features, BIAS_FEATURE * residuals.sum(0)[:, None]], 1)

    def loss(weight: Tensor, bias: Tensor) -> float:
        return float(functional.cross_entropy(features @ weight.double().T + bias.double(), labels))

    level = noise_level(ROWS, CLASSES, FEATURES, 10.0)
    losses = [math.log(CLASSES), *(loss(*descend(gradient, weight, bias, ROWS, rounds, level)) for rounds in (10, 40))]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1e-3
    assert asked == [*range(1, 11), *range(1, 41)]


def test_rounds_without_gradients_change_nothing() -> None:
    weight, bias = torch.zeros(CLASSES, FEATURES), torch.zeros(CLASSES)
    still = descend(lambda step, weight, bias: torch.zeros(CLASSES, FEATURES + 1).double(), weight, bias, ROWS, 1, 0.1)
    assert torch.equal(still[0], weight)
    assert torch.equal(still[1], bias)


@pytest.mark.parametrize(("level", "rounds"), [(0.3, 10), (0.3, 40), (1.0, 20)])
def test_noise_adds_up_to_its_length_in_the_weights_of_a_class(level: float, rounds: int) -> None:
    """Of noise alone, the last head would have the norm `LENGTH`, and the mean of all heads a little less."""
    features, rows, mu = 500, 1000, CLASSES * math.sqrt(501) / (1000 * level)
    assert noise_level(rows, CLASSES, features, mu) == pytest.approx(level)
    sigma = CLIP / (mu / math.sqrt(rounds))
    generator = torch.Generator().manual_seed(0)

    def gradient(step: int, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.randn(CLASSES, features + 1, generator=generator, dtype=torch.float64) * sigma

    weight, _ = descend(gradient, torch.zeros(CLASSES, features), torch.zeros(CLASSES), rows, rounds, level)
    averaged = sum((sum(range(step, rounds + 1)) * 2 / (rounds * (rounds + 1))) ** 2 for step in range(1, rounds + 1))
    assert float(weight.norm(dim=1).mean()) == pytest.approx(LENGTH * math.sqrt(averaged / rounds), rel=0.05)


@given(st.floats(0.1, 20), st.integers(10, 500), st.booleans())
def test_all_releases_spend_their_mu_and_no_more(mu: float, rounds: int, named: bool) -> None:
    asked = []

    def ask(request: PrivateRequest) -> Released:
        mechanism = request.mechanism(CLASSES, FEATURES)
        asked.append((request.stage, mechanism.mu))
        # Few rows, of which nothing is known: there is noise enough for rounds.
        return Released(mechanism, {name: np.zeros(form.shape) for name, form in mechanism.arrays.items()})

    solved = solve_private(ask, mu, CLASSES, rounds, torch.eye(CLASSES, FEATURES) if named else None)
    assert solved.rounds == rounds
    assert [stage for stage, _ in asked] == ["centre", *(["nearest-mean"] if named else []), *["gradient"] * rounds]
    spent = math.sqrt(sum(one**2 for _, one in asked))
    assert spent <= mu * (1 + 1e-12)
    assert spent == pytest.approx(mu, rel=1e-3)


def test_few_rounds_and_rounds_with_little_noise_are_not_made() -> None:
    levels = [0.5 * ROUNDS_NOISE, ROUNDS_NOISE, LDA_NOISE, 10.0]
    assert [descends(level, LEAST_ROUNDS) for level in levels] == [False, True, True, True]
    assert not any(descends(level, LEAST_ROUNDS - 1) for level in levels)
    assert [better_solver(level) for level in levels] == ["lda", "lda", "nearest-mean", "nearest-mean"]


@pytest.mark.parametrize("mu", [0.1, 0.3])
def test_rounds_beat_heads_from_sums_of_correlated_features(mu: float) -> None:
    """Class means differ where rows of a class hardly vary, and the noise hides most of the covariance."""
    rng, size, count = np.random.default_rng(0), 60, 1500
    labels = torch.from_numpy(rng.integers(0, CLASSES, 2 * count))
    means, scales = rng.normal(size=(CLASSES, size)) * 0.25, np.where(np.arange(size) < 20, 2.0, 0.3)
    drawn = torch.from_numpy(means[labels] + rng.normal(size=(2 * count, size)) * scales)
    found = {}
    for rounds in (0, 20):
        solved = solve_private(Noisy(drawn[:count], labels[:count], rng), mu, CLASSES, rounds)
        assert solved.rounds == rounds
        others = unit_rows(unit_rows(drawn[count:]) - solved.shift.double()).float()
        right = (others @ solved.weight.T + solved.bias).argmax(1) == labels[count:]
        found[rounds] = float(right.double().mean())
    assert found[20] > found[0] + 0.02


class Noisy:
    """Makes releases of rows, with Gaussian noise."""

    def __init__(self, rows: Tensor, labels: Tensor, rng: np.random.Generator) -> None:
        self.rows = unit_rows(rows)
        self.labels = labels
        self.rng = rng

    def __call__(self, request: PrivateRequest) -> Released:
        mechanism = request.mechanism(CLASSES, self.rows.shape[1])
        head = {name: torch.from_numpy(np.array(array)).double() for name, array in request.arrays.items()}
        rows = unit_rows(self.rows - head["shift"]) if "shift" in head else self.rows
        one_hot = functional.one_hot(self.labels, CLASSES).double()
        sums = {
            "count": torch.tensor([len(rows)]).double(),
            "total": rows.sum(0),
            "counts": one_hot.sum(0),
            "sums": one_hot.T @ rows,
            "gram": svec(rows.T @ rows),
            "excess": torch.zeros(len(TEMPERATURES)).double(),
        }
        if request.stage == "gradient":
            residuals = clipped_residuals(rows, self.labels, head)
            sums["gradient"] = torch.cat([residuals.T @ rows, BIAS_FEATURE * residuals.sum(0)[:, None]], 1)
        noise = {
            name: self.rng.normal(size=form.shape) * mechanism.sigma(name) for name, form in mechanism.arrays.items()
        }
        return Released(mechanism, {name: sums[name].numpy() + drawn for name, drawn in noise.items()})
