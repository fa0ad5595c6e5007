import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fedhead.heads import LinearHead
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import MAX_WIDTH, RandomProjection, projection_for


def random_rows(seed: int, n: int, d: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = torch.randn(classes, d, generator=generator)
    return torch.randn(n, d, generator=generator) + means[labels], labels


def matrix_of(projection: RandomProjection) -> Tensor:
    return projection(torch.eye(projection.wide))


def test_projection_is_equal_in_every_process() -> None:
    program = (
        "import torch; from fedhead.sums.projection import RandomProjection;"
        "p = RandomProjection(1500, 20, 3)(torch.eye(1500));"
        "print(((p > 0).long() * (torch.arange(30000) % 1009 + 1).reshape(1500, 20)).sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "7537097\n"


def test_projection_has_random_signs() -> None:
    matrix = matrix_of(RandomProjection(3000, 40, 0))
    assert set((matrix * 40**0.5).unique().round(decimals=12).tolist()) == {-1.0, 1.0}
    assert abs(float(matrix.mean())) < 4 / (40 * 120000) ** 0.5
    gram = matrix.T @ matrix * 40 / 3000
    assert float((gram - torch.eye(40)).abs().max()) < 5 / 3000**0.5
    assert not torch.equal(matrix, matrix_of(RandomProjection(3000, 40, 1)))
    halves = matrix[:1024], matrix[1024:2048]
    assert not torch.equal(*halves)


def test_projection_keeps_distances() -> None:
    rows = torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    narrow = RandomProjection(5000, 1000, 0)(rows)
    ratio = torch.cdist(narrow, narrow)[0, 1:] / torch.cdist(rows, rows)[0, 1:]
    assert float((ratio - 1).abs().max()) < 4 / 2000**0.5


def test_a_head_on_projected_features_widens() -> None:
    features, labels = random_rows(22, 60, 1100, 3)
    projection = RandomProjection(1100, 12, 5)
    narrow = projection(features)
    head = solve_head(FeatureStatistics.from_features(narrow, labels, 3))
    wide = projection.widen(head)
    assert wide.weight.dtype == torch.float64
    torch.testing.assert_close(wide(features.double()), head(narrow), rtol=1e-10, atol=1e-10)


def test_only_wide_features_are_projected() -> None:
    assert projection_for(MAX_WIDTH, 0) is None
    projection = projection_for(5000, 0)
    assert projection is not None
    assert (projection.wide, projection.narrow) == (5000, 4096)
    with pytest.raises(ValueError, match=r"\[n, 5000\]"):
        projection(torch.ones(2, 4000))
    with pytest.raises(ValueError, match="takes 3 features"):
        projection.widen(LinearHead(3, 2))
    with pytest.raises(ValueError, match="Cannot project"):
        RandomProjection(10, 10, 0)
