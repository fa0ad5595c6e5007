"""Clusters from sums, against computations on rows."""

import numpy as np
import pytest
import torch
from scipy.special import ive

from fedhead.errors import UserError
from fedhead.solvers.clusters import (
    Clusterings,
    Mixtures,
    assign,
    best_starts,
    by_size,
    directions_of,
    knee,
    log_normaliser,
    sizes_to_try,
)
from fedhead.sums.clusters import ClusterSums
from fedhead.sums.features import FeatureStatistics


def statistics_of(rows: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics.from_features(rows, torch.zeros(len(rows), dtype=torch.int64), 1)


def summed(directions: torch.Tensor, found: Clusterings) -> ClusterSums:
    clusters = assign(directions @ torch.from_numpy(found.centres).T, found.sizes, torch.zeros(sum(found.sizes)) > 0)
    sums = ClusterSums.empty(found.sizes, directions.shape[1])
    for row, places in zip(directions.numpy(), clusters.numpy(), strict=True):
        sums.counts[places] += 1
        sums.sums[places] += row
    return sums


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("concentration", [0.5, 8.0, 60.0, 400.0])
def test_the_normaliser_of_directions(width: int, concentration: float) -> None:
    order = width / 2 - 1
    bessel = np.log(ive(order, concentration)) + concentration
    exact = order * np.log(concentration) - width / 2 * np.log(2 * np.pi) - bessel
    assert log_normaliser(width, concentration) == pytest.approx(exact, abs=2e-3)


def test_axes_are_principal_and_half_whitened() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 5, generator=generator, dtype=torch.float64
    )
    directions, variances = directions_of(statistics_of(rows), 3)
    projected = (rows - rows.mean(0)) @ directions.axes
    covariance = projected.T @ projected / len(rows)
    assert directions.width == 3
    torch.testing.assert_close(covariance, torch.diag(variances))
    values = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)).flip(0)
    torch.testing.assert_close(variances, values[:3].sqrt())
    torch.testing.assert_close(directions.of(rows).norm(dim=1), torch.ones(500, dtype=torch.float64))
    assert not directions.of(rows.mean(0)[None]).isnan().any()


def test_rows_on_a_line_have_no_clusters() -> None:
    line = torch.arange(20.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    with pytest.raises(UserError, match="fewer than two directions"):
        directions_of(statistics_of(line))


def test_steps_find_separate_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 6 * torch.eye(4, dtype=torch.float64)
    truth = torch.arange(400) % 4
    rows = centres[truth] + torch.randn(400, 4, generator=generator, dtype=torch.float64)
    directions, variances = directions_of(statistics_of(rows))
    found = Clusterings.random([2, 4, 4, 4, 4, 6], variances, seed=0)
    for _ in range(15):
        sums = summed(directions.of(rows), found)
        found = found.moved(sums)
    best = best_starts(sums)
    assert [found.sizes[one] for one in best] == [2, 4, 6]
    four = found.chosen([best[1]])
    scores = directions.of(rows) @ torch.from_numpy(four.centres).T
    clusters = assign(scores, (4,), torch.zeros(4, dtype=torch.bool))[:, 0]
    pairs = {(int(one), int(other)) for one, other in zip(truth, clusters, strict=True)}
    assert len(pairs) == 4


def test_likelihoods_are_those_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator, dtype=torch.float64))
    found = Clusterings.random([2, 3], torch.ones(8, dtype=torch.float64), seed=3)
    mixtures = Mixtures.of(found, summed(rows, found))
    sums = mixtures.likelihoods(rows)
    for number, (start, stop) in enumerate([(0, 2), (2, 5)]):
        kappa = mixtures.concentrations[number]
        density = np.exp(
            mixtures.log_shares[start:stop]
            + log_normaliser(8, kappa)
            + kappa * rows.numpy() @ found.centres[start:stop].T
        ).sum(1)
        assert sums.totals[number] == pytest.approx(np.log(density).sum())
        assert sums.squares[number] == pytest.approx((np.log(density) ** 2).sum())
    assert sums.rows == 60


def test_the_banned_take_no_rows() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.8], [0.3, 0.2, 0.9, 0.1]])
    free = assign(scores, (2, 2), torch.tensor([False, False, False, False]))
    assert free.tolist() == [[0, 3], [0, 2]]
    assert assign(scores, (2, 2), torch.tensor([True, False, False, True])).tolist() == [[1, 2], [1, 2]]


def test_the_number_of_clusters_is_where_the_curve_levels_off() -> None:
    assert knee([2, 3, 4, 5, 6, 8], [0.0, 3.0, 6.0, 6.2, 6.4, 6.6]) == 4
    assert knee([2, 3, 4], [5.0, 4.0, 3.0]) == 2
    assert sizes_to_try(14) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14]
    assert by_size(np.array([3, 0, 9, 3])).tolist() == [2, 0, 3]
