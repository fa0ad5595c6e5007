from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import cohen_kappa_score, mean_absolute_error

from fedhead.config import RunConfig
from fedhead.data import Samples, samples_from_numbers
from fedhead.data.inputs import Input
from fedhead.errors import UserError
from fedhead.export import export_model
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model, predict_inputs
from fedhead.simulations import simulate
from fedhead.solvers.closed_form import solve_ridge
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import make_task
from fedhead.tasks.losses import RankedProbability
from fedhead.tasks.ordinal import Ordinal

LEVELS = ("0", "1", "2", "3")

pytestmark = pytest.mark.usefixtures("one_thread")


def ordered(seed: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, 5))
    hidden = features @ np.array([1.0, 0.5, 0.2, 0, 0]) + 0.4 * generator.normal(size=rows)
    return features, np.digitize(hidden, [-0.8, 0.2, 1.0])


def graded(seed: int = 0) -> Samples:
    features, levels = ordered(seed)
    return samples_from_numbers(features, levels.tolist(), spec="graded")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sites=st.integers(1, 5), penalty=st.sampled_from([0.1, 30.0]))
def test_cumulative_columns_equal_pooled_ridge(seed: int, sites: int, penalty: float) -> None:
    features, levels = ordered(seed, 150)
    owners = np.random.default_rng(seed).integers(0, sites, 150)
    rows, numbers = torch.from_numpy(features), torch.from_numpy(levels)
    total = sum(FeatureStatistics.from_features(rows[owners == one], numbers[owners == one], 4) for one in range(sites))
    assert isinstance(total, FeatureStatistics)
    outputs = solve_ridge(total, penalty)(rows).detach()
    above = outputs.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    columns = (levels[:, None] > np.arange(3)).astype(np.float64)
    expected = Ridge(alpha=penalty).fit(features, columns).predict(features)
    np.testing.assert_allclose(above, expected, rtol=1e-8, atol=1e-8)


def test_probabilities_are_monotone_and_exact_where_the_outputs_are() -> None:
    task = Ordinal(LEVELS)
    proper = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0, 0, 0]])
    torch.testing.assert_close(task.probabilities(proper), proper)
    wild = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    made = task.answers(wild, 1.0, torch.zeros(4, dtype=torch.bool))
    assert (made >= 0).all()
    torch.testing.assert_close(made.sum(1), torch.ones(500))
    unlearned = torch.tensor([False, True, False, False])
    assert task.answers(proper, 1.0, unlearned)[:, 1].abs().max() == 0
    assert task.decide(torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]])) == ["1", "2"]


def test_slopes_are_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 4, (2, 7), generator=generator)
    loss = RankedProbability()
    values, slopes = loss.slopes(outputs, targets)
    torch.testing.assert_close(values, loss.values(outputs.mT, targets))
    (expected,) = torch.autograd.grad(loss.values(outputs.mT, targets).sum(), outputs)
    torch.testing.assert_close(slopes, expected)
    assert loss.score(torch.eye(4), torch.tensor([0, 1, 2, 0])).tolist() == [True, True, True, False]


def test_figures_from_sums_equal_those_of_rows() -> None:
    task, (_, levels) = Ordinal(LEVELS), ordered(3)
    outputs = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) / 2 + torch.eye(4)[levels]
    sites = list(task.count(outputs, torch.from_numpy(levels), np.arange(400) % 3, 3, task.bins()))
    received = [type(one).from_arrays(one.to_arrays(), task.no_rows()) for one in sites]
    report = task.report(task.pooled(received))
    decided = task.levels(task.probabilities(outputs.double())).numpy()
    assert report.accuracy.value == pytest.approx((decided == levels).mean())
    assert report.mae.value == pytest.approx(mean_absolute_error(levels, decided))
    assert report.quadratic_kappa.value == pytest.approx(cohen_kappa_score(levels, decided, weights="quadratic"))
    for estimate in (report.mae, report.quadratic_kappa):
        assert estimate.low is not None and estimate.value is not None and estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
    assert task.report(task.no_rows()).quadratic_kappa.value is None


def test_kappa_interval_covers_the_population() -> None:
    from fedhead.evaluation.ordinal import quadratic_kappa

    generator = np.random.default_rng(0)
    shares = np.array([[8, 2, 1], [2, 6, 2], [1, 2, 8]]) / 32
    true = quadratic_kappa(shares * 1e6).value
    tables = generator.multinomial(300, shares.ravel(), 400).reshape(400, 3, 3).astype(float)
    drawn = [quadratic_kappa(one) for one in tables]
    assert true is not None
    covered = np.mean([one.low <= true <= one.high for one in drawn if one.low is not None and one.high is not None])
    assert 0.91 < covered < 0.985


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_run_from_data_to_predictions(rounds: int, tmp_path: Path) -> None:
    samples = graded()
    result = simulate(RunConfig(task="ordinal", backbone="identity", rounds=rounds), samples, 3, out=tmp_path / "run")
    assert result.config.classes == LEVELS
    figures = result.evaluation.to_dict()
    assert figures["quadratic_kappa"][0] > 0.7
    assert figures["mae"][0] < 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "quadratic weights" in page
    model = TransferModel.load(tmp_path / "run")
    assert model.task.description == "an ordinal classifier of 4 levels"
    assert evaluate_model(model, samples).report.quadratic_kappa.value > 0.7
    (predicted,) = predict_inputs(model, [Input("one", lambda: samples.read(0))])
    line = model.task.record(predicted.decision, predicted.answers, (), every=True)
    assert line["label"] in LEVELS
    assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert export_model(model, "torch-export", tmp_path / "model.pt2").difference < 1e-5


def test_levels_need_an_order() -> None:
    samples = graded()
    named = replace(samples, classes=("mild", "none", "severe", "some"))
    with pytest.raises(UserError, match=r"'mild', 'none', .* no order\. Name them from the lowest to the highest"):
        Ordinal.columns_of(named)
    assert make_task("ordinal", ("none", "mild", "some", "severe")).encode(named).tolist() == [
        {"none": 0, "mild": 1, "some": 2, "severe": 3}[named.classes[label]] for label in named.labels
    ]
    assert Ordinal.columns_of(replace(samples, classes=("10", "2", "9.5", "-1"))) == ("-1", "2", "9.5", "10")
    with pytest.raises(UserError, match="one exchange already solves"):
        RunConfig(task="ordinal", strategy={"name": "pooled-lbfgs"})
    with pytest.raises(UserError, match="real targets"):
        make_task("ordinal", ("a", "b")).encode(samples_from_numbers(np.ones((4, 1)), targets=[1.0, 2, 3, 4]))


def test_one_level_is_named_without_a_classifier() -> None:
    with pytest.raises(UserError, match="An ordinal run needs two levels or more; this one has only '1'"):
        make_task("ordinal", ["1"])
    with pytest.raises(UserError, match="A classifier needs two classes or more; this run has only '1'"):
        make_task("classification", ["1"])
