"""Sums of clustering on the wire."""

from collections.abc import Callable

import numpy as np
import pytest

from fedhead.sums.clusters import ClusterSums, LikelihoodSums


def some() -> ClusterSums:
    sums = ClusterSums.empty((2, 3), 4)
    sums.counts[:] = [3, 1, 0, 2, 2]
    sums.sums[0] = [1.5, 0, 2, 0]
    return sums


def test_sums_add_and_survive_the_wire() -> None:
    total = some() + some()
    assert total.rows == 8
    assert [counts.tolist() for counts, _ in total.parts()] == [[6, 2], [0, 4, 4]]
    again = ClusterSums.from_arrays(total.to_arrays(), ClusterSums.empty((2, 3), 4))
    np.testing.assert_array_equal(again.sums, total.sums)
    with pytest.raises(ValueError, match="different clusterings"):
        some() + ClusterSums.empty((5,), 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: arrays["counts"].__setitem__(0, -1), "impossible number of rows"),
        (lambda arrays: arrays["counts"].__setitem__(0, 9), "different numbers of rows"),
        (lambda arrays: arrays["sums"].__setitem__((0, 0), 3.5), "longer than its number of rows"),
        (lambda arrays: arrays["sums"].__setitem__((2, 0), 0.1), "longer than its number of rows"),
        (lambda arrays: arrays["sums"].__setitem__((0, 0), np.nan), "not finite"),
    ],
)
def test_impossible_sums_are_rejected(change: Callable[[dict[str, np.ndarray]], None], reason: str) -> None:
    arrays = {name: array.copy() for name, array in some().to_arrays().items()}
    change(arrays)
    with pytest.raises(ValueError, match=reason):
        ClusterSums.from_arrays(arrays, ClusterSums.empty((2, 3), 4))


def test_impossible_likelihoods_are_rejected() -> None:
    like = LikelihoodSums.empty(2)
    found = LikelihoodSums(np.array([3]), np.array([3.0, -6.0]), np.array([4.0, 12.0]))
    assert (found + found).rows == 6
    assert LikelihoodSums.from_arrays(found.to_arrays(), like).totals.tolist() == [3.0, -6.0]
    with pytest.raises(ValueError, match="contradict"):
        LikelihoodSums.from_arrays({**found.to_arrays(), "squares": np.array([2.0, 12.0])}, like)
    with pytest.raises(ValueError, match="impossible"):
        LikelihoodSums.from_arrays({**found.to_arrays(), "count": np.array([-1])}, like)
