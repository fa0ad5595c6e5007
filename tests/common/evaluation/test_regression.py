import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from fedhead.evaluation.regression import (
    COVERAGES,
    half_width,
    interval_coverage,
    prediction_curve,
    regression_report,
)
from fedhead.sums.regression import RESIDUAL_BINS, RegressionSums, ResidualSums, regression_sums
from fedhead.sums.score_bins import ScoreBins

Array = np.ndarray[Any, Any]


def sums_of(outputs: Array, targets: Array, bins: ScoreBins) -> RegressionSums:
    (sums,) = regression_sums(outputs, targets, np.zeros(len(outputs), np.int64), 1, bins)
    return sums


def draw(seed: int, n: int, noise: float = 0.6, centre: float = 1e5) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=(n, 2))
    return centre + 3 * signal, centre + 3 * (signal + noise * generator.normal(size=(n, 2)))


def test_metrics_equal_scikit_learn_in_original_units() -> None:
    outputs, targets = draw(0, 300)
    # A centre far from these rows, as at a site that differs from the others.
    report = regression_report(sums_of(outputs, targets, ScoreBins(np.full(2, 1e5 + 9), np.full(2, 3.0))), ("a", "b"))
    assert report.rows == 300
    assert report.r2.value == pytest.approx(r2_score(targets, outputs), abs=1e-10)
    for place, one in enumerate(report.targets):
        true, predicted = targets[:, place], outputs[:, place]
        assert one.r2.value == pytest.approx(r2_score(true, predicted), abs=1e-10)
        assert one.mae.value == pytest.approx(mean_absolute_error(true, predicted), rel=1e-10)
        assert one.rmse.value == pytest.approx(root_mean_squared_error(true, predicted), rel=1e-10)
        assert one.bias.value == pytest.approx(float((predicted - true).mean()), abs=1e-8)
        assert one.deviation == pytest.approx(float(true.std()), rel=1e-10)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_interval_coverage_of_metrics(noise: float) -> None:
    # Over all rows ever drawn: r2 of predicting y = x + noise by x, and the errors of a normal distribution.
    truth = {
        "r2": 1 - noise**2 / (1 + noise**2),
        "mae": 3 * noise * math.sqrt(2 / math.pi),
        "rmse": 3 * noise,
        "bias": 0.0,
    }
    bins, held = ScoreBins(np.full(2, 1e5), np.full(2, 3.0)), dict.fromkeys(truth, 0)
    for seed in range(400):
        report = regression_report(sums_of(*draw(seed, 150, noise), bins), ("a", "b"))
        for name, value in truth.items():
            figure = getattr(report.targets[0], name)
            held[name] += figure.low <= value <= figure.high
    assert all(0.91 <= count / 400 <= 0.985 for count in held.values()), held


def test_undefined_metrics_have_a_reason() -> None:
    bins = ScoreBins(np.zeros(1), np.ones(1))
    none = regression_report(RegressionSums.zeros(bins), ("a",))
    assert none.r2.value is None
    assert none.to_dict()["undefined"] == {"r2": "There are no rows."}
    one = regression_report(sums_of(np.ones((1, 1)), np.zeros((1, 1)), bins), ("a",))
    assert (one.targets[0].mae.value, one.targets[0].mae.low) == (1.0, None)
    constant = regression_report(sums_of(np.arange(4.0)[:, None], np.full((4, 1), 7.7), bins), ("a",))
    assert constant.targets[0].r2.reason == "This target has the same value in all rows."
    assert constant.targets[0].mae.value == pytest.approx(6.2)
    perfect = regression_report(sums_of(np.arange(4.0)[:, None], np.arange(4.0)[:, None], bins), ("a",))
    assert perfect.r2.to_list() == [1.0, 1.0, 1.0]
    assert perfect.targets[0].rmse.to_list() == [0.0, 0.0, 0.0]


def test_prediction_curve_in_original_units() -> None:
    bins = ScoreBins(np.array([10.0]), np.array([2.0]))
    curve = prediction_curve(sums_of(np.array([[10.1], [10.3], [14.0]]), np.array([[11.0], [9.0], [15.0]]), bins))[0]
    assert sum(curve["rows"]) == 3
    place = curve["rows"].index(2)
    assert (curve["predicted"][place], curve["observed"][place]) == (pytest.approx(10.2), pytest.approx(10.0))
    assert curve["predicted"][0] is None


def test_prediction_interval_coverage() -> None:
    bins = ScoreBins(np.full(2, 1e5), np.full(2, 3.0))
    held = dict.fromkeys(COVERAGES, 0.0)
    for seed in range(200):
        made = ResidualSums.from_outputs(*draw(seed, 120), bins)
        judged = ResidualSums.from_outputs(*draw(10_000 + seed, 400), bins)
        for line in interval_coverage(made, judged)[0]:
            held[line["coverage"]] += line["held"] / 200
    for coverage, share in held.items():
        assert coverage - 0.01 <= share <= coverage + 0.035


def test_half_widths_equal_conformal_quantiles_rounded_up() -> None:
    bins = ScoreBins(np.full(2, 1e5), np.full(2, 3.0))
    outputs, targets = draw(3, 99)
    counts = ResidualSums.from_outputs(outputs, targets, bins).counts[0].tolist()
    residuals = np.sort(np.abs(outputs - targets)[:, 0])
    for coverage in COVERAGES:
        exact = residuals[math.ceil(100 * coverage) - 1]
        assert exact <= half_width(counts, 3.0, coverage) <= 1.0203 * exact
    assert half_width(counts, 3.0, 0.995) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        half_width(counts, 3.0, 1.0)
    with pytest.raises(ValueError, match="held-out rows"):
        half_width([0] * RESIDUAL_BINS, 3.0, 0.9)
