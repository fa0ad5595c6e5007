import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.sums.foreign import BINS, LEAST, MOST, DistanceSums


def distances(seed: int, rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, generator=generator).exp()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(0, 400))
def test_counts_add_under_any_split(seed: int, cut: int) -> None:
    found = distances(seed)
    parts = [DistanceSums.from_distances(part) for part in (found[:cut], found[cut:])]
    whole = DistanceSums.from_distances(found)
    assert np.array_equal((parts[0] + parts[1]).counts, whole.counts)
    assert np.array_equal(DistanceSums.from_arrays(whole.to_arrays()).counts, whole.counts)
    assert np.array_equal(DistanceSums.from_lists(whole.counts.tolist()).counts, whole.counts)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 0.5))
def test_at_most_the_share_of_the_rows_is_beyond_the_limits(seed: int, share: float) -> None:
    found = distances(seed, 1000).double()
    limits = torch.tensor(DistanceSums.from_distances(found).thresholds(share), dtype=torch.float64)
    beyond = found > limits
    assert beyond.any(1).double().mean() <= share
    # And each distance is beyond its limit for half of the share, but for one row and those in the limit's bin.
    inner = limits * (LEAST / MOST) ** (1 / BINS)
    assert bool(((found > inner).double().mean(0) >= share / 2 - 2 / 1000).all())


def test_too_few_rows_have_no_limits() -> None:
    found = distances(0, 100)
    assert DistanceSums.from_distances(found).thresholds(0.01) == (math.inf, math.inf)
    assert max(DistanceSums.from_distances(found).thresholds(0.02)) < math.inf


def test_distances_beyond_all_bins_are_counted_in_the_outer_ones() -> None:
    extremes = torch.tensor([[0.0, math.inf], [LEAST / 2, 2 * MOST], [1.0, MOST]])
    counts = DistanceSums.from_distances(extremes).counts
    assert counts[0, 0] == 2
    assert counts[1, BINS - 1] == 3
    with pytest.raises(ValueError, match="not a number"):
        DistanceSums.from_distances(torch.tensor([[math.nan, 1.0]]))


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((2, BINS), np.int32),
        np.zeros((3, BINS), np.int64),
        np.full((2, BINS), -1),
        np.full((2, BINS), 2**60),
        np.arange(2)[:, None] * np.ones(BINS, np.int64),
    ],
)
def test_impossible_counts_are_rejected(counts: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=r"instead of|impossible"):
        DistanceSums.from_arrays({"counts": counts})
