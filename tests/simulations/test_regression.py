"""Regression from a table to the model, over the whole of a simulated run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.ledger import ledger_path, read_ledger
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples
from fedhead.errors import UserError
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model, find_inputs, predict_inputs
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.simulations import add_class, join, leave, rank, simulate, study
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import VALUES

pytestmark = pytest.mark.usefixtures("one_thread")

UNGUARDED = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diabetes, as a CSV file with two targets: progression, and the same in other units with noise."""
    data = load_diabetes()
    path = tmp_path_factory.mktemp("diabetes") / "patients.csv"
    rows = np.column_stack([data.data, data.target, 3e4 - 2 * data.target + np.random.default_rng(0).normal(size=442)])
    header = ",".join([*data.feature_names, "progression", "reverse"])
    np.savetxt(path, rows, "%.12g", ",", header=header, comments="")
    return path


def config(**values: Any) -> RunConfig:
    simulation = {"partition": "dirichlet:1", **values.pop("simulation", {})}
    return RunConfig(**{"task": "regression", "backbone": "identity", "rounds": 0, "simulation": simulation, **values})


def one(table: Path) -> str:
    return f"csv:{table}?target=progression&features={','.join(load_diabetes().feature_names)}"


def both(table: Path) -> str:
    return f"csv:{table}?target=progression,reverse&features={','.join(load_diabetes().feature_names)}"


