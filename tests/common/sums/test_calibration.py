import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedhead.evaluation.metrics import reliability
from fedhead.sums.calibration import BINS, TEMPERATURES, Calibration, CalibrationSums, TemperatureSums
from fedhead.sums.targets import LABELS


def overconfident(rows: int, sharpness: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are `sharpness` times the log-odds by which labels are drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 4, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * sharpness, labels


@pytest.mark.parametrize("sharpness", [0.05, 0.7, 1.0, 3.0, 20.0])
def test_temperature_undoes_sharpened_logits(sharpness: float) -> None:
    logits, labels = overconfident(20_000, sharpness)
    best = TemperatureSums.from_logits(logits, labels).best()
    assert best == pytest.approx(sharpness, rel=0.05)

    def loss(temperature: float) -> float:
        return float(functional.cross_entropy(logits.double() / temperature, labels))

    around = np.linspace(0.8, 1.25, 91) * best
    assert loss(best) <= min(map(loss, around)) + 1e-4


def test_temperature_of_multi_label_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 3, generator=generator)
    labels = torch.bernoulli(logits.sigmoid(), generator=generator).long()
    assert TemperatureSums.from_logits(logits * 4, labels, kind=LABELS).best() == pytest.approx(4, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(0, 1000))
def test_sums_of_parts_equal_sums_of_whole(cut: int, seed: int) -> None:
    logits, labels = overconfident(60, seed=seed)
    parts = (slice(None), slice(cut), slice(cut, None))
    whole, first, second = (TemperatureSums.from_logits(logits[part], labels[part]) for part in parts)
    assert (first + second).rows == whole.rows
    assert np.allclose((first + second).losses, whole.losses, rtol=1e-12)
    judged, one, other = (CalibrationSums.from_logits(logits[part], labels[part], 2.0) for part in parts)
    assert np.array_equal((one + other).scores, judged.scores)
    assert np.array_equal((one + other).after.reliability, judged.after.reliability)


def test_temperature_reduces_calibration_error() -> None:
    logits, labels = overconfident(20_000)
    temperature = TemperatureSums.from_logits(logits[:10_000], labels[:10_000]).best()
    judged = CalibrationSums.from_logits(logits[10_000:], labels[10_000:], temperature)
    before, after = reliability(judged.before).error, reliability(judged.after).error
    assert before is not None and after is not None
    assert before > 0.1
    assert after < 0.02
    assert np.array_equal(judged.before.confusion, judged.after.confusion)


def test_temperature_stays_finite_if_all_rows_are_correct() -> None:
    logits = torch.eye(4)[torch.arange(40) % 4] * 12
    assert TemperatureSums.from_logits(logits, torch.arange(40) % 4).best() == pytest.approx(1.0, abs=0.1)


def test_temperature_without_rows_is_one() -> None:
    assert TemperatureSums().best() == pytest.approx(1.0)
    assert TemperatureSums.from_logits(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).best() == pytest.approx(1.0)


def test_calibration_sums_round_trip() -> None:
    logits, labels = overconfident(50)
    losses = TemperatureSums.from_logits(logits, labels)
    assert TemperatureSums.from_arrays(losses.to_arrays()).best() == losses.best()
    judged = CalibrationSums.from_logits(logits, labels, 2.0)
    again = CalibrationSums.from_arrays(judged.to_arrays(), judged)
    assert np.array_equal(again.scores, judged.scores)
    assert np.array_equal(again.before.confusion, judged.before.confusion)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": np.array([-1])},
        {"rows": np.array([0])},
        {"rows": np.array([1.0])},
        {"losses": np.full(len(TEMPERATURES), np.nan)},
        {"losses": np.full(len(TEMPERATURES), -1.0)},
        {"losses": np.ones(3)},
        {"more": np.ones(3)},
    ],
)
def test_impossible_losses_are_rejected(change: dict[str, Any]) -> None:
    arrays = TemperatureSums.from_logits(*overconfident(50)).to_arrays() | change
    with pytest.raises(ValueError, match=r"losses|rows|holds"):
        TemperatureSums.from_arrays(arrays)


@pytest.mark.parametrize("name", ["scores", "before.confusion", "after.reliability"])
def test_contradictory_counts_are_rejected(name: str) -> None:
    arrays = CalibrationSums.from_logits(*overconfident(50), 2.0).to_arrays()
    counts = arrays[name].copy()
    counts.flat[0] += 1
    with pytest.raises(ValueError):
        CalibrationSums.from_arrays(arrays | {name: counts}, CalibrationSums.zeros(4))


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_set_coverage_equals_nominal(coverage: float) -> None:
    """The guarantee is an expectation over draws of the held-out rows, so it is looked at over many."""
    found, sizes = [], []
    for seed in range(200):
        logits, labels = overconfident(400, 1.0, seed)
        sums = CalibrationSums.from_logits(logits[:100], labels[:100], 1.0)
        least = Calibration(1.0, tuple(sums.scores.tolist())).least_probability(coverage)
        inside = logits[100:].softmax(-1).double() >= least
        found.append(float(inside[torch.arange(300), labels[100:]].float().mean()))
        sizes.append(float(inside.sum(1).float().mean()))
    error = float(np.std(found)) / math.sqrt(len(found))
    assert coverage - 3 * error <= np.mean(found) <= coverage + 0.02 + 3 * error
    assert np.mean(sizes) < 4


def test_least_probability_equals_conformal_quantile() -> None:
    logits, labels = overconfident(999, 1.0)
    sums = CalibrationSums.from_logits(logits, labels, 1.0)
    own = logits.double().softmax(-1)[torch.arange(999), labels].numpy()
    for coverage in (0.5, 0.9, 0.99):
        needed = math.ceil(1000 * coverage)
        exact = np.sort(own)[::-1][needed - 1]
        least = Calibration(1.0, tuple(sums.scores.tolist())).least_probability(coverage)
        assert least <= exact
        assert exact / (1 - exact) <= least / (1 - least) * math.exp(0.051)


def test_sets_with_too_few_rows_contain_every_class() -> None:
    scores = [0] * BINS
    scores[BINS // 2] = 8
    assert Calibration(1.0, tuple(scores)).least_probability(0.9) == 0.0
    assert Calibration(1.0, tuple(scores)).least_probability(0.8) > 0.0


def test_invalid_coverages_are_rejected() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Calibration(1.0, (5,) * BINS).least_probability(1.0)
    with pytest.raises(ValueError, match="held-out rows"):
        Calibration().least_probability(0.9)
