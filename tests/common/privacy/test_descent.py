"""Rounds of gradients after a head that was solved from sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedhead.privacy.descent import descend
from fedhead.privacy.heads import NoisySums, solve_noisy
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.sensitivity import svec, unit_rows
from fedhead.privacy.stages import (
    BIAS_FEATURE,
    CLIP,
    LDA_NOISE,
    ROUNDS_NOISE,
    ROUNDS_SHARE,
    better_solver,
    descends,
    forms,
)

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

    losses = [math.log(CLASSES), *(loss(*descend(gradient, weight, bias, ROWS, rounds)) for rounds in (5, 40))]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1e-3
    assert asked == [*range(1, 6), *range(1, 41)]


def test_rounds_without_gradients_change_nothing() -> None:
    weight, bias = torch.zeros(CLASSES, FEATURES), torch.zeros(CLASSES)
    still = descend(lambda step, weight, bias: torch.zeros(CLASSES, FEATURES + 1).double(), weight, bias, ROWS, 1)
    assert torch.equal(still[0], weight)
    assert torch.equal(still[1], bias)


@given(st.floats(0.1, 20), st.integers(1, 500))
def test_sums_and_all_rounds_spend_their_mu_and_no_more(mu: float, rounds: int) -> None:
    each = mu * (ROUNDS_SHARE / rounds) ** 0.5
    sums = Mechanism.split(mu * (1 - ROUNDS_SHARE) ** 0.5, forms("lda", CLASSES, FEATURES)).mu
    gradient = Mechanism.split(each, forms("gradient", CLASSES, FEATURES))
    spent = (sums**2 + rounds * gradient.mu**2) ** 0.5
    assert spent <= mu * (1 + 1e-12)
    assert spent == pytest.approx(mu, rel=1e-3)
    assert gradient.sigma("gradient") == pytest.approx(CLIP / each, rel=1e-2)


def test_rounds_follow_nearest_means_only() -> None:
    levels = [0.5 * LDA_NOISE, LDA_NOISE, 0.9 * ROUNDS_NOISE, ROUNDS_NOISE, 10.0]
    assert [descends(level) for level in levels] == [False, True, True, False, False]
    assert [better_solver(level) for level in levels] == ["lda"] + 4 * ["nearest-mean"]
