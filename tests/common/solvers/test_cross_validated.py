import numpy as np
import pytest
import torch

from fedhead.solvers import solve_head
from fedhead.solvers.cross_validated import SHRINKAGES
from fedhead.sums.features import FeatureStatistics


def problem(seed: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, rows, p=[0.5, 0.3, 0.2])
    means = generator.normal(size=(3, width))
    features = means[labels] + generator.normal(size=(rows, width)) @ generator.normal(size=(width, width)) / 2
    return features * generator.uniform(0.1, 10, width) + 5, labels


def reference(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """LDA by its own definition, from all rows, and the hat matrix of the ridge regression for each shrinkage."""
    rows, width = features.shape
    mean, deviation = features.mean(0), features.std(0)
    x = (features - mean) / deviation
    targets = np.eye(3)[labels]
    scores = []
    for shrinkage in SHRINKAGES:
        hat = np.full((rows, rows), 1 / rows) + x @ np.linalg.solve(x.T @ x + rows * shrinkage * np.eye(width), x.T)
        residual = targets - hat @ targets
        scores.append((residual**2).mean() / (1 - np.trace(hat) / rows) ** 2)
    best = SHRINKAGES[int(np.argmin(scores))]
    means = np.stack([x[labels == one].mean(0) for one in range(3)])
    within = (x - means[labels]).T @ (x - means[labels]) / rows
    weight = np.linalg.solve(within + best * np.eye(width), means.T).T
    bias = -0.5 * (weight * means).sum(1) + np.log(np.bincount(labels) / rows)
    return weight / deviation, bias - (weight / deviation) @ mean, best


@pytest.mark.parametrize(("rows", "width"), [(200, 6), (60, 40), (50, 80)])
def test_it_equals_its_definition_on_pooled_rows(rows: int, width: int) -> None:
    chosen = set()
    for seed in range(4):
        features, labels = problem(seed, rows, width)
        weight, bias, best = reference(features, labels)
        chosen.add(best)
        x, y = torch.from_numpy(features), torch.from_numpy(labels)
        stats = FeatureStatistics.from_features(x, y, 3, x[0])
        head = solve_head(stats, "lda-gcv")
        np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-6, atol=1e-6 * abs(weight).max())
        np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-6, atol=1e-6 * abs(bias).max())
    assert SHRINKAGES[0] <= min(chosen) <= max(chosen) <= SHRINKAGES[-1]


def test_constant_features_have_no_weight_and_absent_classes_are_never_predicted() -> None:
    features, labels = problem(0, 120, 5)
    features[:, 2] = 3.0
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    head = solve_head(FeatureStatistics.from_features(x, y, 4, x[0]), "lda-gcv")
    assert not head.weight[:, 2].any()
    assert not head.weight[3].any()
    assert not bool((head(x).argmax(1) == 3).any())
    assert float((head(x).argmax(1) == y).double().mean()) > 0.6
