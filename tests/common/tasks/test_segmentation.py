"""Segmentation heads from sums over places, whose items are divided over sites in any way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedhead.backbones.geometry import Geometry
from fedhead.data.masks import IGNORED
from fedhead.evaluation.segmentation import segmentation_report
from fedhead.heads import LinearHead
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.segmentation import SegmentationSums
from fedhead.tasks.segmentation import Segmentation

GEOMETRY = Geometry(((3, 8, 8), (2, 4, 4)), (32, 32))
TASK = Segmentation(("background", "nucleus", "vessel"))


def scenes(seed: int, count: int) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Return values `[n, V]` and masks; the finest map follows the mask."""
    generator = np.random.default_rng(seed)
    masks = [np.repeat(np.repeat(generator.integers(0, 3, (8, 8)), 4, 0), 4, 1).astype(np.uint8) for _ in range(count)]
    for mask in masks:
        mask[: int(generator.integers(0, 9))] = IGNORED
    fine = torch.stack(
        [torch.from_numpy((mask[None, ::4, ::4] == np.arange(3)[:, None, None]) * 1.0) for mask in masks]
    )
    values = torch.cat([fine.flatten(1), torch.zeros(count, 32)], 1) + torch.from_numpy(
        generator.normal(size=(count, GEOMETRY.num_values))
    )
    return values.float(), masks


def sums_of(values: torch.Tensor, masks: list[np.ndarray]) -> FeatureStatistics:
    stats = TASK.statistics(GEOMETRY.num_features)
    if masks:
        found = TASK.expand(values, masks, GEOMETRY)
        stats.update(found.features, found.targets)
        stats.items += found.items
    return stats


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sites=st.integers(1, 6))
def test_any_split_of_items_gives_the_head_of_all(seed: int, sites: int) -> None:
    values, masks = scenes(seed, 12)
    whole, parts = sums_of(values, masks), TASK.statistics(GEOMETRY.num_features)
    owners = np.random.default_rng(seed).integers(0, sites, 12)
    for one in range(sites):
        chosen = np.flatnonzero(owners == one)
        site = sums_of(values[chosen], [masks[row] for row in chosen])
        parts += FeatureStatistics.from_tensors(site.to_tensors())
    assert parts.items == whole.items == 12
    rows = GEOMETRY.places(values).flatten(0, 1).double()
    for solver in set(TASK.inits(LinearHead)) - {"zeros"}:
        expected, found = (solve_head(stats, solver)(rows).detach() for stats in (whole, parts))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_whole_cells_give_the_discriminant_of_their_classes() -> None:
    values, masks = scenes(1, 10)
    found = TASK.expand(values, masks, GEOMETRY)
    whole = found.targets.max(1).values == 1
    stats = TASK.statistics(GEOMETRY.num_features)
    stats.update(found.features[whole], found.targets[whole])
    # Unshrunk: with items beyond number, shrinkage vanishes.
    stats.items = stats.rows = int(whole.sum())
    labels = found.targets[whole].argmax(1).numpy()
    features = found.features[whole].double().numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels)
    head = solve_head(stats, "lda-shares")
    agree = head(torch.from_numpy(features)).argmax(1).numpy() == reference.predict(features)
    assert agree.mean() > 0.97


def test_shrinkage_counts_items_and_not_places() -> None:
    values, masks = scenes(2, 10)
    stats = sums_of(values + torch.randn(10, 1, generator=torch.Generator().manual_seed(0)), masks)
    few, many = stats.copy(), stats.copy()
    few.items, many.items = 10, stats.rows
    difference = solve_head(few, "lda-shares").weight - solve_head(many, "lda-shares").weight
    assert stats.independent == 10
    assert float(difference.detach().abs().max()) > 1e-3


def test_figures_equal_those_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    values, masks = scenes(3, 8)
    head = solve_head(sums_of(values, masks), "lda-shares").float()
    outputs = head(GEOMETRY.places(values)).detach()
    sums = TASK.count_items(outputs, masks, GEOMETRY)
    predicted = torch.from_numpy(
        np.stack([TASK.decode(one, GEOMETRY, mask.shape) for one, mask in zip(outputs, masks, strict=True)])
    ).long()
    truth = torch.from_numpy(np.stack(masks)).long()
    report = segmentation_report(sums, TASK.columns)
    jaccard = classification.MulticlassJaccardIndex(3, average="none", ignore_index=IGNORED)(predicted, truth)
    dice = classification.MulticlassF1Score(3, average="none", ignore_index=IGNORED)(predicted, truth)
    assert [one.iou.value for one in report.areas] == pytest.approx(jaccard.tolist(), abs=1e-6)
    assert [one.dice.value for one in report.areas] == pytest.approx(dice.tolist(), abs=1e-6)
    assert report.miou.value == pytest.approx(float(jaccard.mean()), abs=1e-6)


def test_one_item_has_no_interval() -> None:
    # Without an error, the variance of the one item is 0, too.
    report = segmentation_report(SegmentationSums.of_item(np.diag([900, 60, 40]), 0.1), TASK.columns)
    figures = [report.miou, report.dice, *(figure for one in report.areas for figure in (one.iou, one.dice))]
    assert {(one.low, one.high) for one in figures} == {(None, None)}
    assert all(one.value is not None for one in figures)


def test_a_class_without_items_has_no_figures() -> None:
    confusion = np.array([[90, 5, 5], [0, 0, 0], [0, 10, 30]])
    sums = SegmentationSums.of_item(confusion, 0.1) + SegmentationSums.of_item(confusion, 0.2)
    report = segmentation_report(sums, TASK.columns)
    assert report.areas[1].iou.value is None
    assert report.areas[1].dice.value is None
    assert report.miou.value == pytest.approx((90 / 100 + 30 / 45) / 2)


def test_intervals_cover_the_ratio_of_other_items() -> None:
    generator = np.random.default_rng(0)

    def items(count: int) -> SegmentationSums:
        total = SegmentationSums.zeros(2)
        for _ in range(count):
            size, skill = generator.integers(200, 800), generator.beta(8, 2)
            hit = int(size * skill)
            confusion = np.array([[2000 - size, size // 10], [size - hit, hit]])
            total = total + SegmentationSums.of_item(confusion, 0.1)
        return total

    truth = segmentation_report(items(20_000), ("a", "b")).miou.value
    found = [segmentation_report(items(40), ("a", "b")).miou for _ in range(200)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.9 <= covered <= 0.99


@pytest.mark.parametrize(
    "change",
    [
        {"present": np.array([9, 0], np.uint32)},
        {"confusion": np.array([[-1, 0], [0, 4]], np.int64)},
        {"loss_sum": np.array([-1.0])},
        {"moments": np.full((4, 4), np.nan)},
        {"rows": np.array([1], np.int64)},
    ],
)
def test_impossible_sums_are_rejected(change: dict[str, np.ndarray]) -> None:
    sums = SegmentationSums.of_item(np.array([[3, 1], [0, 4]]), 0.2)
    assert SegmentationSums.from_arrays(sums.to_arrays(), sums).rows == 1
    with pytest.raises(ValueError, match=r"items|range|contains|instead"):
        SegmentationSums.from_arrays({**sums.to_arrays(), **change}, sums)
