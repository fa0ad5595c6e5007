"""Rounds of a language model: every strategy, killed and resumed runs, sites that diverge or lie."""

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import fedhead.server.runs.checkpoint
from fedhead.backbones import load_backbone
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.protocol.actions import EVALUATE, REPORT, RIVALS, TRAIN
from fedhead.protocol.messages import Payload
from fedhead.server.observer import EachRound
from fedhead.server.runs.history import Round
from fedhead.server.strategies import NAMES
from fedhead.simulations import simulate
from fedhead.simulations.result import RunResult
from fedhead.sums.heads import LOSS_SUM, SCORE, TABLE
from fedhead.tuning import NEXT_TOKEN

from ..common.backbones.tiny_language_model import tiny_language_model

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

WILD = TrainingLimits(max_lr=1e31)

FAST = ("FedAdam", "Krum")

PARAMETERS: dict[str, dict[str, Any]] = {
    "Bulyan": {"num_malicious_nodes": 0},
    "Krum": {"num_malicious_nodes": 0},
    "MultiKrum": {"num_malicious_nodes": 0, "num_nodes_to_select": 2},
    "FedAdam": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAvgM": {"server_momentum": 0.5},
    "FedProx": {"proximal_mu": 0.1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
}


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each round, however fast they are."""
    monkeypatch.setattr(fedhead.server.runs.checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(fedhead.server.runs.checkpoint, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two blocks, and 60 conversations whose answers follow from the questions."""
    folder = tmp_path_factory.mktemp("language")
    tiny_language_model(folder / "model")
    numbers = np.random.default_rng(0).integers(10, 99, 60)
    lines = [json.dumps({"prompt": f"Turn {one}", "completion": f"It is {str(one)[::-1]}."}) for one in numbers]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


def config(folder: Path, **values: Any) -> RunConfig:
    table = {"data": f"jsonl:{folder / 'talks.jsonl'}", "sites": 3, "min_class_count": 0, "min_rows": 0}
    tune = {"layers": "lora:2@last:1", "lr": 0.02, **values.pop("tune", {})}
    settings = {"task": "generation", "backbone": f"hf:{folder / 'model'}", "tune": tune, "rounds": 2, **values}
    return RunConfig(**settings, simulation=table)


def killed_after(number: int) -> EachRound:
    def kill(finished: Round) -> None:
        if finished.number == number:
            raise KeyboardInterrupt

    return EachRound(kill)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in NAMES])
def test_every_strategy_averages_adapters_and_goes_on_after_a_kill(folder: Path, tmp_path: Path, name: str) -> None:
    run = config(folder, strategy={"name": name, **PARAMETERS.get(name, {})})
    whole = simulate(run, out=tmp_path / "whole")
    assert whole.history[2].loss < whole.history[0].loss
    with pytest.raises(KeyboardInterrupt):
        simulate(run, out=tmp_path / "run", observers=[killed_after(0)])
    resumed = simulate(out=tmp_path / "run", resume=True)
    assert [one.loss for one in resumed.history] == [one.loss for one in whole.history]
    assert resumed.summary()["kept"] == whole.summary()["kept"]
    assert resumed.model.backbone.digest == whole.model.backbone.digest


