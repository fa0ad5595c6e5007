"""The accountant against Google's dp-accounting and against integrals.

`compositions.json` holds 200 random compositions of Gaussian mechanisms of sensitivity 1, each with the epsilon of
dp-accounting 0.6 from its privacy loss distributions (discretised at 2e-4, connect-the-dots). `reference.py` beside it
wrote the file: `pip install dp-accounting && python reference.py`, in an environment of its own.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedhead.privacy.accountant import MOST_MU, compose, delta_for, epsilon_for, mu_for

COMPOSITIONS = json.loads((Path(__file__).parent / "compositions.json").read_text())


def test_composed_epsilon_equals_that_of_privacy_loss_distributions() -> None:
    assert len(COMPOSITIONS) == 200
    for one in COMPOSITIONS:
        mu = compose(1 / sigma for sigma in one["sigmas"])
        assert epsilon_for(mu, one["delta"]) == pytest.approx(one["epsilon"], rel=1e-4, abs=1e-4)


@settings(max_examples=20)
@given(st.floats(0.05, 5), st.floats(0, 8))
def test_delta_is_the_largest_excess_of_probability(mu: float, epsilon: float) -> None:
    # The excess is largest on the set where one density exceeds exp(epsilon) times the other.
    start = mu / 2 + epsilon / mu

    def excess(x: float) -> float:
        return float(stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    expected, _ = integrate.quad(excess, start, start + 40, epsabs=1e-15, points=[start + 1, start + 5])
    assert delta_for(mu, epsilon) == pytest.approx(expected, rel=1e-6, abs=1e-13)


@settings(max_examples=30)
@given(st.floats(1e-3, 50), st.floats(1e-12, 0.5))
def test_epsilon_and_mu_undo_each_other(epsilon: float, delta: float) -> None:
    mu = mu_for(epsilon, delta)
    assert epsilon_for(mu, delta) == pytest.approx(epsilon, rel=1e-6)
    assert delta_for(mu, epsilon) <= delta


@settings(max_examples=30)
@given(st.floats(1e-3, 30), st.floats(1.001, 2), st.floats(1e-10, 0.1))
def test_more_mu_is_more_epsilon(mu: float, factor: float, delta: float) -> None:
    assert epsilon_for(mu * factor, delta) >= epsilon_for(mu, delta)


def test_far_tails_have_no_underflow() -> None:
    assert mu_for(1e-3, 1e-300) > 0
    assert epsilon_for(20.0, 1e-12) == pytest.approx(20**2 / 2 + 20 * stats.norm.isf(1e-12), rel=0.01)
    assert mu_for(1e9, 1e-5) == MOST_MU
    assert delta_for(0.0, 0.0) == 0
    assert epsilon_for(1e-9, 0.1) == 0


def test_mixed_noise_composes_by_squares() -> None:
    assert compose([3.0, 4.0]) == 5
    assert compose([]) == 0


@pytest.mark.parametrize("delta", [0, 1, -1, math.nan])
def test_invalid_delta_is_rejected(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        epsilon_for(1.0, delta)
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        mu_for(1.0, delta)


@pytest.mark.parametrize(("mu", "epsilon"), [(-1, 1), (1, -1), (math.nan, 1), (1, math.nan)])
def test_invalid_mu_or_epsilon_is_rejected(mu: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        delta_for(mu, epsilon)


def test_accountant_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    mu, epsilon = 1.3, 1.0
    loss = mu * (mu + rng.standard_normal(2_000_000)) - mu * mu / 2
    estimate = np.maximum(1 - np.exp(epsilon - loss), 0).mean()
    assert delta_for(mu, epsilon) == pytest.approx(estimate, rel=0.01)