def rows_of(table: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    values = np.loadtxt(table, delimiter=",", skiprows=1)
    return values[:, :10].astype(np.float32).astype(np.float64), values[:, 10:]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sites=st.integers(1, 6),
    penalty=st.floats(1e-3, 1e3),
    centre=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_ridge_from_sums_equals_scikit_learns_under_any_split(
    seed: int, sites: int, penalty: float, centre: float
) -> None:
    generator = np.random.default_rng(seed)
    features = centre + generator.normal(size=(60, 5))
    targets = centre + features @ generator.normal(size=(5, 2)) + generator.normal(size=(60, 2))
    owners = generator.integers(0, sites, 60)
    origin = torch.full((5,), centre, dtype=torch.float64)
    parts = [
        FeatureStatistics.from_features(
            torch.from_numpy(features[owners == site]),
            torch.from_numpy(targets[owners == site]),
            2,
            origin,
            kind=VALUES,
        )
        for site in range(sites)
    ]
    received = [FeatureStatistics.from_arrays(one.to_arrays(), parts[0]) for one in parts]
    head = solve_head(sum(received, FeatureStatistics.empty(5, 2, origin, kind=VALUES)), "ridge", penalty=penalty)
    reference = Ridge(alpha=penalty).fit(features, targets)
    scale = max(1.0, float(np.abs(reference.coef_).max()))
    np.testing.assert_allclose(head.weight.detach(), reference.coef_, rtol=0, atol=1e-8 * scale)
    np.testing.assert_allclose(
        head(torch.from_numpy(features)).detach(), reference.predict(features), rtol=1e-8, atol=1e-8
    )


def test_one_exchange_over_ten_sites_gives_the_pooled_ridge_head(table: Path, tmp_path: Path) -> None:
    result = simulate(config(init="ridge", holdout=0.0, simulation=UNGUARDED), both(table), 10, out=tmp_path / "run")
    stats = result.outcome.statistics
    assert stats is not None
    assert (stats.rows, len(result.outcome.participants)) == (442, 10)
    features, targets = rows_of(table)
    for penalty in (0.1, 10.0):
        head, reference = solve_head(stats, "ridge", penalty=penalty), Ridge(alpha=penalty).fit(features, targets)
        np.testing.assert_allclose(head.weight.detach(), reference.coef_, rtol=1e-8)
        np.testing.assert_allclose(head.bias.detach(), reference.intercept_, rtol=1e-8)
    delivered, solved = result.model.head, solve_head(stats, "ridge")
    torch.testing.assert_close(
        delivered(torch.from_numpy(features).float()), solved(torch.from_numpy(features)).float()
    )


def test_figures_are_those_of_scikit_learn_on_the_held_out_rows(table: Path, tmp_path: Path) -> None:
    samples = load_samples(one(table))
    result = simulate(config(simulation=UNGUARDED), samples, 5, test_data=samples, out=tmp_path / "run")
    assert result.task.name == "regression"
    features, targets = rows_of(table)
    predicted = result.model.head(torch.from_numpy(features).float()).detach().numpy()[:, 0]
    assert result.test_score == pytest.approx(r2_score(targets[:, 0], predicted), abs=1e-6)
    # Evaluated was the head that has seen no held-out row.
    stats = result.outcome.statistics
    assert stats is not None
    seen = solve_head(stats, "ridge")
    report = result.evaluation
    assert report.rows == 442 - stats.rows == sum(sums.rows for sums in result.sites.values())
    assert result.score_held_out == report.r2.value
    assert 0.3 < report.r2.low < report.r2.value < report.r2.high < 0.7
    # A round's score is about the mean of the training rows, and therefore a little more.
    assert result.history[0].score is not None
    assert report.r2.value < result.history[0].score < report.r2.value + 0.05
    everywhere = seen(torch.from_numpy(features)).detach().numpy()[:, 0]
    assert mean_absolute_error(targets[:, 0], everywhere) == pytest.approx(report.targets[0].mae.value, rel=0.2)


def test_any_division_gives_the_same_figures(table: Path) -> None:
    runs = [
        simulate(config(simulation={"partition": partition, **UNGUARDED}), both(table), sites)
        for partition, sites in (("iid", 1), ("iid", 7), ("dirichlet:0.3", 5), ("quantity:0.5", 4))
    ]
    first, *others = [run.evaluation.to_dict() for run in runs]
    for other in others:
        assert other["rows"] == first["rows"]
        for a, b in zip(first["targets"], other["targets"], strict=True):
            for name in ("r2", "mae", "rmse"):
                assert b[name] == pytest.approx(a[name], rel=1e-5)
    residuals = [run.model.calibration.residuals for run in runs]
    assert all(np.abs(np.subtract(residuals[0], one)).sum() <= 4 for one in residuals[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "zeros", "rounds": 8},
        {"init": "zeros", "rounds": 15, "local": {"optimizer": "adamw", "lr": 0.05, "epochs": 2}},
        {"init": "zeros", "rounds": 8, "local": {"batch_size": 512, "epochs": 10}},
        {"head": "mlp:16", "rounds": 15},
        {"init": "zeros", "rounds": 8, "strategy": {"name": "FedMedian"}},
    ],
    ids=["coefficients", "adamw", "full batches", "mlp", "median"],
)
def test_rounds_learn_both_targets_from_nothing(table: Path, changes: dict[str, Any]) -> None:
    result = simulate(config(simulation={"partition": "iid"}, **changes), both(table), 5)
    scores = [line.score for line in result.history]
    assert scores[0] is not None and scores[-1] is not None
    assert scores[0] < 0.05
    assert scores[-1] > 0.3
    assert all(one.r2.value > 0.3 for one in result.evaluation.targets)
    # In the targets' own units, far from those that heads are trained in.
    assert 20 < result.evaluation.targets[0].rmse.value < 80
    assert 40 < result.evaluation.targets[1].rmse.value < 160


def test_rounds_keep_the_better_closed_form(table: Path) -> None:
    solved = simulate(config(), one(table), 5)
    started = simulate(config(rounds=2, local={"lr": 5.0}), one(table), 5)
    assert started.outcome.kept_round == 0
    assert started.score_held_out == pytest.approx(solved.score_held_out, abs=1e-6)
    torch.testing.assert_close(started.model.head.state_dict(), solved.model.head.state_dict())


def test_the_folder_has_a_report_and_a_card_with_r2(table: Path, tmp_path: Path) -> None:
    result = simulate(config(rounds=2), both(table), 10, out=tmp_path / "run")
    page, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert result.score_held_out is not None
    for text in (page, card):
        assert f"{result.score_held_out:.3f} (" in text
        assert "progression" in text and "reverse" in text
        assert "ccuracy" not in text
        assert "AUROC" not in text
        assert "prediction intervals for progression" in text
    assert "Observed against predicted progression" in page
    assert 'pipeline_tag: "tabular-regression"' in card
    assert 'type: "r_squared"' in card
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (summary["score"], summary["score_name"]) == (result.score, "r2")
    assert summary["r2_held_out"] == result.score_held_out
    assert not any("accuracy" in name for name in summary)


