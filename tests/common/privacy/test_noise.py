import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedhead.privacy.noise import FINENESS, LARGEST_DEVIATION, Lattice, sample


def entropy(seed: int):  # type: ignore[no-untyped-def]
    return random.Random(seed).randbytes


@pytest.mark.parametrize("deviation", [1, 2, 5])
def test_frequencies_are_those_of_the_discrete_gaussian(deviation: int) -> None:
    drawn = sample(deviation, 60_000, entropy(deviation))
    reach = 4 * deviation
    support = np.arange(-reach, reach + 1)
    far = np.arange(-20 * deviation, 20 * deviation + 1)
    weights = np.exp(-(support**2) / (2 * deviation**2)) / np.exp(-(far**2) / (2 * deviation**2)).sum()
    counts = np.array([(drawn == value).sum() for value in support])
    expected = np.append(weights, 1 - weights.sum()) * len(drawn)
    observed = np.append(counts, len(drawn) - counts.sum())
    keep = expected > 5
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-4


@pytest.mark.parametrize("deviation", [10_000, 2**FINENESS, LARGEST_DEVIATION])
def test_fine_lattices_follow_the_normal_distribution(deviation: int) -> None:
    drawn = sample(deviation, 40_000, entropy(1))
    assert stats.kstest(drawn / deviation, "norm").pvalue > 1e-4
    assert drawn.std() == pytest.approx(deviation, rel=0.02)
    # Every residue occurs: no bit of the noise is constant.
    for bit in range(int(math.log2(deviation))):
        assert 0.47 < (drawn >> bit & 1).mean() < 0.53


def test_draws_are_independent_of_their_neighbours() -> None:
    drawn = sample(1000, 40_000, entropy(2)) / 1000
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


def test_default_entropy_is_fresh() -> None:
    assert not np.array_equal(sample(1000, 100), sample(1000, 100))


@pytest.mark.parametrize("deviation", [0, -1, LARGEST_DEVIATION + 1])
def test_deviations_beyond_exact_integers_are_rejected(deviation: int) -> None:
    with pytest.raises(ValueError, match="standard deviation must be from 1"):
        sample(deviation, 1)


@given(st.floats(1e-9, 1e9))
def test_lattice_unit_is_a_power_of_two_far_below_the_noise(sigma: float) -> None:
    lattice = Lattice.of(sigma)
    assert math.frexp(lattice.unit)[0] == 0.5
    assert 2**FINENESS <= lattice.deviation <= 2 ** (FINENESS + 1)
    assert sigma <= lattice.sigma <= sigma + lattice.unit


@settings(max_examples=30)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_released_sums_are_on_the_lattice_whatever_the_data(sigma: float, seed: int) -> None:
    lattice = Lattice.of(sigma)
    sums = np.random.default_rng(seed).normal(size=50) * sigma * 100
    released = lattice.add(sums, entropy=entropy(seed))
    assert np.array_equal(np.rint(released / lattice.unit) * lattice.unit, released)
    # The digits below the lattice never reach the release: only the rounded sums do.
    blurred = np.rint(sums / lattice.unit) * lattice.unit
    assert np.array_equal(released, lattice.add(blurred, entropy=entropy(seed)))


def test_shares_of_many_parties_add_up_to_the_variance() -> None:
    lattice, parties = Lattice.of(3.0), 7
    each = [lattice.add(np.zeros(20_000), parties, entropy=entropy(party)) for party in range(parties)]
    assert np.sum(each, axis=0).std() == pytest.approx(3.0, rel=0.03)
    assert np.std(each[0]) == pytest.approx(3 / math.sqrt(7), rel=0.03)
    merged = lattice.add(np.zeros(20_000), parties, parties, entropy=entropy(9))
    assert merged.std() == pytest.approx(3.0, rel=0.03)
    own = lattice.add(np.zeros(20_000), 1, parties, entropy=entropy(9))
    assert own.std() == pytest.approx(3 * math.sqrt(7), rel=0.03)


def test_sums_too_large_for_the_lattice_are_refused() -> None:
    for value in (math.nan, math.inf, 2.0**60):
        with pytest.raises(ValueError, match="not finite or too large"):
            Lattice.of(1.0).add(np.array([value]))


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf])
def test_noise_needs_a_positive_deviation(sigma: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Lattice.of(sigma)
