"""Runs whose layers train on other objectives than the task's loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.model import TransferModel
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

UNGUARDED = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def odd_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as the backbone has not seen them: mirrored, turned, inverted and noisy."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    images = (digits.images / 16 * 255)[:, ::-1, :].transpose(0, 2, 1)
    images = np.clip(255 - images * 0.6 + generator.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=images[..., None].repeat(3, -1), labels=digits.target)
    return path


def config(data: Path, objective: str, layers: str = "last:1", **values: Any) -> RunConfig:
    table = {"data": f"npz:{data}", "sites": 3, **UNGUARDED, **values.pop("simulation", {})}
    tune = {"layers": layers, "objective": objective, **values.pop("tune", {})}
    return RunConfig(**{"tune": tune, "rounds": 2, "simulation": table, **values})


def test_contrast_that_held_out_rows_prove_is_delivered(odd_digits: Path, tmp_path: Path) -> None:
    result = simulate(config(odd_digits, "supcon", "last:2", tune={"lr": 1e-3}, rounds=4), out=tmp_path / "run")
    figures = result.summary()
    assert figures["kept"] == "tuned"
    (choice,) = figures["choices"]
    assert choice["taken"] == "round 4 with its head solved again"
    assert choice["rivals"][1]["loss"] < choice["rivals"][0]["loss"]
    assert "last:2 by supcon; the digests" in (tmp_path / "run" / "MODEL_CARD.md").read_text()
    loaded = TransferModel.load(tmp_path / "run")
    assert loaded.backbone.digest == result.model.backbone.digest != load_backbone("bundled:glyphnet").digest


def test_the_predictor_travels_and_is_not_delivered(odd_digits: Path, tmp_path: Path) -> None:
    views = simulate(config(odd_digits, "simsiam"), out=tmp_path / "views")
    contrast = simulate(config(odd_digits, "supcon"), out=tmp_path / "contrast")
    width = views.model.backbone.num_features
    predictor = width // 4 * 2 * width + width
    trained = [one.summary()["trainable_parameters"] for one in (views, contrast)]
    assert trained[0] - trained[1] == predictor
    sent = [one.history[1].bytes_up for one in (views, contrast)]
    assert sent[0] - sent[1] == pytest.approx(3 * 4 * predictor, rel=0.05)
    assert not any("predictor" in name for name in views.model.head.trainable())
    assert TransferModel.load(tmp_path / "views").backbone.digest == views.model.backbone.digest


@pytest.mark.parametrize("objective", ["supcon", "simsiam"])
def test_real_sites_give_the_same_tail(
    odd_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with np.load(odd_digits) as digits:
        images, labels = digits["images"][:400], digits["labels"][:400]
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    rows = [range(150), range(150, 400)]
    apps = {}
    for number, own in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", images=images[own], labels=labels[own])
        site = LocalSite(f"site-{number}", f"npz:{tmp_path / str(number)}.npz", "cpu", guard=Guard(0, 0))
        apps[site.name] = make_app(lambda context, site=site: site)
    run = config(odd_digits, objective)
    simulated = simulate(run, f"npz:{tmp_path / 'all.npz'}", rows, out=tmp_path / "simulated")
    real = simulate(run, f"npz:{tmp_path / 'all.npz'}", rows, apps=apps, out=tmp_path / "real")
    np.testing.assert_allclose([one.loss for one in real.history], [one.loss for one in simulated.history], rtol=1e-3)
    assert simulated.history[2].loss != simulated.history[0].loss
    assert real.summary()["kept"] == simulated.summary()["kept"]
    (ledger,) = (tmp_path / "home").rglob("*site-0*.jsonl")
    assert f'"tuned":"last:1 by {objective}"' in ledger.read_text()


def test_a_sites_limit_counts_the_predictor(odd_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    known = simulate(config(odd_digits, "supcon", rounds=1), out=tmp_path / "known").summary()["trainable_parameters"]
    site = LocalSite(
        "site-0", f"npz:{odd_digits}", "cpu", guard=Guard(0, 0), training=TrainingLimits(max_trainable=known)
    )
    apps = {"site-0": make_app(lambda context: site)}
    data, rows = f"npz:{odd_digits}", [range(150), range(150, 300)]
    allowed = simulate(config(odd_digits, "supcon", rounds=1), data, rows, apps=apps, out=tmp_path / "allowed")
    refused = simulate(config(odd_digits, "simsiam", rounds=1), data, rows, apps=apps, out=tmp_path / "refused")
    assert "site-0" not in allowed.outcome.refused
    assert f"at most {known:,} parameters" in refused.outcome.refused["site-0"]


class _KillAfter(Observer):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_round(self, finished: Round) -> None:
        if finished.number == self.number:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_tail(odd_digits: Path, tmp_path: Path) -> None:
    run = config(odd_digits, "simsiam", rounds=3)
    whole = simulate(run, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(run, out=tmp_path / "run", observers=[_KillAfter(1)])
    resumed = simulate(out=tmp_path / "run", resume=True)
    assert [one.loss for one in resumed.history] == [one.loss for one in whole.history]
    ended, expected = ([(one["taken"], one["rivals"]) for one in run.summary()["choices"]] for run in (resumed, whole))
    assert ended == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"name": "FedMedian"}, {"name": "FedAdam", "eta": 1e-3}, {"name": "FedProx"}])
def test_other_strategies_average_tails_and_predictors(
    odd_digits: Path, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    result = simulate(config(odd_digits, "simsiam", rounds=1, strategy=strategy), out=tmp_path / "run")
    assert len(result.history) == 2
    assert not result.history[1].dropped


@pytest.mark.slow
def test_secure_sums_give_the_same_tail(odd_digits: Path, tmp_path: Path) -> None:
    plain = simulate(config(odd_digits, "simsiam"), out=tmp_path / "plain")
    secure = simulate(config(odd_digits, "simsiam", privacy={"secure_sum": True}), out=tmp_path / "secure")
    np.testing.assert_allclose([one.loss for one in secure.history], [one.loss for one in plain.history], rtol=1e-3)


@pytest.mark.slow
def test_stages_train_more_and_more_layers_on_an_objective(odd_digits: Path, tmp_path: Path) -> None:
    tune = {"layers": "", "objective": "simsiam", "schedule": {1: "last:1", 2: "last:2"}, "decay": 2.6}
    result = simulate(config(odd_digits, "simsiam", tune=tune), out=tmp_path / "run")
    assert result.history[1].bytes_up < result.history[2].bytes_up
    assert result.history[2].loss != result.history[1].loss


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tune": {"objective": "supcon"}}, "tune.objective needs layers"),
        ({"tune": {"layers": "last:1", "objective": "supcon"}, "rounds": 0}, "trains in rounds"),
        ({"tune": {"layers": "last:1", "objective": "nonsense"}}, "objective"),
        ({"tune": {"layers": "last:1", "objective": "supcon", "batch_size": 1}}, "2 or more"),
        ({"tune": {"layers": "last:1", "objective": "supcon"}, "task": "multi-label"}, "one class each"),
        (
            {
                "tune": {"layers": "last:1", "objective": "mlm"},
                "backbone": "hf:any",
                "simulation": {"activations": "recompute"},
            },
            "needs stored activations",
        ),
        ({"tune": {"layers": "last:1", "objective": "simsiam"}, "task": "regression"}, "une is for the tasks"),
        ({"tune": {"layers": "lora:8", "objective": "simsiam"}, "task": "generation", "backbone": "hf:a"}, "answers"),
        ({"tune": {"objective": "simsiam", "schedule": {1: "head", 2: "last:1"}}}, "stage 'head'"),
        ({"tune": {"layers": "last:1", "objective": "simsiam"}, "privacy": {"epsilon": 1.0}}, "ifferential"),
    ],
)
def test_impossible_objectives_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        RunConfig(**values)


def test_the_command_takes_an_objective(odd_digits: Path, tmp_path: Path) -> None:
    flags = ["simulate", "--data", f"npz:{odd_digits}", "--rounds", "1", "--sites", "2", "--objective", "supcon"]
    wrong = CliRunner().invoke(app, [*flags, "--out", str(tmp_path / "wrong")])
    assert wrong.exit_code == 2
    assert "needs layers to tune" in wrong.output
    done = CliRunner().invoke(app, [*flags, "--tune", "last:1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert 'objective = "supcon"' in (tmp_path / "run" / "run.toml").read_text()
