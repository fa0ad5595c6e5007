"""Sites with real targets or several labels per row against the pool, from sums alone."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedhead.evaluation.shift import MIN_DISTANCE
from fedhead.evaluation.target_diagnosis import finding_of
from fedhead.evaluation.target_shift import MIN_ROWS, TargetShift, target_shifts
from fedhead.simulations.partition import divide
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import LABELS, VALUES

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
SITES = 10
COLUMNS = ("pressure", "sugar")


def rows_of(seed: int, *, labels: bool) -> tuple[Array, Array]:
    """Features and two targets with heavy-tailed noise and a relation that is not quite linear; or three labels."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(2000, 30)) @ (np.eye(30) + 0.05 * generator.normal(size=(30, 30)))
    signal = features @ generator.normal(size=(30, 2))
    signal += 0.2 * features[:, :1] ** 2 + 0.5 * signal.std() * generator.standard_t(4, size=(2000, 2))
    if labels:
        marks = np.concatenate([signal > 0, signal[:, :1] > signal.std()], axis=1)
        return features, marks.astype(np.int64)
    return features, np.array([120.0, 5.0]) + signal * np.array([10.0, 0.3])


def statistics(features: Array, targets: Array, *, labels: bool) -> FeatureStatistics:
    kind = LABELS if labels else VALUES
    return FeatureStatistics.from_features(
        torch.from_numpy(features), torch.from_numpy(targets), targets.shape[1], kind=kind
    )


Spoil = Callable[[Array, Array, Array], None]


def shifts_of(
    seed: int, partition: str, spoil: Spoil | None = None, *, labels: bool = False
) -> list[TargetShift | None]:
    """Return the shift of each site, after spoiling the rows of the first in place."""
    features, targets = rows_of(seed, labels=labels)
    first = features[:, 0] if labels else targets[:, 0]
    strata = np.searchsorted(np.quantile(first, np.arange(1, 10) / 10), first).astype(np.int64)
    parts = divide(partition, strata, SITES, seed)
    if spoil is not None:
        spoil(features, targets, next(iter(parts.values())))
    sites = {name: statistics(features[rows], targets[rows], labels=labels) for name, rows in parts.items()}
    pool = statistics(features, targets, labels=labels)
    names = ("a", "b", "c") if labels else COLUMNS
    return list(target_shifts(sites, pool, names).values())


def another_unit(features: Array, targets: Array, rows: Array) -> None:
    targets[rows, 1] *= 18


def smaller_unit(features: Array, targets: Array, rows: Array) -> None:
    targets[rows, 1] /= 18


def offset(features: Array, targets: Array, rows: Array) -> None:
    targets[rows, 0] += targets[:, 0].std()


def reversed_targets(features: Array, targets: Array, rows: Array) -> None:
    targets[rows] = targets.mean(0) * 2 - targets[rows]


def reversed_labels(features: Array, targets: Array, rows: Array) -> None:
    targets[rows] = 1 - targets[rows]


def shuffled(features: Array, targets: Array, rows: Array) -> None:
    targets[rows] = targets[np.random.default_rng(0).permutation(rows)]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5"])
def test_healthy_sites_are_never_unlike_whatever_their_targets(partition: str, labels: bool) -> None:
    found = [one for seed in range(6) for one in shifts_of(seed, partition, labels=labels) if one]
    assert len(found) > 50
    assert not any(one.unlike for one in found)
    assert sum(one.alike for one in found) > 0.75 * len(found)
    assert max(one.distance for one in found) < MIN_DISTANCE


@pytest.mark.parametrize(
    ("spoil", "labels", "finding", "target"),
    [
        (another_unit, False, "targets look rescaled", "sugar"),
        (smaller_unit, False, "targets look rescaled", "sugar"),
        (offset, False, "rows look different", "pressure"),
        (reversed_targets, False, "targets look reversed", ""),
        (shuffled, False, "targets look wrong", ""),
        (reversed_labels, True, "labels look reversed", "all labels"),
        (shuffled, True, "labels look wrong", "all labels"),
    ],
)
@pytest.mark.parametrize("partition", ["iid", "dirichlet:1"])
def test_spoilt_sites_are_found_and_the_others_stay_alike(
    partition: str, spoil: Spoil, labels: bool, finding: str, target: str
) -> None:
    for seed in range(3):
        bad, *others = shifts_of(seed, partition, spoil, labels=labels)
        assert bad is not None
        assert finding_of(bad, real=not labels) == finding
        assert target in ("", bad.target)
        assert not any(one.unlike for one in others if one)


def test_a_changed_unit_and_an_offset_are_measured() -> None:
    larger, smaller, shifted = (shifts_of(1, "iid", spoil)[0] for spoil in (another_unit, smaller_unit, offset))
    assert larger
    assert smaller
    assert shifted
    assert 1 / larger.contrast == pytest.approx(18, rel=0.2)
    assert smaller.contrast == pytest.approx(18, rel=0.2)
    # Targets are one standard deviation too high: rows look like rows of lower targets.
    assert shifted.offset == pytest.approx(-1, abs=0.2)
    assert shifted.distributions[0].distance == pytest.approx(1, abs=0.2)


def test_distributions_are_those_of_the_rows() -> None:
    features, targets = rows_of(3, labels=False)
    parts = divide("dirichlet:1", np.arange(2000) % 10, 4, 3)
    sites = {name: statistics(features[rows], targets[rows], labels=False) for name, rows in parts.items()}
    found = target_shifts(sites, statistics(features, targets, labels=False), COLUMNS)
    for name, rows in parts.items():
        one = found[name]
        assert one
        own, rest = targets[rows], np.delete(targets, rows, axis=0)
        for place, line in enumerate(one.distributions):
            assert line.name == COLUMNS[place]
            measured = [line.mean, line.deviation, line.mean_elsewhere, line.deviation_elsewhere]
            expected = [own[:, place].mean(), own[:, place].std(), rest[:, place].mean(), rest[:, place].std()]
            np.testing.assert_allclose(measured, expected, rtol=1e-9)
    json.dumps([one.to_dict() for one in found.values() if one], allow_nan=False)


def test_few_rows_few_sites_and_noise_are_not_compared() -> None:
    features, targets = rows_of(0, labels=False)
    generator = np.random.default_rng(0)

    def of(*sizes: int, noise: bool = False) -> list[TargetShift | None]:
        edges = np.cumsum([0, *sizes])
        values = generator.normal(size=targets.shape) if noise else targets
        sites = {
            str(first): statistics(features[first:last], values[first:last], labels=False)
            for first, last in pairwise(edges.tolist())
        }
        pool = sum(sites.values(), FeatureStatistics.empty(30, 2, kind=VALUES))
        return list(target_shifts(sites, pool, COLUMNS).values())

    assert of(300, 300) == [None, None]
    assert [one is None for one in of(300, 300, 300, MIN_ROWS - 1)] == [False, False, False, True]
    assert of(100, 100, 100, noise=True) == [None, None, None]
    constant = statistics(features[:50], np.ones((50, 2)), labels=False)
    assert target_shifts({"a": constant}, constant, COLUMNS) == {"a": None}
