import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from torch import Tensor

from fedhead.errors import UserError
from fedhead.evaluation.worth import (
    Worth,
    ridge_at,
    ridge_penalty,
    shapley_values,
    squared_errors,
    worth_of_sites,
)
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import LABELS, VALUES

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = tuple[Tensor, Tensor]


def digits(sites: int, rows: int = 900) -> tuple[list[Rows], list[Rows]]:
    """Training and held-out rows of sites with different classes."""
    features, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(features[:rows]), torch.from_numpy(labels[:rows]).long()
    generator = np.random.default_rng(3)
    shares = generator.dirichlet([0.5] * sites, 10)
    owner = np.array([generator.choice(sites, p=shares[label]) for label in y.tolist()])
    held = generator.random(rows) < 0.25
    parts = []
    for keep in (~held, held):
        chosen = [torch.from_numpy((owner == site) & keep) for site in range(sites)]
        parts.append([(x[one], y[one]) for one in chosen])
    return parts[0], parts[1]


def summed(rows: list[Rows]) -> list[FeatureStatistics]:
    return [FeatureStatistics.from_features(x, y, 10, torch.full((64,), 5.0)) for x, y in rows]


def brute_force(train: list[Rows], held: list[Rows], penalty: float) -> dict[frozenset[int], float]:
    """Retrain scikit-learn's ridge regression on the rows of every coalition."""
    x, y = torch.cat([one for one, _ in held]).numpy(), torch.cat([one for _, one in held]).numpy()
    truth = np.eye(10)[y]
    unexplained = ((truth - truth.mean(0)) ** 2).sum()
    values = {frozenset[int](): 0.0}
    for size in range(1, len(train) + 1):
        for coalition in itertools.combinations(range(len(train)), size):
            rows = torch.cat([train[site][0] for site in coalition]).numpy()
            targets = np.eye(10)[torch.cat([train[site][1] for site in coalition]).numpy()]
            fitted = Ridge(alpha=penalty, solver="cholesky").fit(rows, targets)
            values[frozenset(coalition)] = 1 - ((truth - fitted.predict(x)) ** 2).sum() / unexplained
    return values


def by_permutations(values: dict[frozenset[int], float], sites: int) -> list[float]:
    gains = [0.0] * sites
    for order in itertools.permutations(range(sites)):
        for place, site in enumerate(order):
            gains[site] += values[frozenset(order[: place + 1])] - values[frozenset(order[:place])]
    return [gain / math.factorial(sites) for gain in gains]


@pytest.fixture(scope="module")
def exact() -> tuple[Worth, dict[frozenset[int], float]]:
    train, held = digits(6)
    found = worth_of_sites([f"site-{n}" for n in range(6)], summed(train), [*summed(held)])
    return found, brute_force(train, held, found.penalty)


def test_shapley_values_equal_those_of_retraining_on_every_coalitions_rows(
    exact: tuple[Worth, dict[frozenset[int], float]],
) -> None:
    found, values = exact
    expected = by_permutations(values, 6)
    assert [one.shapley for one in found.sites] == pytest.approx(expected, abs=1e-8)
    everyone = frozenset(range(6))
    assert found.value == pytest.approx(values[everyone], abs=1e-8)
    assert sum(one.shapley for one in found.sites) == pytest.approx(found.value, abs=1e-9)
    for number, one in enumerate(found.sites):
        assert one.low == one.high == one.shapley
        assert one.alone == pytest.approx(values[frozenset([number])], abs=1e-8)
        assert one.leave_one_out == pytest.approx(values[everyone] - values[everyone - {number}], abs=1e-8)


def test_the_penalty_is_that_of_the_ridge_head() -> None:
    train, _ = digits(3)
    pool = sum(summed(train))
    assert isinstance(pool, FeatureStatistics)
    weight, bias = ridge_at(pool, ridge_penalty(pool))
    head = solve_head(pool, "ridge")
    assert torch.allclose(weight, head.weight, rtol=1e-9, atol=1e-12)
    assert torch.allclose(bias, head.bias, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["classes", "labels", "values"]))
def test_squared_errors_from_sums_are_those_of_rows(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) * 3 + 1
    origin = torch.randn(5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    if kind == "classes":
        y = torch.randint(3, (60,), generator=generator)
        stats = FeatureStatistics.from_features(x, y, 3, origin)
        truth = torch.nn.functional.one_hot(y, 3).double()
    elif kind == "labels":
        y = torch.randint(2, (60, 3), generator=generator)
        stats = FeatureStatistics.from_features(x, y, 3, origin, kind=LABELS)
        truth = y.double()
    else:
        truth = torch.randn(60, 3, generator=generator, dtype=torch.float64) * 10
        stats = FeatureStatistics.from_features(x, truth, 3, origin, kind=VALUES)
    expected = (truth - x @ weight.T - bias).square().sum(0)
    assert torch.allclose(squared_errors(stats, weight, bias), expected, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(sites=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_shapley_values_are_the_mean_gain_over_all_orders(sites: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=2**sites)
    values[0] = 0
    game = {
        frozenset(site for site in range(sites) if index >> site & 1): float(value)
        for index, value in enumerate(values)
    }
    assert shapley_values(values, sites).tolist() == pytest.approx(by_permutations(game, sites))


def test_sampled_values_have_intervals_around_the_exact_ones(
    exact: tuple[Worth, dict[frozenset[int], float]],
) -> None:
    train, held = digits(6)
    names = [one.site for one in exact[0].sites]
    found = worth_of_sites(names, summed(train), [*summed(held)], permutations=60, seed=1)
    assert found.permutations == 60
    inside = [one.low <= true.shapley <= one.high for one, true in zip(found.sites, exact[0].sites, strict=True)]
    assert sum(inside) >= 5
    assert all(0 < one.high - one.low < 0.2 for one in found.sites)
    assert sum(one.shapley for one in found.sites) == pytest.approx(found.value, abs=1e-9)


def test_more_sites_than_can_be_enumerated_are_sampled() -> None:
    train, held = digits(14, 700)
    found = worth_of_sites([str(n) for n in range(14)], summed(train), [*summed(held)], permutations=40)
    assert found.permutations == 40
    assert sum(one.shapley for one in found.sites) == pytest.approx(found.value, abs=1e-9)


def test_sites_without_rows_or_held_out_rows_bring_nothing_and_judge_nothing() -> None:
    train, held = digits(3)
    stats, judges = summed(train), [*summed(held)]
    nothing = FeatureStatistics.empty(64, 10, torch.full((64,), 5.0))
    names = ["a", "b", "c", "empty"]
    found = worth_of_sites(names, [*stats, nothing], [*judges, None])
    assert found.sites[3].shapley == pytest.approx(0, abs=1e-12)
    assert found.sites[3].alone == 0
    three = worth_of_sites(names[:3], stats, [*judges])
    for one, other in zip(found.sites, three.sites, strict=False):
        assert one.shapley == pytest.approx(other.shapley, abs=1e-10)


def test_without_held_out_rows_there_is_no_value() -> None:
    train, held = digits(2)
    with pytest.raises(UserError, match="no sums of any"):
        worth_of_sites(["a", "b"], summed(train), [None, None])
    x, y = held[0]
    same = FeatureStatistics.from_features(x[y == y[0]], y[y == y[0]], 10, torch.full((64,), 5.0))
    with pytest.raises(UserError, match="nothing can be explained"):
        worth_of_sites(["a", "b"], summed(train), [same, None])