def test_a_loaded_model_predicts_values_and_intervals(table: Path, tmp_path: Path) -> None:
    simulate(config(), both(table), 5, out=tmp_path / "run")
    model = TransferModel.load(tmp_path / "run")
    features, targets = rows_of(table)
    expected = model.head(torch.from_numpy(features).float()).detach()
    predictions = list(
        predict_inputs(model, find_inputs([str(table)], "table", load_diabetes().feature_names), coverage=0.9)
    )
    np.testing.assert_allclose([one.decision for one in predictions], expected, rtol=1e-5)
    held = np.mean(
        [
            all(low <= value <= high for (low, high), value in zip(one.region, target, strict=True))
            for one, target in zip(predictions, targets, strict=True)
        ]
    )
    assert 0.8 < held < 1
    names = load_diabetes().feature_names
    assert model.predict([dict(zip(names, features[0], strict=True))])[0] == pytest.approx(
        expected[0].tolist(), rel=1e-5
    )
    with pytest.raises(UserError, match="gives values, not probabilities"):
        model.probabilities([])
    evaluated = evaluate_model(model, load_samples(both(table)), coverage=0.9)
    assert evaluated.report.r2.value == pytest.approx(r2_score(targets, expected), abs=1e-6)
    assert evaluated.covered / evaluated.sums.rows == held
    assert evaluated.coverage == 0.9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": "cosine"}, "'cosine' does not fit the task 'regression'; take 'linear'"),
        ({"init": "lda"}, "cannot start from 'lda' in the task 'regression', only from: ridge, zeros, random"),
        ({"task": "classification"}, r"predicts classes, but its data has real targets \(progression\)"),
        ({"task": "multi-label"}, "predicts classes, but its data has real targets"),
        ({"task": "regresion"}, r"no task 'regresion'. Did you mean 'regression'"),
        ({"classes": ["progresion"]}, r"predicts 'progresion', which is not a target of the data"),
    ],
)
def test_settings_that_do_not_fit_are_refused(table: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulate(config(**changes), one(table), 3)


def test_class_labels_are_no_targets() -> None:
    with pytest.raises(UserError, match=r"predicts numbers, but its data names classes.*\?target=COLUMN"):
        simulate(RunConfig(task="regression"), "digits", 3)


def test_a_constant_target_has_nothing_to_learn(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("x,y\n" + "".join(f"{row},7\n" for row in range(100)))
    with pytest.raises(UserError, match="Target 'y' cannot be predicted: it has the same value in all"):
        simulate(config(simulation=UNGUARDED), f"csv:{path}?target=y", 2)


def test_a_text_among_the_targets_is_named(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("x,y\n" + "".join(f"{row},{row * 2 if row != 5 else 'much'}\n" for row in range(100)))
    with pytest.raises(UserError, match=r"'much'.*'y'"):
        simulate(config(), f"csv:{path}?target=y", 2)


def test_the_guard_withholds_sites_with_few_rows(table: Path) -> None:
    rows = [np.arange(12), np.arange(12, 200), np.arange(200, 442)]
    result = simulate(config(simulation={"min_rows": 20}), one(table), rows)
    assert set(result.outcome.refused) == {"site-0"}
    assert result.outcome.statistics is not None
    assert result.outcome.statistics.rows + result.evaluation.rows == 430


def test_partitions_skew_sites_by_quantiles_of_the_target(table: Path) -> None:
    skewed = simulate(config(simulation={"partition": "dirichlet:0.05", **UNGUARDED}), one(table), 4)
    even = simulate(config(simulation={"partition": "iid", **UNGUARDED}), one(table), 4)

    def spread(sites: dict[str, Any]) -> float:
        means = [float(sums.moments[0, 0, 1] / sums.rows) for sums in sites.values() if sums.rows >= 8]
        return float(np.std(means))

    assert spread(dict(skewed.sites)) > 2 * spread(dict(even.sites))


def part(path: Path, table: Path, rows: slice) -> str:
    header, *lines = table.read_text().splitlines()
    path.write_text("\n".join([header, *lines[rows]]) + "\n")
    return one(path)


@pytest.mark.parametrize("keep", ["folder", "none"])
def test_a_site_that_joins_and_leaves_changes_the_head_as_its_rows_do(table: Path, tmp_path: Path, keep: str) -> None:
    most, few = part(tmp_path / "most.csv", table, slice(0, 360)), part(tmp_path / "few.csv", table, slice(360, 442))
    run, whole = tmp_path / "run", tmp_path / "whole"
    before = simulate(config(keep_sums=keep), most, [range(120), range(120, 360)], out=run)
    everything = [range(120), range(120, 360), range(360, 442)]
    expected = simulate(config(keep_sums=keep), one(table), everything, out=whole)
    change = join(run, "late", few, min_class_count=0, min_rows=0)
    assert change.summary()["score_name"] == "r2"
    assert change.accuracy is not None
    assert change.rows_after == 442
    for name, value in expected.model.head.state_dict().items():
        torch.testing.assert_close(TransferModel.load(run).head.state_dict()[name], value, rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match="no classes to add"):
        add_class(run, "worse", few, ["worse"])
    sums = {} if keep == "folder" else {"data": few, "min_class_count": 0, "min_rows": 0}
    leave(run, "late", **sums)
    for name, value in before.model.head.state_dict().items():
        torch.testing.assert_close(TransferModel.load(run).head.state_dict()[name], value, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"rounds": 2, "init": "zeros"}], ids=["ridge", "rounds"])
def test_sites_with_files_of_their_own_make_the_head_that_simulated_sites_make(
    table: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    rows = [range(150), range(150, 280), range(280, 442)]
    sites: dict[str, LocalSite] = {}
    for number, own in enumerate(rows):
        data = part(tmp_path / f"{number}.csv", table, slice(own.start, own.stop))
        sites[f"site-{number}"] = LocalSite(f"site-{number}", data, device="cpu")
    apps = {name: make_app(lambda context, site=site: site) for name, site in sites.items()}  # type: ignore[misc]
    real = simulate(config(**changes), one(table), rows, apps=apps)
    simulated = simulate(config(**changes), one(table), rows)
    assert real.outcome.refused == {}
    assert all(line.dropped == {} for line in real.history)
    for name, value in simulated.model.head.state_dict().items():
        torch.testing.assert_close(real.model.head.state_dict()[name], value, rtol=1e-5, atol=1e-4)
    assert real.score_by_site == pytest.approx(simulated.score_by_site, rel=1e-5)
    assert real.model.calibration.residuals == simulated.model.calibration.residuals
    entries = read_ledger(ledger_path("site-0"))
    assert {entry.rows for entry in entries if entry.classes} == {150}


def wide(digits: Samples) -> Samples:
    """Images of digits, with the digit and some noise as the target."""
    noise = 0.3 * np.random.default_rng(0).normal(size=(len(digits), 1))
    targets = digits.labels[:, None] + noise
    return replace(digits, classes=(), labels=np.zeros(len(digits), np.int64), targets=targets, target_names=("digit",))


def test_images_have_real_targets_too_and_rounds_on_wide_features_converge() -> None:
    samples = wide(load_samples("digits"))
    solved = simulate(config(backbone="bundled:glyphnet"), samples, 5)
    assert solved.score_held_out is not None
    assert solved.score_held_out > 0.85
    trained = simulate(config(backbone="bundled:glyphnet", rounds=5, init="zeros"), samples, 5)
    scores = [line.score or 0 for line in trained.history]
    assert scores == sorted(scores)
    assert scores[-1] > 0.7


@pytest.mark.slow
def test_backbones_are_ranked_by_the_evidence_of_real_targets() -> None:
    ranked = rank(["bundled:pixels", "bundled:glyphnet"], config(), wide(load_samples("digits")), 5)
    assert [one.backbone for one in ranked] == ["bundled:glyphnet", "bundled:pixels"]
    assert all(one.score_name == "r2" and one.h_score is None for one in ranked)
    assert ranked[0].accuracy is not None and ranked[1].accuracy is not None
    assert ranked[0].accuracy > ranked[1].accuracy


def test_a_study_sums_up_r2(table: Path, tmp_path: Path) -> None:
    found = study(config(), {"init": ["ridge", "zeros"]}, 2, one(table), 4, out=tmp_path / "study")
    solved, nothing = (cell.interval("r2") for cell in found.cells)
    assert solved is not None and nothing is not None
    assert solved.mean > 0.3 > nothing.mean
    assert "r2_worst_site" in found.to_csv().splitlines()[0]
    assert "accuracy" not in found.to_csv()


@pytest.mark.slow
def test_a_baseline_is_compared_by_r2(tmp_path: Path) -> None:
    simulate(
        config(backbone="bundled:glyphnet"),
        wide(load_samples("digits")),
        4,
        out=tmp_path / "run",
        baseline="bundled:pixels",
    )
    assert "the head of one exchange has R2 0." in (tmp_path / "run" / "report.html").read_text()


def test_the_command_line_says_r2_and_gives_values(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--task", "regression", "--backbone", "identity", "--data", one(table), "--rounds", "1", "--sites", "5"]
    ran = CliRunner().invoke(app, ["simulate", *asked, "--partition", "iid", "--out", "run"])
    assert ran.exit_code == 0, ran.output
    for word in ("R2", "MAE", "RMSE", "progression"):
        assert word in ran.stdout
    for word in ("Accuracy", "AUROC", "sensitivity"):
        assert word not in ran.stdout
    printed = CliRunner().invoke(app, ["simulate", *asked, "--partition", "iid", "--out", "again", "--json"])
    values = json.loads(printed.stdout)
    assert values["score_name"] == "r2"
    assert values["score"] == values["r2"] > 0.3
    predicted = CliRunner().invoke(app, ["predict", "run", str(table), "--coverage", "0.9"])
    header, first, *_ = predicted.stdout.splitlines()
    assert header == "path,progression,progression low,progression high,error"
    value, low, high = map(float, first.split('"')[-1].split(",")[1:4])
    assert low < value < high
    judged = CliRunner().invoke(app, ["evaluate", "run", "--data", one(table), "--json"])
    assert json.loads(judged.stdout)["score_name"] == "r2"
    assert json.loads(judged.stdout)["targets"][0]["name"] == "progression"


class Stop(Observer):
    def on_round(self, finished: Round) -> None:
        if finished.number == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(table: Path, tmp_path: Path) -> None:
    asked = config(rounds=5, init="zeros", simulation={"partition": "iid"})
    whole = simulate(asked, both(table), 4, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(asked, both(table), 4, out=tmp_path / "run", observers=[Stop()])
    resumed = simulate(out=tmp_path / "run", resume=True)
    for name, value in whole.model.head.state_dict().items():
        assert torch.equal(resumed.model.head.state_dict()[name], value)
    assert [line.score for line in resumed.history] == [line.score for line in whole.history]


def test_a_site_with_another_unit_is_diagnosed(table: Path, tmp_path: Path) -> None:
    parts = [np.arange(442)[number::6] for number in range(6)]
    header, *lines = table.read_text().splitlines()
    rows = [line.split(",") for line in lines]
    for row in parts[2]:
        rows[row][10] = repr(float(rows[row][10]) / 18)
    spoilt = tmp_path / "spoilt.csv"
    spoilt.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    folder = tmp_path / "run"
    simulate(config(simulation=UNGUARDED), one(spoilt), parts, out=folder)
    told = json.loads((folder / "evaluation.json").read_text())["diagnosis"]
    bad = told.pop(2)
    assert (bad["finding"], bad["recommendation"]) == ("targets look rescaled", "stay local")
    assert "Its values of 'progression' look 0.0" in bad["reason"]
    assert "for such values, the shared head depends on this site" in bad["reason"]
    assert "Its rows make the shared head worse at the other sites" in bad["reason"]
    assert all(other["recommendation"] != "stay local" for other in told)
    page = (folder / "report.html").read_text()
    assert "Targets by site" in page
    assert "Targets look rescaled" in page or "targets look rescaled" in page
    assert "of the same targets" in page
    assert "ccuracy" not in page
