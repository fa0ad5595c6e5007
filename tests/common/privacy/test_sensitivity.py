"""No neighbouring data sets move the stacked sums further than stated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedhead.errors import UserError
from fedhead.privacy.mechanism import Mechanism, Noised
from fedhead.privacy.noise import Lattice
from fedhead.privacy.sensitivity import group_weights, svec, unit_rows, unsvec

deviations = st.floats(0.05, 20)


def stacked(rows: Tensor, labels: Tensor, weights: Tensor, noise: tuple[float, float, float]) -> Tensor:
    """Return the stacked sums, each in units of its noise: a distance between two of them is a mu."""
    counts = torch.zeros(3, dtype=torch.float64).index_add_(0, labels, weights)
    sums = torch.zeros(3, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows * weights[:, None])
    gram = (rows * weights[:, None]).T @ rows
    return torch.cat([counts / noise[0], sums.flatten() / noise[1], svec(gram) / noise[2]])


def draw(seed: int, count: int, bound: float) -> tuple[Tensor, Tensor]:
    """Return rows of norm at most `bound`, many of them at it and some opposite to each other, and labels."""
    rng = np.random.default_rng(seed)
    rows = unit_rows(torch.from_numpy(rng.normal(size=(count, 4))))
    if count > 1 and rng.random() < 0.5:
        rows[1] = -rows[0] if rng.random() < 0.5 else rows[0] + 0.3 * rows[1]
    lengths = torch.from_numpy(np.where(rng.random(count) < 0.7, 1.0, rng.random(count)))
    return unit_rows(rows) * bound * lengths[:, None], torch.from_numpy(rng.integers(0, 3, count))


def mechanism(noise: tuple[float, float, float], bound: float = 1.0) -> Mechanism:
    """Return the mechanism of the stacked sums of rows of norm at most `bound`, with given standard deviations."""
    forms = {"counts": ((3,), 1.0), "sums": ((3, 4), bound), "gram": ((10,), bound**2)}
    return Mechanism(
        {
            name: Noised(shape, sensitivity, Lattice.of(sigma))
            for (name, (shape, sensitivity)), sigma in zip(forms.items(), noise, strict=True)
        }
    )


@settings(max_examples=40)
@given(st.integers(0, 2**32), deviations, deviations, deviations, st.floats(0.1, 5))
def test_adding_a_row_moves_the_sums_no_further(seed: int, n: float, s: float, g: float, bound: float) -> None:
    rows, labels = draw(seed, 6, bound)
    weights = torch.ones(6, dtype=torch.float64)
    moved = stacked(rows, labels, weights, (n, s, g)) - stacked(rows[1:], labels[1:], weights[1:], (n, s, g))
    assert float(moved.norm()) <= mechanism((n, s, g), bound).mu * (1 + 1e-6)


@pytest.mark.parametrize("noise", [(1.0, 1.0, 1.0), (9.0, 1.0, 3.0), (9.0, 0.5, 0.3), (0.2, 3.0, 1.0)])
def test_the_stated_bound_is_reached(noise: tuple[float, float, float]) -> None:
    one = torch.ones(1, dtype=torch.float64)
    row = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    moved = stacked(row, torch.tensor([0]), one, noise)
    assert float(moved.norm()) == pytest.approx(mechanism(noise).mu, rel=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), deviations, deviations, deviations)
def test_a_group_moves_the_sums_no_further_than_a_row(
    seed: int, size: int, other: int, n: float, s: float, g: float
) -> None:
    rows, labels = draw(seed, size + other + 3, 1.0)
    groups = torch.tensor([0] * size + [1] * other + [2, 3, 3])
    weights = group_weights(groups)
    whole = stacked(rows, labels, weights, (n, s, g))
    for one in (0, 1):
        without = stacked(rows[groups != one], labels[groups != one], weights[groups != one], (n, s, g))
        assert float((whole - without).norm()) <= mechanism((n, s, g)).mu * (1 + 1e-6)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(0, 2**32))
def test_svec_keeps_the_norm_and_is_undone(size: int, seed: int) -> None:
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = drawn + drawn.T
    packed = svec(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert float(packed.norm()) == pytest.approx(float(matrix.norm()))
    assert torch.allclose(unsvec(packed, size), matrix, rtol=1e-14)


def test_rows_without_length_stay_without() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert rows.tolist() == [[0.6, 0.8], [0.0, 0.0]]


@settings(max_examples=50)
@given(st.floats(0.05, 5), st.floats(0.05, 0.9), st.integers(2, 400))
def test_a_mechanism_spends_its_mu_and_no_more(mu: float, share: float, size: int) -> None:
    shares = {"counts": (share, (10,), 1.0), "gram": (1 - share, (size, size), 2.5)}
    mechanism = Mechanism.split(mu, shares)
    assert mechanism.mu <= mu
    assert mechanism.mu == pytest.approx(mu, rel=0.01)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.2, 5))
def test_rounding_to_the_lattice_is_within_the_sensitivity(seed: int, mu: float) -> None:
    rows, labels = draw(seed, 30, 1.0)
    weights = torch.ones(30, dtype=torch.float64)
    form = Noised.within(mu, (3 + 12 + 10,), math.sqrt(3))
    unit = form.lattice.unit
    whole, less = (stacked(rows[n:], labels[n:], weights[n:], (1, 1, 1)).numpy() for n in (0, 1))
    moved = (np.rint(whole / unit) - np.rint(less / unit)) * unit
    assert np.linalg.norm(moved) <= form.lattice.sensitivity(math.sqrt(3), 25)
    assert form.mu <= mu


def test_impossible_splits_are_rejected() -> None:
    with pytest.raises(ValueError, match="sum to more than 1"):
        Mechanism.split(1.0, {"a": (0.7, (1,), 1.0), "b": (0.4, (1,), 1.0)})
    with pytest.raises(UserError, match=r"too small for .* sums: raise epsilon"):
        Noised.within(1e-9, (10,))


def test_a_mechanism_noises_the_arrays_that_it_was_made_for() -> None:
    mechanism = Mechanism.split(1.0, {"a": (0.5, (2,), 1.0), "b": (0.5, (2, 2), 1.0)})
    with pytest.raises(ValueError, match="instead of"):
        mechanism.add_noise({"a": np.zeros(2)})
    with pytest.raises(ValueError, match="instead of"):
        mechanism.add_noise({"a": np.zeros(2), "b": np.zeros(4)})
    drawn = mechanism.add_noise({"a": np.zeros(2), "b": np.zeros((2, 2))})
    assert drawn["b"].shape == (2, 2)
