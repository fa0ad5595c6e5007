from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.errors import UserError
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments

ORIGIN = torch.tensor([1.0, -2.0, 100.0], dtype=torch.float64)


def rows(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ORIGIN.float() + torch.randn(n, 3, generator=generator) * torch.tensor([1.0, 0.01, 5.0])


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), cut=st.integers(0, 40))
def test_moments_of_parts_equal_moments_of_whole(seed: int, n: int, cut: int) -> None:
    features = rows(seed, n)
    first, second = FeatureMoments.empty(ORIGIN).updated(features[:cut]), FeatureMoments.empty(ORIGIN)
    second = second.updated(features[cut:])
    total = FeatureMoments.from_arrays(first.to_arrays(), second) + second
    assert total.rows == n
    torch.testing.assert_close(total.mean(), features.double().mean(0), rtol=0, atol=1e-12)
    if n > 1:
        torch.testing.assert_close(total.scale(), features.double().std(0, correction=0), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_each_item_adds_the_means_over_its_places(seed: int, sizes: list[int]) -> None:
    items = torch.split(rows(seed, sum(sizes)), sizes)
    moments = FeatureMoments.empty(ORIGIN)
    for places in items:
        moments = moments.with_item(places)
    received = FeatureMoments.from_arrays(moments.to_arrays(), FeatureMoments.empty(ORIGIN))
    assert received.rows == len(sizes)
    mean = torch.stack([one.double().mean(0) for one in items]).mean(0)
    squares = torch.stack([one.double().square().mean(0) for one in items]).mean(0)
    torch.testing.assert_close(received.mean(), mean, rtol=0, atol=1e-12)
    if sum(sizes) > 2:
        torch.testing.assert_close(received.scale(), (squares - mean.square()).sqrt(), rtol=1e-5, atol=1e-7)


def test_mean_and_scale_equal_full_statistics() -> None:
    features = rows(1, 50)
    features[:, 1] = 3.25
    moments = FeatureMoments.empty(ORIGIN).updated(features)
    stats = FeatureStatistics.from_features(features, torch.zeros(50, dtype=torch.long), 1, ORIGIN)
    torch.testing.assert_close(moments.mean(), stats.mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(moments.scale(), stats.scale(), rtol=1e-12, atol=0)
    assert float(moments.scale()[1]) == 1


def test_update_does_not_modify_earlier_moments() -> None:
    empty = FeatureMoments.empty(ORIGIN)
    empty.updated(rows(0, 5))
    assert (empty.rows, float(empty.total.abs().sum())) == (0, 0.0)


def test_moments_of_no_rows_have_no_mean() -> None:
    for ask in (FeatureMoments.mean, FeatureMoments.scale):
        with pytest.raises(UserError, match="There are no rows"):
            ask(FeatureMoments.empty(ORIGIN))


def test_moments_about_different_origins_do_not_add() -> None:
    with pytest.raises(ValueError, match="different origins"):
        FeatureMoments.empty(ORIGIN) + FeatureMoments.empty(ORIGIN + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": np.array([-1])}, "negative"),
        ({"rows": np.array([3.0])}, "different names, types or shapes"),
        ({"total": np.full(3, np.nan)}, "not finite"),
        ({"total": np.zeros(2)}, "different names, types or shapes"),
        ({"squares": np.full(3, -1.0)}, "negative"),
        ({"total": np.full(3, 1e9)}, "contradict"),
        ({"rows": np.array([0]), "total": np.zeros(3)}, "contradict"),
        ({"more": np.zeros(1)}, "different names, types or shapes"),
        ({"rows": np.array(["a"])}, "number type"),
    ],
)
def test_impossible_moments_are_rejected(change: dict[str, Any], words: str) -> None:
    moments = FeatureMoments.empty(ORIGIN).updated(rows(0, 5))
    with pytest.raises(ValueError, match=words):
        FeatureMoments.from_arrays(moments.to_arrays() | change, moments)


def test_features_with_negligible_variance_count_as_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 3, generator=generator, dtype=torch.float64) * torch.tensor([1e3, 1.0, 1e-4])
    moments = FeatureMoments.empty(torch.zeros(3)).updated(features)
    stats = FeatureStatistics.from_features(features, torch.zeros(100, dtype=torch.long), 1)
    for scale in (moments.scale(), stats.scale()):
        torch.testing.assert_close(scale[:2], features.std(0, correction=0)[:2])
        assert float(scale[2]) == 1
    assert stats.hardly_varying == 1
    torch.testing.assert_close(moments.columns(2).scale(), features.std(0, correction=0)[2:])
    torch.testing.assert_close(moments.scale(hardly=0), features.std(0, correction=0))
    assert moments.columns(0, 2).total.tolist() == moments.total[:2].tolist()