def test_secure_sums_go_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    run = config(folder, privacy={"secure_sum": True}, strategy={"name": "FedAdam", "eta": 0.01})
    whole = simulate(run, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(run, out=tmp_path / "run", observers=[killed_after(0)])
    resumed = simulate(out=tmp_path / "run", resume=True)
    assert [one.loss for one in resumed.history] == [one.loss for one in whole.history]


def test_sites_that_diverge_at_once_leave_the_base_model(folder: Path, tmp_path: Path) -> None:
    wild = simulate(config(folder, tune={"lr": 1e30, "batch_size": 4}), out=tmp_path / "wild")
    assert (wild.summary()["kept"], wild.summary()["kept_round"]) == ("base", 0)
    base = load_backbone(f"hf:{folder / 'model'}", layer=NEXT_TOKEN)
    assert wild.model.backbone.digest == base.digest
    assert wild.summary()["perplexity"] == pytest.approx(wild.history[0].score, rel=1e-4)
    assert all("not finite" in reason for reason in wild.history[0].dropped.values())
    assert len(wild.history[0].dropped) == 3
    diverging = config(folder, tune={"lr": 1e30, "batch_size": 4}, privacy={"secure_sum": True})
    with pytest.raises(FedheadError, match="too large or not finite"):
        simulate(diverging, out=tmp_path / "secure")


class _Altered(ClientApp):
    """A site's own app, whose replies to some actions are altered."""

    def __init__(self, honest: ClientApp, alter: dict[str, Any]) -> None:
        super().__init__()
        self._honest, self._alter = honest, alter

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self._honest(message, context)
        alter = self._alter.get(message.metadata.message_type)
        if alter is None or reply.has_error():
            return reply
        payload = Payload.from_content(reply.content)
        arrays = {name: np.array(value) for name, value in payload.arrays.items()}
        alter(arrays)
        return Message(Payload(payload.values, arrays).to_content(), reply_to=message)


def simulated_with(
    folder: Path, out: Path, alter: dict[str, Any], liars: Collection[int] = (3,), **values: Any
) -> RunResult:
    """Run with four sites, of which the replies of some are altered."""
    lines = (folder / "talks.jsonl").read_text().splitlines()
    rows = [range(start, start + 15) for start in range(0, 60, 15)]
    accepted = AcceptedBackbones(frozenset({f"hf:{folder / 'model'}"}))
    apps = {}
    out.mkdir()
    for number, own in enumerate(rows):
        (out / f"{number}.jsonl").write_text("\n".join(lines[row] for row in own))
        data = f"jsonl:{out / str(number)}.jsonl"
        site = LocalSite(f"site-{number}", data, "cpu", guard=Guard(0, 0), training=WILD, backbones=accepted)
        app = make_app(lambda context, site=site: site)
        apps[site.name] = _Altered(app, alter if number in liars else {})
    return simulate(config(folder, **values), sites=rows, apps=apps, out=out / "run")


def test_real_sites_that_all_diverge_leave_the_base_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    wild = simulated_with(folder, tmp_path / "wild", {}, tune={"lr": 1e30, "batch_size": 4})
    assert wild.summary()["kept"] == "base"


def boast_in_detail(arrays: dict[str, Any]) -> None:
    rows = int(arrays["counts"][0])
    tokens = 10**6 * rows
    arrays["counts"] = np.array([rows, tokens, 0])
    arrays["sums"] = np.array([1.0, 1.0, float(tokens) ** 2, float(tokens)])


def test_tokens_that_no_conversations_have_do_not_weigh(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))

    def boast(arrays: dict[str, Any]) -> None:
        arrays[TABLE][0, SCORE] = 1e12
        arrays[TABLE][0, LOSS_SUM] = 1e-3

    alter = {TRAIN: boast, EVALUATE: boast, REPORT: boast_in_detail}
    result = simulated_with(folder, tmp_path / "lying", alter, rounds=1)
    assert "tokens of answers" in result.history[1].dropped["site-3"]
    assert result.summary()["perplexity"] > 100
    assert "site-3" not in result.score_by_site
    assert len(result.score_by_site) == 3


@pytest.mark.parametrize("honest", [0, 4])
def test_a_run_ends_although_no_site_tells_usable_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: int
) -> None:
    """All sites lie about the base model, and the adapters before that if none of their reports is honest."""
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    reports = itertools.count()
    alter = {REPORT: lambda arrays: boast_in_detail(arrays) if next(reports) >= honest else None}
    result = simulated_with(folder, tmp_path / "lying", alter, range(4), rounds=1)
    summary = result.summary()
    assert summary["kept"] == "tuned"
    assert summary["perplexity_solved"] is None
    assert (summary["perplexity"] is not None) == bool(honest)
    assert (tmp_path / "lying" / "run" / "report.html").exists()


def test_a_liar_cannot_have_useless_adapters_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))

    def praise(arrays: dict[str, Any]) -> None:
        rows = 15
        arrays["rows"] = np.array([rows])
        arrays["losses"] = np.array([5.0, 1.0]) * rows
        arrays["products"] = np.outer([5.0, 1.0], [5.0, 1.0]) * rows
        arrays["curves"] = np.repeat(arrays["losses"][:, None], arrays["curves"].shape[1], 1)

    def disparage(arrays: dict[str, Any]) -> None:
        arrays[TABLE][0, LOSS_SUM] = 40 * arrays[TABLE][0, SCORE]

    alter = {TRAIN: disparage, RIVALS: praise}
    result = simulated_with(folder, tmp_path / "lying", alter, rounds=1, tune={"lr": 1e-12})
    assert result.summary()["kept"] == "base"
    (choice,) = result.summary()["choices"]
    assert "Without site-3 the other sites' conversations do not prove it" in choice["reason"]


def test_no_site_that_can_do_anything_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **settings: Any) -> None:
        raise FedheadError("The disk is full.")

    monkeypatch.setattr("fedhead.client.head_handlers.prepare", fail)
    with pytest.raises(FedheadError, match=r"could train or evaluate the model.*disk is full"):
        simulate(config(folder), out=tmp_path / "run")
