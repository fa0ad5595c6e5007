"""Adapted heads: each adaptation repairs the shift that it is for, and leaves rows without a shift alone."""

import pytest
import torch
from torch import Tensor

from fedhead.solvers.adaptation import (
    METHODS,
    Solver,
    adapted_heads,
    class_shares,
    confusion,
    estimated_shares,
    unmixed_shares,
    with_soft_labels,
)
from fedhead.solvers.closed_form import solve_lda
from fedhead.sums.features import FeatureStatistics

CLASSES, WIDTH = 3, 6


def drawn(rows: int, seed: int, shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.2
    labels = torch.multinomial(torch.tensor(shares), rows, replacement=True, generator=generator)
    return means[labels] + torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64), labels


def accuracies(features: Tensor, labels: Tensor) -> dict[str, float]:
    pooled = FeatureStatistics.from_features(*drawn(3000, 1), CLASSES)
    half = len(labels) // 2
    heads = adapted_heads(pooled, features[:half], Solver())
    assert tuple(heads) == METHODS
    return {
        name: float((head(features[half:]).argmax(1) == labels[half:]).double().mean()) for name, head in heads.items()
    }


def test_without_a_shift_nothing_is_lost() -> None:
    found = accuracies(*drawn(2000, 2))
    assert all(one > found["plain"] - 0.01 for one in found.values())


def test_other_class_shares_are_found_and_used() -> None:
    features, labels = drawn(4000, 3, (0.9, 0.08, 0.02))
    pooled = FeatureStatistics.from_features(*drawn(3000, 1), CLASSES)
    estimated = estimated_shares(solve_lda(pooled)(features), class_shares(pooled))
    torch.testing.assert_close(
        estimated, labels.bincount(minlength=CLASSES) / 4000.0, atol=0.02, rtol=0, check_dtype=False
    )
    found = accuracies(features, labels)
    assert found["shares"] > found["plain"] + 0.02
    assert found["bbse"] > found["plain"] + 0.02


def test_the_confusion_of_drawn_rows_is_that_of_rows_and_unmixes_predictions() -> None:
    pooled = FeatureStatistics.from_features(*drawn(3000, 1), CLASSES)
    head = solve_lda(pooled)
    confused = confusion(head, pooled, 1.0)
    torch.testing.assert_close(confused.sum(0), torch.ones(CLASSES).double())
    features, labels = drawn(6000, 8, (0.7, 0.1, 0.2))
    given = head(features).softmax(1)
    seen = torch.stack([given[labels == label].mean(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(confused, seen, atol=0.03, rtol=0)
    found = unmixed_shares(given.mean(0), confused, class_shares(pooled))
    torch.testing.assert_close(found, labels.bincount(minlength=CLASSES) / 6000.0, atol=0.03, rtol=0, check_dtype=False)
    # Where the inverse of the confusion matrix gives no negative share, the mixture is its solution.
    exact = torch.linalg.solve(confused, given.mean(0))
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)


def test_unmixed_shares_are_shares_and_leave_absent_classes_out() -> None:
    confused = torch.tensor([[0.9, 0.1, 0.2], [0.05, 0.8, 0.2], [0.05, 0.1, 0.6]], dtype=torch.float64)
    # More of the first class is predicted than any mixture gives.
    found = unmixed_shares(torch.tensor([0.98, 0.01, 0.01]).double(), confused, torch.tensor([0.5, 0.5, 0.0]).double())
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[0]) > 0.99
    assert float(found[2]) == 0


def test_another_offset_is_removed() -> None:
    features, labels = drawn(2000, 4)
    found = accuracies(features + torch.linspace(-3, 3, WIDTH, dtype=torch.float64), labels)
    assert min(found["mean"], found["mean+soft labels"], found["moments"]) > found["plain"] + 0.1


def test_another_covariance_is_aligned_where_the_mean_alone_is_not_enough() -> None:
    features, labels = drawn(4000, 5)
    scale = torch.tensor([4.0, 0.25, 1.0, 3.0, 0.3, 1.0], dtype=torch.float64)
    found = accuracies(features * scale + 2, labels)
    assert found["moments"] > found["mean"] + 0.02
    assert found["moments"] > found["plain"] + 0.02


def test_certain_soft_labels_are_labels() -> None:
    rows, labels = drawn(200, 6)
    pooled = FeatureStatistics.from_features(*drawn(300, 7), CLASSES, origin=torch.ones(WIDTH, dtype=torch.float64))
    soft = with_soft_labels(pooled, rows, torch.eye(CLASSES, dtype=torch.float64)[labels])
    hard = pooled + FeatureStatistics.from_features(rows, labels, CLASSES, origin=pooled.origin)
    for head, other in zip(solve_lda(soft).affine(), solve_lda(hard).affine(), strict=True):
        torch.testing.assert_close(head, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, WIDTH), (4, WIDTH + 1), (4,)])
def test_features_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    pooled = FeatureStatistics.from_features(*drawn(60, 1), CLASSES)
    with pytest.raises(ValueError, match="Features must be"):
        adapted_heads(pooled, torch.zeros(shape), Solver())
