from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.sums.regression import (
    LEAST_RESIDUAL,
    RESIDUAL_BINS,
    RegressionSums,
    ResidualSums,
    regression_sums,
    residual_bins,
    upper_edge,
)
from fedhead.sums.score_bins import ScoreBins

BINS = ScoreBins(np.array([100.0, -3.0]), np.array([20.0, 0.5]))


def rows(seed: int, n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    targets = BINS.centre + BINS.spread * generator.normal(size=(n, 2))
    return targets + BINS.spread * 0.5 * generator.normal(size=(n, 2)), targets


def sums_of(seed: int = 0, n: int = 50) -> RegressionSums:
    (sums,) = regression_sums(*rows(seed, n), np.zeros(n, np.int64), 1, BINS)
    return sums


def test_moments_equal_direct_computation() -> None:
    outputs, targets = rows(1, 40)
    sums = sums_of(1, 40)
    true, error = (targets - BINS.centre) / BINS.spread, (outputs - targets) / BINS.spread
    assert sums.rows == 40
    for place in range(2):
        t, e = true[:, place], error[:, place]
        powers = np.stack([np.ones(40), t, e, t**2, e**2, abs(e)])
        np.testing.assert_allclose(sums.moments[place], powers @ powers.T, rtol=1e-12)
    assert sums.counts.sum(1).tolist() == [40, 40]
    np.testing.assert_allclose(sums.observed.sum(1), true.sum(0))


@given(seed=st.integers(0, 10**6), n=st.integers(0, 40), sites=st.integers(1, 6))
def test_sums_of_sites_equal_sums_of_all_rows(seed: int, n: int, sites: int) -> None:
    outputs, targets = rows(seed, n)
    owners = np.random.default_rng(seed).integers(0, sites, n)
    parts = list(regression_sums(outputs, targets, owners, sites, BINS))
    assert [one.rows for one in parts] == np.bincount(owners, minlength=sites).tolist()
    total = sum(parts[1:], parts[0])
    whole = sums_of(seed, n)
    np.testing.assert_allclose(total.moments, whole.moments, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(total.counts, whole.counts)
    for one in parts:
        received = RegressionSums.from_arrays(one.to_arrays(), RegressionSums.zeros(BINS))
        np.testing.assert_array_equal(received.moments, one.moments)


def tampered(**changes: Any) -> dict[str, Any]:
    return sums_of().to_arrays() | changes


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "instead of"),
        (tampered(moments=np.zeros((2, 6, 5))), "moments"),
        (tampered(moments=np.full((2, 6, 6), np.nan)), "not finite"),
        (tampered(moments=sums_of().moments * 1e70), "beyond"),
        (tampered(moments=sums_of().moments * 0.51), "not whole"),
        (tampered(moments=-sums_of().moments), "not whole"),
        (tampered(counts=sums_of(0, 49).to_arrays()["counts"]), "different numbers of rows"),
        (tampered(predicted=np.ones((2, 20))), "without rows"),
    ],
)
def test_impossible_sums_are_rejected(arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RegressionSums.from_arrays(arrays, RegressionSums.zeros(BINS))


def test_products_beyond_the_squares_are_rejected() -> None:
    moments = sums_of().moments.copy()
    moments[0, 1, 2] = moments[0, 2, 1] = 2 * np.sqrt(moments[0, 1, 1] * moments[0, 2, 2])
    with pytest.raises(ValueError, match="larger than"):
        RegressionSums.from_arrays(tampered(moments=moments), RegressionSums.zeros(BINS))


def test_sums_in_other_units_do_not_add() -> None:
    other = RegressionSums.zeros(ScoreBins(BINS.centre, BINS.spread * 2))
    with pytest.raises(ValueError, match="units"):
        sums_of() + other


def test_invalid_predictions_are_rejected() -> None:
    outputs, targets = rows(0, 5)
    for bad, words in ((outputs[:, :1], "both be"), (outputs * np.nan, "not finite"), (outputs * 1e50, "far beyond")):
        with pytest.raises(ValueError, match=words):
            list(regression_sums(bad, targets, np.zeros(5, np.int64), 1, BINS))


def test_residuals_are_within_two_percent_of_their_upper_edge() -> None:
    sizes = np.geomspace(LEAST_RESIDUAL * 1.001, 900, 5000)
    edges = np.array([upper_edge(place) for place in residual_bins(sizes)])
    assert (sizes <= edges).all()
    assert (edges / sizes <= 1.0203).all()
    assert residual_bins(np.array([0.0, 1e9])).tolist() == [0, RESIDUAL_BINS - 1]
    assert upper_edge(RESIDUAL_BINS - 1) == np.inf


def test_residuals_on_an_edge_belong_below_it() -> None:
    edges = np.array([upper_edge(place) for place in range(RESIDUAL_BINS - 1)])
    assert (edges <= np.array([upper_edge(place) for place in residual_bins(edges)])).all()


def test_residual_counts_add_and_round_trip() -> None:
    outputs, targets = rows(3, 30)
    first, second = (
        ResidualSums.from_outputs(outputs[part], targets[part], BINS) for part in (slice(12), slice(12, 30))
    )
    total = first + ResidualSums.from_arrays(second.to_arrays(), ResidualSums.zeros(BINS))
    assert total.rows == 30
    np.testing.assert_array_equal(total.counts, ResidualSums.from_outputs(outputs, targets, BINS).counts)
    counts = total.to_arrays()["counts"].copy()
    counts[0, 0] += 1
    with pytest.raises(ValueError, match="different numbers of rows"):
        ResidualSums.from_arrays({"counts": counts}, ResidualSums.zeros(BINS))
