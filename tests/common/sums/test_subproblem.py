import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.subproblem import merged, restricted
from fedhead.sums.targets import LABELS, VALUES

CLASSES = 5


def rows(seed: int, count: int = 120, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = 2 * torch.randn(CLASSES, width, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(count, width, generator=generator, dtype=torch.float64) + 3, labels


def summed(features: Tensor, labels: Tensor, classes: int = CLASSES) -> FeatureStatistics:
    return FeatureStatistics.from_features(features, labels, classes, torch.full((features.shape[1],), 2.5))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), owners=st.lists(st.integers(0, 2), min_size=CLASSES, max_size=CLASSES))
def test_merged_statistics_are_those_of_relabelled_rows(seed: int, owners: list[int]) -> None:
    features, labels = rows(seed)
    used = sorted(set(owners))
    groups = [[number for number, owner in enumerate(owners) if owner == one] for one in used]
    relabelled = torch.tensor([used.index(owner) for owner in owners])[labels]
    assert merged(summed(features, labels), groups).is_close(summed(features, relabelled, len(groups)), 1e-12)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 1], [1, 2, 3, 4]], [[0, 1, 2, 3, 4, 5]]])
def test_every_class_is_merged_once(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must be in one group"):
        merged(summed(*rows(0)), groups)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(CLASSES)), count=st.integers(2, CLASSES))
def test_a_restricted_discriminant_is_the_whole_one_without_the_other_classes(
    seed: int, order: list[int], count: int
) -> None:
    features, labels = rows(seed, count=400)
    chosen = order[:count]
    part = restricted(summed(features, labels), chosen)
    assert part.counts.tolist() == [int((labels == one).sum()) for one in chosen]
    assert part.rows == sum(part.counts.tolist())
    expected = summed(features, labels).within_scatter() / len(labels)
    assert torch.allclose(part.within_scatter() / part.rows, expected, rtol=1e-9, atol=1e-9)
    mean = torch.stack([features[labels == one].mean(0) for one in chosen])
    assert torch.allclose(part.origin + part.sums / part.counts[:, None], mean)
    # The form of rows' sums: what leaves or rests on a disk passes the same checks.
    assert FeatureStatistics.from_tensors(part.to_tensors()).is_close(part)


def test_restricting_to_all_classes_reorders_them_exactly() -> None:
    features, labels = rows(1)
    order = [3, 0, 4, 1, 2]
    relabelled = torch.argsort(torch.tensor(order))[labels]
    assert restricted(summed(features, labels), order).is_close(summed(features, relabelled), 1e-12)


def test_labels_and_targets_are_restricted_exactly() -> None:
    features, _ = rows(2)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(2, (len(features), 4), generator=generator)
    whole = FeatureStatistics.from_features(features, labels, 4, kind=LABELS)
    own = FeatureStatistics.from_features(features, labels[:, [2, 0]], 2, kind=LABELS)
    assert restricted(whole, [2, 0]).is_close(own, 1e-12)
    values = torch.randn(len(features), 3, generator=generator, dtype=torch.float64)
    targets = FeatureStatistics.from_features(features, values, 3, kind=VALUES)
    alone = FeatureStatistics.from_features(features, values[:, [1]], 1, kind=VALUES)
    assert restricted(targets, [1]).is_close(alone, 1e-12)
    solved = solve_head(restricted(targets, [1]), "ridge", penalty=1.0)
    expected = solve_head(targets, "ridge", penalty=1.0)
    assert torch.allclose(solved.weight, expected.weight[[1]], rtol=1e-10)


@pytest.mark.parametrize("columns", [[0, 0], [5], [-1, 0]])
def test_columns_are_distinct_and_exist(columns: list[int]) -> None:
    with pytest.raises(ValueError, match="Cannot restrict"):
        restricted(summed(*rows(0)), columns)


def test_labels_are_not_merged() -> None:
    features, _ = rows(2)
    whole = FeatureStatistics.from_features(features, torch.ones(len(features), 2, dtype=torch.int64), 2, kind=LABELS)
    with pytest.raises(ValueError, match="one class each"):
        merged(whole, [[0, 1]])
