import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_numbers
from fedhead.data.inputs import Input
from fedhead.errors import UserError
from fedhead.evaluation.survival import LEAST_CELL, concordance, kaplan_meier
from fedhead.export import export_model
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model, predict_inputs
from fedhead.server.app import with_classes
from fedhead.simulations import simulate
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.survival import SurvivalSums, risk_bins
from fedhead.sums.targets import LABELS
from fedhead.tasks import make_task
from fedhead.tasks.losses import HazardLikelihood
from fedhead.tasks.survival import Survival

pytestmark = pytest.mark.usefixtures("one_thread")

EDGES = ("1", "2", "4", "8")
EFFECT = np.array([0.9, -0.6, 0.3, 0.0])


def patients(seed: int, rows: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponential times with proportional hazards, and independent censoring."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, 4))
    times = generator.exponential(5 * np.exp(-features @ EFFECT))
    followed = generator.uniform(2, 12, rows)
    return features, np.minimum(times, followed), (times <= followed).astype(int)


def save_patients(path: Path, seed: int = 0, rows: int = 600) -> str:
    features, times, events = patients(seed, rows)
    lines = [
        ",".join([*(f"{value:.6f}" for value in row), f"{time:.6f}", str(event), "AB"[number % 2]])
        for number, (row, time, event) in enumerate(zip(features, times, events, strict=True))
    ]
    path.write_text("\n".join(["a,b,c,d,days,died,site", *lines]) + "\n")
    return f"csv:{path}?time=days&event=died"


def marks_of(task: Survival, times: np.ndarray, events: np.ndarray) -> np.ndarray:
    samples = samples_from_numbers(np.zeros((len(times), 1)), targets=np.stack([times, events], 1), spec="times")
    return task.encode(named(samples))


def named(samples: Samples) -> Samples:
    from dataclasses import replace

    return replace(samples, target_names=("time", "event"))


def test_times_become_bins() -> None:
    task = Survival(EDGES)
    times = np.array([0.0, 1.0, 1.5, 1.5, 4.0, 3.9, 9.0, 8.0, 0.5])
    events = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0])
    marks = marks_of(task, times, events)
    assert marks[:, :4].tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert marks[:, 4:].sum(1).tolist() == [1, 1, 2, 1, 3, 2, 4, 4, 0]
    assert task.strata(marks).tolist() == [0, 0, 1, 4, 6, 5, 7, 3, 8]
    assert len(task.groups) == 9
    assert make_task("survival", task.columns).columns == task.columns


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sites=st.integers(1, 6))
def test_one_exchange_equals_pooled_rows_under_any_split(seed: int, sites: int) -> None:
    features, times, events = patients(seed, 200)
    task = Survival(EDGES)
    marks, rows = torch.from_numpy(marks_of(task, times, events)), torch.from_numpy(features)
    owners = np.random.default_rng(seed).integers(0, sites, 200)
    origin = torch.full((4,), 0.5)
    total = sum(
        FeatureStatistics.from_features(rows[owners == one], marks[owners == one], 8, origin, kind=LABELS)
        for one in range(sites)
    )
    assert isinstance(total, FeatureStatistics)
    found = solve_head(total, "hazards")(rows).detach().numpy()
    np.testing.assert_allclose(found[:, :4], enumerated(features, marks.numpy()), rtol=1e-8, atol=1e-8)
    assert np.abs(found[:, 4:]).max() == 0


