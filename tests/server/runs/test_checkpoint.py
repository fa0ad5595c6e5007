import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedhead.server.runs.checkpoint
from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.files import locked_folder
from fedhead.model import TransferModel
from fedhead.server.observer import EachRound
from fedhead.server.runs.history import Round
from fedhead.server.site_sums import SiteSums
from fedhead.server.strategies import NAMES, build_strategy
from fedhead.server.strategy_state import restore, state_of
from fedhead.simulations import RunResult, simulate

ROWS, SITES, ROUNDS = 280, 7, 4
SCALE = 0.5
PARAMETERS: dict[str, dict[str, Any]] = {
    "Bulyan": {"num_malicious_nodes": 1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "FedAvgM": {"server_momentum": 0.9},
    "FedProx": {"proximal_mu": 0.1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
}
CONFIG = RunConfig(
    backbone="greys:64", rounds=ROUNDS, init="nearest-mean", simulation={"min_class_count": 0, "min_rows": 0}
)


@backbone_sources.register("greys")
def load_greys(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """The pixels of 8 x 8 grey levels."""
    return Backbone(f"greys:{name}", nn.Flatten(), ImagePreprocessing(1, (8, 8), None, (0.5,), (SCALE,)), layer=layer)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each round, however fast they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fedhead.server.runs.checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(fedhead.server.runs.checkpoint, "SHARE", float("inf"))


@cache
def digits() -> Samples:
    whole = load_samples("digits")
    return samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], spec="some digits")


def rows_of_sites() -> list[Any]:
    return [np.arange(start, ROWS, SITES) for start in range(SITES)]


def config_of(strategy: str, parameters: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> RunConfig:
    return CONFIG.changed({**changes, "strategy": {"name": strategy, **PARAMETERS.get(strategy, {}), **parameters}})


def run(config: RunConfig | None, out: str | Path, **options: Any) -> RunResult:
    return simulate(config, digits(), rows_of_sites(), out=out, **options)


def figures(history: Sequence[Round]) -> list[tuple[Any, ...]]:
    """Return of each line what does not depend on how often sites were told of the run."""
    return [(line.number, line.sites, line.train_loss, line.loss, line.score, dict(line.dropped)) for line in history]


def assert_same(one: RunResult, other: RunResult) -> None:
    first, second = one.model.head.state_dict(), other.model.head.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures(one.history) == figures(other.history)
    assert one.outcome.kept_round == other.outcome.kept_round
    assert one.outcome.full_model_bytes == other.outcome.full_model_bytes
    assert one.outcome.diagnoses == other.outcome.diagnoses
    assert one.outcome.coverage == other.outcome.coverage


def assert_complete(run_dir: Path, expected: RunResult) -> None:
    """Check a folder by itself: the model, one line for each head, nothing left over, and sums that add up."""
    assert {path.name for path in run_dir.iterdir()} - {"sums"} == {
        "run.toml",
        "metrics.jsonl",
        "model.safetensors",
        "evaluation.json",
        "result.json",
        "journal.json",
        "report.html",
        "MODEL_CARD.md",
    }
    numbers = [json.loads(line)["number"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert numbers == list(range(len(expected.history)))
    delivered = TransferModel.load(run_dir).head.state_dict()
    assert all(torch.equal(value, delivered[name]) for name, value in expected.model.head.state_dict().items())
    if expected.outcome.statistics is not None:
        assert expected.run_dir is not None
        pools, wanted = (SiteSums(path / "sums").pools(10) for path in (run_dir, expected.run_dir))
        assert pools.keys() == wanted.keys()
        assert all(pool.is_close(wanted[part]) for part, pool in pools.items())


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def killed_in_round(number: int) -> EachRound:
    def kill(finished: Round) -> None:
        if finished.number == number:
            raise Killed

    return EachRound(kill)


# Every strategy, every round.


@pytest.mark.parametrize("strategy", [*NAMES, "pooled-lbfgs"])
def test_a_run_killed_in_any_round_goes_on_to_the_same_head(strategy: str) -> None:
    config = config_of(strategy)
    undisturbed = run(config, "undisturbed")
    out = "killed"
    resume = False
    for number in range(ROUNDS + 1):
        with pytest.raises(Killed):
            run(config, out, resume=resume, observers=[killed_in_round(number)])
        resume = True
    resumed = run(None, out, resume=True)
    assert_same(resumed, undisturbed)
    assert_complete(Path(out), undisturbed)


@pytest.mark.parametrize("init", ["zeros", "lda"])
def test_sampled_sites_heads_from_zeros_and_sums_that_are_only_pooled(init: str) -> None:
    for keep in ("folder", "none"):
        config = config_of("FedAdam", {"fraction_train": 0.5}, init=init, keep_sums=keep)
        undisturbed = run(config, f"undisturbed-{keep}")
        for number in (0, 2, ROUNDS):
            with pytest.raises(Killed):
                run(config, f"killed-{keep}", resume=number > 0, observers=[killed_in_round(number)])
        assert_same(run(None, f"killed-{keep}", resume=True), undisturbed)
        assert_complete(Path(f"killed-{keep}"), undisturbed)


def test_an_mlp_and_a_run_without_rounds() -> None:
    for config in (CONFIG.changed({"head": "mlp:8", "init": "random"}), CONFIG.changed({"rounds": 0})):
        name = config.head.replace(":", "-")
        undisturbed = run(config, f"undisturbed-{name}")
        with pytest.raises(Killed):
            run(config, f"killed-{name}", observers=[killed_in_round(config.rounds)])
        assert_same(run(None, f"killed-{name}", resume=True), undisturbed)
        assert_complete(Path(f"killed-{name}"), undisturbed)


# Every write.


def interrupt_writing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Make the process end at its write number `at`: before it, or after it took effect, by turns."""
    from fedhead import files

    count = [0]
    whole = files.write_atomically

    def write(path: Path, content: bytes | str) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        whole(path, content)

    users = [module for name, module in sys.modules.items() if name.startswith("fedhead")]
    for module in users:
        if getattr(module, "write_atomically", None) is whole:
            monkeypatch.setattr(module, "write_atomically", write)
    unlink = Path.unlink

    def remove(path: Path, missing_ok: bool = False) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", remove)
    return lambda: count[0]


@pytest.mark.parametrize("keep", ["folder", pytest.param("none", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_write_goes_on_to_the_same_head(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("FedYogi", rounds=2, keep_sums=keep)
    run(config, "warm")  # features are there from now on
    undisturbed = run(config, "undisturbed")
    with monkeypatch.context() as patch:
        writes = interrupt_writing(patch, at=0)
        run(config, "counted")
        total = writes()
    assert total > 15
    started = 0
    for at in range(1, total + 1):
        with monkeypatch.context() as patch:
            interrupt_writing(patch, at)
            with pytest.raises(Killed):
                run(config, f"killed-{at}")
        folder = Path(f"killed-{at}")
        if (folder / "result.json").exists():
            with pytest.raises(UserError, match="has finished"):
                run(None, folder, resume=True)
            assert at > total - 8
            continue
        if not folder.exists():  # nothing was done yet
            continue
        started += 1
        assert_same(run(None, folder, resume=True), undisturbed)
        assert_complete(folder, undisturbed)
        shutil.rmtree(folder)
    assert started > 8


def test_what_was_being_appended_when_the_power_failed_is_cut_off() -> None:
    config = config_of("FedAvg")
    undisturbed = run(config, "undisturbed")
    with pytest.raises(Killed):
        run(config, "killed", observers=[killed_in_round(2)])
    with Path("killed/metrics.jsonl").open("a") as file:
        file.write('{"number": 3, "si')
    assert_same(run(None, "killed", resume=True), undisturbed)


# What cannot be resumed, and why.


@pytest.fixture
def interrupted() -> Path:
    with pytest.raises(Killed):
        run(CONFIG, "interrupted", observers=[killed_in_round(2)])
    return Path("interrupted")


def refuse(words: str, config: RunConfig | None = None, out: Any = "interrupted", **options: Any) -> None:
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} if out else {}
    with pytest.raises(UserError, match=words):
        run(config, out, resume=True, **options)
    if out:
        assert {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} == before


def test_a_changed_configuration_is_refused_by_name(interrupted: Path) -> None:
    refuse("local would change", CONFIG.changed({"local": {"lr": 0.2}}))
    refuse("rounds, seed would change", CONFIG.changed({"rounds": 9, "seed": 1}))
    text = (interrupted / "run.toml").read_text()
    (interrupted / "run.toml").write_text(text.replace("rounds = 4", "rounds = 5"))
    refuse("started with another configuration")
    (interrupted / "run.toml").write_text(text)
    assert_same(run(None, interrupted, resume=True), run(CONFIG, "undisturbed"))


def test_quorum_and_deadline_may_change(interrupted: Path) -> None:
    saved = RunConfig.from_toml(interrupted / "run.toml")
    resumed = run(saved.changed({"min_sites": 2, "round_deadline": 60}), interrupted, resume=True)
    assert resumed.config.min_sites == 2


def test_another_strategy_is_refused(interrupted: Path) -> None:
    class Own(FedAvg):
        pass

    refuse("another strategy", strategy=Own())


def test_another_backbone_is_rejected(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load_greys.__globals__, "SCALE", 0.25)
    refuse("another backbone")


def test_a_finished_run_is_refused() -> None:
    run(CONFIG, "finished")
    refuse("has finished", out="finished")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse("no run folder", out="empty")
    refuse("no run folder", out="missing")
    refuse("needs the folder", out=None)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("state.safetensors", "statistics.safetensors", "heads")
        for damage in ("flip", "truncate", "remove", "empty")
        if (name, damage) != ("state.safetensors", "remove")  # as if no head had been complete
    ],
)
def test_a_damaged_checkpoint_is_refused(interrupted: Path, name: str, damage: str) -> None:
    (path,) = [path for path in (interrupted / "checkpoint").iterdir() if path.name.startswith(name)][:1]
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"flip": flipped, "truncate": content[: len(content) // 2], "empty": b""}[damage])
    refuse("damaged|cannot be read|There are no feature statistics")


def test_metrics_that_are_gone_are_told(interrupted: Path) -> None:
    Path(interrupted / "metrics.jsonl").write_text("")
    refuse("2 lines were written, and 0 are there")


def test_one_process_resumes_a_run(interrupted: Path) -> None:
    with locked_folder(interrupted), pytest.raises(FedheadError, match="another process"):
        run(None, interrupted, resume=True)


# Its parts.


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_is_what_it_remembers(name: str) -> None:
    config = config_of(name).strategy
    strategy, again = build_strategy(config), build_strategy(config)
    strategy.current_arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}  # type: ignore[attr-defined]
    strategy.extra = [np.float64(0.1), (1, None), {"a": True, 2: "b"}]  # type: ignore[attr-defined]
    again.current_arrays = again.extra = None  # type: ignore[attr-defined]
    values, arrays = state_of(strategy)
    restore(again, json.loads(json.dumps(values)), arrays)
    assert again.current_arrays["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]  # type: ignore[attr-defined]
    assert repr(again.extra) == repr(strategy.extra)  # type: ignore[attr-defined]
    assert state_of(again)[0] == values


def test_a_state_of_another_version_of_a_strategy_is_refused() -> None:
    values, arrays = state_of(build_strategy(config_of("FedAdam").strategy))
    with pytest.raises(UserError, match="has no"):
        restore(build_strategy(config_of("FedAvg").strategy), values, arrays)


# A process that is really killed.


@pytest.mark.slow
def test_processes_killed_at_random_moments_reach_the_same_head() -> None:
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-c", "from fedhead.cli import main; main()", "simulate", *arguments]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = ["--rounds", "400", "--sites", "5", "--set", "strategy.name=FedAdam", "--set", "local.lr=0.001"]
    subprocess.run(command(*settings, "--out", "undisturbed"), check=True, env=environment, capture_output=True)
    generator = random.Random(7)
    kills = 0
    for _ in range(60):
        begun = Path("killed/run.toml").exists()
        arguments = ["--resume", "killed"] if begun else [*settings, "--out", "killed"]
        process = subprocess.Popen(
            command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kills < 6:
            while not Path("killed/checkpoint/state.safetensors").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0.0, 2.0) + (2.0 if begun else 0.0))
        else:
            process.wait(120)
        process.send_signal(signal.SIGKILL)
        if process.wait(60) == 0:
            break
        kills += 1
    assert kills >= 3
    models = [TransferModel.load(name).head.state_dict() for name in ("undisturbed", "killed")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    losses = [
        [json.loads(line)["loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "killed")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 401


def test_a_run_is_resumed_with_the_data_it_was_started_with(interrupted: Path, tmp_path: Path) -> None:
    whole = digits()
    items, labels = [whole.read(row) for row in range(ROWS)], whole.labels.copy()
    fewer = samples_from_arrays(items[:-SITES], labels[:-SITES], spec="some digits")
    relabelled = samples_from_arrays(items, (labels + (np.arange(ROWS) == 3)) % 10, spec="some digits")
    other = samples_from_arrays([*items[:-1], items[0]], labels, spec="some digits")
    for data in (fewer, relabelled, other):
        sites = [rows[rows < len(data)] for rows in rows_of_sites()]
        with pytest.raises(UserError, match="was started with other data: rows came, went or changed"):
            simulate(None, data, sites, out=interrupted, resume=True)
    assert run(None, interrupted, resume=True).history
