from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.evaluation.foreign import ABSENT, Distances, Foreign
from fedhead.heads.feature_map import unit_rows
from fedhead.solvers.closed_form import shrink_correlation
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.foreign import DistanceSums
from fedhead.sums.targets import VALUES

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(seed: int = 0, count: int = 600, width: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (count,), generator=generator)
    centres = 4 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    features = centres[labels] + torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    return unit_rows(features, "unit"), labels


def test_distances_are_mahalanobis_distances_under_the_shrunk_covariance() -> None:
    features, labels = rows()
    stats = FeatureStatistics.from_features(features, labels, 4, features[0])
    found = Distances.from_statistics(stats, "unit")(features.float().double())
    shrunk = shrink_correlation(stats.within_scatter(), stats)
    within = shrunk.matrix / torch.outer(shrunk.inverse_deviation, shrunk.inverse_deviation)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    shares = torch.bincount(labels).double() / len(labels)
    centred = means - features.mean(0)
    total = within + (centred.T * shares) @ centred

    def distance(about: Tensor, covariance: Tensor) -> Tensor:
        deviations = features - about
        return ((deviations @ torch.linalg.inv(covariance)) * deviations).sum(1)

    near = torch.stack([distance(mean, within) for mean in means]).min(0).values
    expected = torch.stack([near, distance(features.mean(0), total)], dim=1).div(features.shape[1]).sqrt()
    assert torch.allclose(found, expected, rtol=1e-4)
    # The class without rows is never the nearest one.
    assert float(Distances.from_statistics(stats, "unit").norms[3]) == pytest.approx(ABSENT)


def test_rows_far_away_are_foreign_and_new_rows_of_the_same_kind_are_not() -> None:
    features, labels = rows(0, 2000)
    stats = FeatureStatistics.from_features(features[:1000], labels[:1000], 4)
    distances = Distances.from_statistics(stats, "unit")
    test = Foreign(distances, DistanceSums.from_distances(distances(features[1000:1600])))
    assert np.mean(test.is_foreign(features[1600:])) < 0.04
    assert all(test.is_foreign(-features[1600:1700]))
    # The length of a row does not matter.
    assert test.is_foreign(features[1600:]) == test.is_foreign(features[1600:] * 7)
    assert test.is_foreign(torch.full((1, 6), torch.nan)) == [True]


def test_a_constant_feature_is_ignored_and_no_feature_at_all_is_an_error() -> None:
    features, labels = rows()
    wide = torch.cat([features, torch.zeros(len(features), 1)], dim=1)
    found = Distances.from_statistics(FeatureStatistics.from_features(wide, labels, 4), "unit")(wide)
    narrow = Distances.from_statistics(FeatureStatistics.from_features(features, labels, 4), "unit")(features)
    assert torch.allclose(found * (7 / 6) ** 0.5, narrow, rtol=1e-3)
    with pytest.raises(UserError, match="No feature varies"):
        Distances.from_statistics(FeatureStatistics.from_features(torch.ones(30, 3), torch.arange(30) % 2, 2), "unit")


def test_without_classes_both_distances_are_from_all_rows() -> None:
    features, _ = rows()
    stats = FeatureStatistics.from_features(features, features[:, :2].double(), 2, kind=VALUES)
    found = Distances.from_statistics(stats, "unit")(features)
    assert torch.allclose(found[:, 0], found[:, 1])
    assert float(found[:, 0].square().mean()) == pytest.approx(1, abs=0.1)


def test_a_file_belongs_to_one_head(tmp_path: Path) -> None:
    features, labels = rows()
    distances = Distances.from_statistics(FeatureStatistics.from_features(features, labels, 4), "unit")
    test = Foreign(distances, DistanceSums.from_distances(distances(features)), 0.02)
    path = tmp_path / "model.foreign.safetensors"
    test.save(path, "a" * 64)
    read = Foreign.load(path, "a" * 64)
    assert read is not None
    assert torch.equal(read.excess(features), test.excess(features))
    assert Foreign.load(path, "b" * 64) is None
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        Foreign.load(path, "a" * 64)


@pytest.mark.parametrize("name", ["centre", "whiten", "means", "norms", "between"])
def test_received_arrays_are_checked(name: str) -> None:
    features, labels = rows()
    arrays = dict(Distances.from_statistics(FeatureStatistics.from_features(features, labels, 4), "unit").to_arrays())
    Distances.from_arrays(arrays, 6, 4, "unit")
    for broken in (arrays[name][:-1], arrays[name].astype(np.float64), np.full_like(arrays[name], np.inf)):
        with pytest.raises(ValueError, match=r"instead of|not finite"):
            Distances.from_arrays({**arrays, name: broken}, 6, 4, "unit")
    with pytest.raises(ValueError, match="beyond"):
        Distances.from_arrays({**arrays, name: np.full_like(arrays[name], 1e35)}, 6, 4, "unit")
