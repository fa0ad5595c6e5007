import numpy as np
import pytest
from hypothesis import given, strategies

from fedhead.client.labelled_features import SiteRows
from fedhead.client.minibatches import batches, shuffled, table_of
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
    assert table_of(sites).tolist() == [[7, 8, 9], [4, 4, 4], [0, 0, 0]]