def enumerated(features: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Return the logits of the hazards from the rows themselves."""
    from sklearn.covariance import OAS

    bins = marks.shape[1] // 2
    mean, deviation = features.mean(0), features.std(0)
    scaled = (features - mean) / deviation
    covariance = OAS(assume_centered=True).fit(scaled).covariance_ * np.outer(deviation, deviation)
    # Shrinkage leaves the variances as they are.
    covariance[np.diag_indices(4)] = deviation**2
    score, information = np.zeros(4), 0.0
    for place in range(bins):
        event, risk = marks[:, place] == 1, marks[:, bins + place] == 1
        score += features[event].sum(0) - event.sum() * features[risk].mean(0)
        information += event.sum() * (1 - event.sum() / risk.sum())
    direction = np.linalg.solve(covariance, score) / information
    logits = []
    for place in range(bins):
        event, risk = marks[:, place] == 1, marks[:, bins + place] == 1
        hazard = (event.sum() + 0.5) / (risk.sum() + 1)
        centre = features[risk].mean(0)
        offset = np.log(hazard / (1 - hazard)) - (0.5 - hazard) * (direction @ score) / information
        logits.append((features - centre) @ direction + offset)
    return np.stack(logits, 1)


def test_direction_and_survival_are_near_the_truth() -> None:
    features, times, events = patients(1, 20_000)
    task = Survival(EDGES)
    marks, rows = torch.from_numpy(marks_of(task, times, events)), torch.from_numpy(features)
    head = solve_head(FeatureStatistics.from_features(rows, marks, 8, kind=LABELS), "hazards")
    weight = head.affine()[0][0].numpy()
    assert weight @ EFFECT / np.linalg.norm(weight) / np.linalg.norm(EFFECT) > 0.99
    survival = task.answers(head(rows).detach(), 1.0, torch.zeros(8, dtype=torch.bool))[:, 4:].numpy()
    true = np.exp(-np.array([1.0, 2, 4, 8]) / 5 * np.exp(features @ EFFECT)[:, None])
    # One step underestimates a large effect, which shows in the last bins.
    assert (np.abs(survival.mean(0) - true.mean(0)) < [0.01, 0.01, 0.03, 0.07]).all()


def test_concordance_equals_enumeration_of_pairs() -> None:
    task, generator = Survival(EDGES), np.random.default_rng(0)
    _, times, events = patients(2, 80)
    marks = marks_of(task, times, events)
    outputs = torch.from_numpy(generator.normal(-1, 0.7, (80, 8)))
    sites = list(task.count(outputs, torch.from_numpy(marks), np.arange(80) % 3, 3, task.bins()))
    received = [SurvivalSums.from_arrays(one.to_arrays(), task.no_rows()) for one in sites]
    found = task.report(task.pooled(received))
    risks = risk_bins(np.logaddexp(0, outputs[:, :4].numpy()).sum(1))
    right, pairs = 0.0, 0
    for i, j in itertools.permutations(range(80), 2):
        if marks[i, :4].any() and marks[j, 4 + marks[i, :4].argmax()] and not marks[j, marks[i, :4].argmax()]:
            pairs += 1
            right += (risks[i] > risks[j]) + (risks[i] == risks[j]) / 2
    assert found.concordance.value == pytest.approx(right / pairs)
    hazards = torch.sigmoid(outputs[:, :4]).numpy()
    assert found.expected == pytest.approx((hazards * marks[:, 4:]).sum() / marks[:, :4].sum())
    loss = HazardLikelihood().values(outputs, torch.from_numpy(marks)).sum() * 4 / 80
    assert found.loss == pytest.approx(float(loss))


def test_the_interval_of_concordance_covers_the_population() -> None:
    task = Survival(EDGES)
    outputs = np.zeros((4000 * 50, 8))
    features, times, events = patients(3, 4000 * 50)
    outputs[:, :4] = (features @ EFFECT)[:, None] - 1.5
    marks = marks_of(task, times, events)
    owners = np.arange(len(times)) // 400
    sites = list(task.count(torch.from_numpy(outputs), torch.from_numpy(marks), owners, 500, task.bins()))
    true = concordance(task.pooled(sites)).value
    drawn = [concordance(one) for one in sites]
    assert true is not None
    covered = np.mean([one.low <= true <= one.high for one in drawn if one.low is not None and one.high is not None])
    assert 0.92 < covered < 0.98


def test_kaplan_meier_by_hand() -> None:
    curve = kaplan_meier([2, 0, 3, 1], [20, 15, 12, LEAST_CELL - 1])
    assert [None if one is None else round(one[0], 6) for one in curve] == [0.9, 0.9, 0.675, None]
    assert all(one[1] < one[0] < one[2] for one in curve if one is not None)
    assert kaplan_meier([0], [10]) == ((1.0, 1.0, 1.0),)


def test_rows_lost_within_a_bin_are_at_risk_for_half_of_it() -> None:
    task = Survival(("3", "6", "9"))
    generator = np.random.default_rng(0)
    died, seen = generator.exponential(5, 4000), generator.uniform(0, 10, 4000)
    times, events = np.minimum(died, seen), (died <= seen).astype(int)
    (sums,) = task.count(
        torch.zeros(4000, 6),
        torch.from_numpy(marks_of(task, times, events)),
        np.zeros(4000, int),
        1,
        task.bins(),
    )
    within = [((times > low) & (times < low + 3) & (events == 0)).sum() for low in (0, 3, 6)]
    assert sums.lost.tolist() == within
    curve = task.report(sums).curve
    halved = kaplan_meier(sums.events.sum(1), sums.at_risk.sum(1))
    order = np.argsort(times)
    steps = np.cumprod(1 - events[order] / (4000 - np.arange(4000)))
    for edge, found, before in zip((3, 6, 9), curve, halved, strict=True):
        exact = steps[(times[order] <= edge).sum() - 1]
        assert found is not None
        assert before is not None
        assert found[0] == pytest.approx(exact, abs=0.03)
        assert before[0] < exact
        assert abs(found[0] - exact) < 0.5 * abs(before[0] - exact)


def test_no_sum_of_hazards_is_that_of_one_row_alone_in_its_bin_of_risk() -> None:
    task = Survival(EDGES)
    _, times, events = patients(0, 50)
    marks = marks_of(task, times, events)
    outputs = torch.from_numpy(np.random.default_rng(0).normal(-1, 1, (50, 8)))
    (sums,) = task.count(outputs, torch.from_numpy(marks), np.zeros(50, int), 1, task.bins())
    assert (sums.at_risk[0] == 1).sum() >= 5
    arrays = sums.to_arrays()
    assert {name for name, array in arrays.items() if array.dtype.kind == "f"} == {"expected", "loss_sum"}
    hazards = torch.sigmoid(outputs[:, :4]).numpy() * marks[:, 4:]
    np.testing.assert_allclose(arrays["expected"], hazards.sum(0))
    assert arrays["loss_sum"].shape == (1,)
    bins = task.curves(sums)["time_bins"]
    assert [one["until"] for one in bins] == list(task.edges)[: len(bins)]
    assert [one["expected"] for one in bins] == pytest.approx(hazards.sum(0)[: len(bins)])
    assert [one["observed"] for one in bins] == marks[:, : len(bins)].sum(0).tolist()


def test_impossible_sums_are_rejected() -> None:
    task = Survival(EDGES)
    _, times, events = patients(0, 50)
    outputs = torch.zeros(50, 8, dtype=torch.float64)
    (sums,) = task.count(outputs, torch.from_numpy(marks_of(task, times, events)), np.zeros(50, int), 1, task.bins())
    arrays = sums.to_arrays()
    changed = {
        "events": arrays["events"] + np.uint32(1000),
        "rows": np.array([1], np.uint32),
        "expected": arrays["expected"] + 100,
        "loss_sum": np.array([-1.0]),
    }
    for name, array in changed.items():
        with pytest.raises(ValueError):
            SurvivalSums.from_arrays({**arrays, name: array}, task.no_rows())


def test_slopes_are_gradients() -> None:
    task = Survival(EDGES)
    _, times, events = patients(0, 30)
    targets = torch.from_numpy(marks_of(task, times, events))
    outputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = HazardLikelihood()
    values, slopes = loss.slopes(outputs, targets)
    torch.testing.assert_close(values, loss.values(outputs.mT, targets))
    (expected,) = torch.autograd.grad(loss.values(outputs.mT, targets).sum(), outputs)
    torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_run_from_data_to_predictions(rounds: int, tmp_path: Path) -> None:
    spec = save_patients(tmp_path / "patients.csv")
    config = RunConfig(
        task="survival",
        backbone="identity",
        rounds=rounds,
        simulation={"data": spec, "sites": 2, "partition": "folder"},
    )
    result = simulate(config, out=tmp_path / "run")
    assert result.evaluation.concordance.value > 0.65
    assert result.summary()["score_name"] == "concordance"
    page, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert "Survival by site and pooled" in page
    assert "Concordance" in card
    model = TransferModel.load(tmp_path / "run")
    samples = load_samples(spec)
    assert evaluate_model(model, samples).report.concordance.value > 0.65
    (predicted,) = predict_inputs(model, [Input("one", lambda: samples.read(0))])
    line = model.task.record(predicted.decision, predicted.answers, ())
    survival = list(line["survival"].values())
    assert survival == sorted(survival, reverse=True)
    assert line["risk"] == pytest.approx(1 - survival[-1])
    cells = model.task.cells(predicted.decision, predicted.answers, (), every=True)
    assert len(cells) == len(model.task.header(every=True))
    assert export_model(model, "torch-export", tmp_path / "model.pt2").difference < 1e-5
    with pytest.raises(UserError, match="no prediction intervals"):
        evaluate_model(model, samples, coverage=0.9)


def test_the_grid_of_real_sites_is_in_the_configuration() -> None:
    config = with_classes(RunConfig(task="survival", classes=("90", "180", "365")))
    assert config.classes == Survival(("90", "180", "365")).columns
    assert with_classes(config).classes == config.classes


@pytest.mark.parametrize("edges", [(), ("a",), ("2", "1"), ("0", "1"), ("1", "1"), ("inf",), ("1", "nan")])
def test_edges_ascend(edges: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="upper edges of its time bins"):
        Survival(edges)


FAULTS: list[tuple[Callable[[list[str]], None], str, str]] = [
    (lambda line: line.__setitem__(4, "-1"), "", r"line 2 has the time -1, which is before 0 \(1 of 40 rows\)"),
    (lambda line: line.__setitem__(4, ""), "", "line 2 has no value in the column 'days'"),
    (lambda line: line.__setitem__(4, "nan"), "", "line 2 has no value in the column 'days'"),
    (lambda line: line.__setitem__(4, "inf"), "", "not a finite number"),
    (lambda line: line.__setitem__(5, "2"), "", "line 2 has '2' in the column 'died'; expected 1 for an event"),
    (lambda line: line.__setitem__(5, ""), "", "expected 1 for an event and 0 for none"),
    (lambda line: None, "?time=days", "needs time and event together"),
    (lambda line: None, "?time=days&event=days", "expected a column for each"),
    (lambda line: None, "?time=days&event=died&label=site", "without label and target"),
]


@pytest.mark.parametrize(("change", "options", "words"), FAULTS)
def test_wrong_times_and_events_are_explained(
    change: Callable[[list[str]], None], options: str, words: str, tmp_path: Path
) -> None:
    spec = save_patients(tmp_path / "patients.csv", rows=40)
    header, first, *others = (tmp_path / "patients.csv").read_text().splitlines()
    line = first.split(",")
    change(line)
    (tmp_path / "patients.csv").write_text("\n".join([header, ",".join(line), *others]) + "\n")
    with pytest.raises(UserError, match=words):
        load_samples(spec.partition("?")[0] + options if options else spec)


def test_too_few_events_are_explained() -> None:
    times = np.arange(1.0, 31)
    one = named(samples_from_numbers(times[:, None], targets=np.stack([times, times == 5], 1), spec="one"))
    with pytest.raises(UserError, match="one has 1 event in 30 rows; a survival model needs two or more"):
        Survival.columns_of(one)
    with pytest.raises(UserError, match="predicts the time to an event, but its data has none"):
        Survival.columns_of(samples_from_numbers(times[:, None], targets=times))
    features, times, _ = patients(0, 50)
    marks = torch.from_numpy(marks_of(Survival(EDGES), times, np.zeros(50)))
    with pytest.raises(UserError, match="0 events, and no rows without an event"):
        solve_head(FeatureStatistics.from_features(torch.from_numpy(features), marks, 8, kind=LABELS), "hazards")
