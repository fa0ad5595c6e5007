from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.sums.heads import EXAMPLES, METRICS, TABLE, TRAIN_LOSS, HeadSums, mean_metrics

FORM = HeadSums({"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)})
GOOD = np.array([[10.0, 0.5, 4.0, 2.5, 3.0]])


def of_sites(count: int, seed: int = 0) -> list[HeadSums]:
    """Results of sites as they arrive, one of them without training rows."""
    generator = np.random.default_rng(seed)
    examples, held_out = generator.integers(1, 10**6, count), generator.integers(1, 1000, count)
    examples[0] = 0
    return [
        HeadSums(
            {name: generator.normal(size=like.shape).astype(np.float32) for name, like in FORM.heads.items()},
            np.array([examples[site], generator.random(), held_out[site], generator.random(), held_out[site] // 2]),
        )
        for site in range(count)
    ]


@given(order=st.permutations(range(6)), split=st.integers(1, 5))
def test_sums_of_any_groups_of_sites_are_equal(order: list[int], split: int) -> None:
    sites = of_sites(6)
    groups = [reduce(add, (sites[site] for site in group)) for group in (order[:split], order[split:])]
    total, expected = groups[0] + groups[1], reduce(add, sites)
    assert total.rows == expected.rows == sum(site.rows for site in sites)
    np.testing.assert_allclose(total.totals(), expected.totals(), rtol=1e-12)
    for name, sums in total.weighted().items():
        np.testing.assert_allclose(sums, expected.weighted()[name], rtol=1e-9, atol=1e-6)


def test_a_sum_is_the_mean_weighted_by_training_rows() -> None:
    sites = of_sites(5)
    total, rows = reduce(add, sites), [site.examples for site in sites]
    for name, head in total.heads.items():
        expected = np.average([site.heads[name] for site in sites], axis=0, weights=rows)
        np.testing.assert_allclose(head, expected, rtol=1e-12, atol=1e-15)
    table = np.array([site.metrics for site in sites])
    np.testing.assert_allclose(total.metrics, mean_metrics(table), rtol=1e-13)
    assert total.metrics[TRAIN_LOSS] == pytest.approx(np.average(table[:, TRAIN_LOSS], weights=rows), rel=1e-12)


def test_one_site_is_sent_without_loss() -> None:
    for site in of_sites(4):
        received = HeadSums.from_arrays(site.to_arrays(), FORM)
        assert np.array_equal(received.metrics, site.metrics)
        assert all(np.array_equal(head, site.heads[name]) for name, head in received.heads.items())
        assert all(array.dtype == np.float32 for name, array in site.to_arrays().items() if name != TABLE)


def test_a_sum_is_rebuilt_from_its_sums() -> None:
    total = reduce(add, of_sites(4))
    again = HeadSums.from_sums(total.weighted(), total.totals())
    np.testing.assert_allclose(again.metrics, total.metrics, rtol=1e-14)
    for name, head in again.heads.items():
        np.testing.assert_allclose(head, total.heads[name], rtol=1e-14)


def test_sites_without_training_rows_have_no_weight() -> None:
    first, second = of_sites(1, 1)[0], of_sites(2, 2)[1]
    assert first.examples == 0
    for name, head in (first + second).heads.items():
        np.testing.assert_allclose(head, second.heads[name], rtol=1e-15)
    nothing = (first + first).heads
    assert all(not head.any() for head in nothing.values())


def test_results_of_other_forms_do_not_add() -> None:
    site = of_sites(1)[0]
    for other in (HeadSums({}, site.metrics), HeadSums(site.heads, site.metrics, counted=False)):
        with pytest.raises(ValueError, match="different forms"):
            site + other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": None}, "contains the arrays"),
        ({"extra": np.zeros(1)}, "contains the arrays"),
        ({"weight": np.ones((4, 3), np.float32)}, "instead of"),
        ({"weight": np.ones((3, 4))}, "float64"),
        ({"bias": np.array([0, np.inf, 0], np.float32)}, "not finite"),
        ({TABLE: None}, "metrics are"),
        ({TABLE: GOOD[0]}, "metrics are"),
        ({TABLE: np.repeat(GOOD, 2, axis=0)}, "metrics are"),
        ({TABLE: GOOD.astype(np.float32)}, "metrics are"),
        ({TABLE: GOOD * np.nan}, "not finite"),
        ({TABLE: -GOOD}, "negative"),
        ({TABLE: GOOD + np.eye(len(METRICS))[EXAMPLES] / 2}, "not whole"),
        ({TABLE: np.array([[10.0, 0.5, 4.0, 2.5, 5.0]])}, "more correct rows"),
    ],
)
def test_invalid_results_are_rejected(change: dict[str, Any], words: str) -> None:
    arrays = {**FORM.heads, TABLE: GOOD, **change}
    with pytest.raises(ValueError, match=words):
        HeadSums.from_arrays({name: array for name, array in arrays.items() if array is not None}, FORM)


def test_scores_may_be_losses() -> None:
    arrays = {TABLE: np.array([[10.0, 0.5, 4.0, 2.5, 7.25]])}
    assert HeadSums.from_arrays(arrays, HeadSums(counted=False)).metrics[-1] == 7.25
