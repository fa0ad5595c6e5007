import numpy as np
import pytest
from hypothesis import given, strategies

from fedhead.client.labelled_features import Cohort, CohortCache, SiteRows
from fedhead.client.minibatches import batches, columns_of, orders, shuffled
from fedhead.config import LocalConfig


def test_row_orders_are_permutations_that_differ_by_every_argument() -> None:
    others = [(1, "a", 1, 0), (0, "b", 1, 0), (0, "a", 2, 0), (0, "a", 1, 1), (0, "0/a", 0, 1), (10, "a", 1, 0)]
    orders = [shuffled(*arguments, 50).tolist() for arguments in [(0, "a", 1, 0), *others]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)


def test_row_orders_are_the_same_in_every_process_and_version() -> None:
    assert shuffled(0, "Zürich/3", 1, 0, 10).tolist() == [5, 3, 9, 0, 1, 4, 2, 7, 8, 6]
    assert shuffled(0, "a", 1, 0, 0).tolist() == []


def test_row_orders_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), shuffled(0, "a", 1, epoch, 5)] += 1
    chi_square = float(((counts - 800) ** 2 / 800).sum())
    assert chi_square < 45  # 16 degrees of freedom: one time in ten thousand above


@given(
    strategies.lists(strategies.integers(1, 60), min_size=1, max_size=4),
    strategies.integers(5, 20),
    strategies.integers(1, 5),
)
def test_no_minibatch_is_smaller_than_the_site_allows(sizes: list[int], batch_size: int, min_batch: int) -> None:
    sizes.sort(reverse=True)
    sites = [SiteRows(f"site-{number}", np.arange(size)) for number, size in enumerate(sizes)]
    local = LocalConfig(batch_size=batch_size, epochs=2)
    seen = [np.zeros(size, np.int64) for size in sizes]
    for batch in batches(sites, local, 0, 1, min_batch):
        for site, (places, weights) in enumerate(zip(batch.places, batch.weights, strict=True)):
            rows = places[weights > 0]
            assert len(rows) >= min(min_batch, sizes[site])
            assert weights.sum() == pytest.approx(1)
            seen[site][rows] += 1
    assert all((rows == 2).all() for rows in seen)


def test_the_table_of_rows_is_padded_with_each_sites_first_row() -> None:
    sites = [SiteRows("a", np.array([7, 8, 9])), SiteRows("b", np.array([4])), SiteRows("c", np.array([], np.int64))]
    assert Cohort(sites).table.tolist() == [[7, 8, 9], [4, 4, 4], [0, 0, 0]]


@given(
    strategies.lists(strategies.integers(1, 60), min_size=1, max_size=4),
    strategies.integers(5, 20),
    strategies.integers(1, 5),
)
def test_columns_of_an_epoch_are_the_same_minibatches(sizes: list[int], batch_size: int, min_batch: int) -> None:
    sizes.sort(reverse=True)
    sites = [SiteRows(f"site-{number}", np.arange(size)) for number, size in enumerate(sizes)]
    order = orders(0, sites, 1, np.array([0]))
    local = LocalConfig(batch_size=batch_size)
    columns = list(columns_of(np.array(sizes), batch_size, min_batch))
    for batch, part in zip(batches(sites, local, 0, 1, min_batch), columns, strict=True):
        assert len(batch.places) == part.count
        drawn = order[: part.count, part.start : part.stop]
        for places, weights, mine, own in zip(batch.places, batch.weights, drawn, part.weights[:, 0], strict=True):
            assert places[weights > 0].tolist() == mine[own > 0].tolist()
            assert weights[weights > 0].tolist() == own[own > 0].tolist()


def test_sites_are_the_same_cohort_in_every_round() -> None:
    sites = [SiteRows("a", np.array([7, 8, 9])), SiteRows("b", np.array([4])), SiteRows("c", np.array([3, 2]))]
    cohorts = CohortCache()
    first = cohorts.of(sites)
    assert cohorts.of(list(sites)) is first is cohorts.of(first)
    together = first.with_others(cohorts.of(sites[:1]))
    assert [site.name for site in together] == ["a", "b", "c", "a"]
    assert first.with_others(cohorts.of(sites[:1])) is together
    assert cohorts.of(sites[::-1]) is not first
    assert [site.name for site in first.part(1, 3)] == ["c", "b"]
    assert first.part(1, 3) is first.part(1, 3)
    assert (first.span, first.distinct.tolist()) == ((2, 10), [2, 3, 4, 7, 8, 9])
