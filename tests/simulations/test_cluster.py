import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.protocol.actions import TRAIN
from fedhead.server.observer import EachRound
from fedhead.simulations import RunResult, cluster, simulate
from fedhead.sums.features import FeatureStatistics

CONFIG = RunConfig(
    rounds=3,
    seed=3,
    strategy={"name": "FedAvg", "fraction_train": 0.7},
    local={"batch_size": 8, "momentum": 0.5, "lr": 0.01},
    simulation={"sites": 24, "partition": "dirichlet:0.5", "device": "cpu", "blocks": 5},
)

pytestmark = pytest.mark.usefixtures("one_thread")


def on_ray(config: RunConfig = CONFIG) -> RunConfig:
    return config.changed({"simulation": {"engine": "ray"}})


def assert_same(one: RunResult, other: RunResult) -> None:
    """Heads and counts have the same bits; losses agree to 1e-12."""
    assert one.outcome.participants == other.outcome.participants
    assert one.outcome.kept_round == other.outcome.kept_round
    assert one.outcome.refused == other.outcome.refused
    assert one.accuracy_by_site == other.accuracy_by_site
    assert one.bytes_down == other.bytes_down
    assert one.bytes_up == other.bytes_up
    for name, value in one.model.head.state_dict().items():
        np.testing.assert_array_equal(other.model.head.state_dict()[name], value)
    for line, like in zip(one.history, other.history, strict=True):
        assert (line.sites, line.score, line.dropped) == (like.sites, like.score, like.dropped)
        assert (line.loss or 0.0) == pytest.approx(like.loss or 0.0, rel=1e-12)
        assert (line.train_loss or 0.0) == pytest.approx(like.train_loss or 0.0, rel=1e-12)


def assert_same_sums(one: RunResult, other: RunResult) -> None:
    assert one.run_dir is not None
    assert other.run_dir is not None
    files = sorted(file.name for file in (one.run_dir / "sums").glob("*.safetensors"))
    assert len(files) > 40
    for name in files:
        here, there = (FeatureStatistics.load(run.run_dir / "sums" / name) for run in (one, other) if run.run_dir)
        np.testing.assert_array_equal(here.counts, there.counts)
        np.testing.assert_allclose(here.upper, there.upper, rtol=1e-12, atol=1e-9)


def test_blocks_change_rounding_only(tmp_path: Path) -> None:
    blocks = simulate(CONFIG, out=tmp_path / "blocks")
    whole = simulate(CONFIG.changed({"simulation": {"blocks": 1}}), out=tmp_path / "whole")
    assert_same_sums(blocks, whole)
    assert blocks.accuracy_by_site == whole.accuracy_by_site
    assert blocks.bytes_up == whole.bytes_up
    for line, like in zip(blocks.history, whole.history, strict=True):
        assert (line.sites, line.score) == (like.sites, like.score)
        assert (line.loss or 0.0) == pytest.approx(like.loss or 0.0, rel=1e-5)


@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_without_ray_its_extra_is_named(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedhead\[ray\]'"):
        simulate(CONFIG.changed({"simulation": {"engine": engine}}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"), ("head", "HOST:PORT"), ("ray://head:port", "HOST:PORT")],
)
def test_a_cluster_that_is_not_there_is_named_before_the_run(address: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=said):
        simulate(on_ray().changed({"simulation": {"cluster": address}}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_apps_of_ones_own_run_in_this_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from flwr.clientapp import ClientApp

    with pytest.raises(UserError, match="process"):
        simulate(on_ray(), apps={"site-0": ClientApp()}, out=tmp_path / "run")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster on loopback: three nodes of one core each, one of them beside the coordinator."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster.call_nobody()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_makes_what_one_process_makes(nodes: Any, tmp_path: Path) -> None:
    here = simulate(CONFIG, out=tmp_path / "process")
    there = simulate(on_ray(), out=tmp_path / "ray")
    assert_same(here, there)
    assert_same_sums(here, there)


@pytest.mark.slow
def test_robust_strategies_get_every_reply_from_a_cluster(nodes: Any, tmp_path: Path) -> None:
    robust = CONFIG.changed({"strategy": {"name": "FedMedian"}, "keep_sums": "none", "init": "zeros"})
    assert_same(simulate(robust, out=tmp_path / "process"), simulate(on_ray(robust), out=tmp_path / "ray"))


@pytest.mark.slow
def test_a_worker_killed_at_work_and_sent_features_change_nothing(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    module = import_module("fedhead.simulations.simulate")
    told, submit = module.Shared, cluster.Workers._submit
    submitted: list[Any] = []

    def submit_and_kill(self: cluster.Workers, request: cluster.Request, payload: Any) -> tuple[Any, Any]:
        worker, reference = submit(self, request, payload)
        if request.asked.action == TRAIN:
            submitted.append(worker)
            if len(submitted) == 7:
                ray.kill(worker)
        return worker, reference

    monkeypatch.setattr(cluster.Workers, "_submit", submit_and_kill)
    # No machine sees this path.
    monkeypatch.setattr(module, "Shared", lambda **values: told(**{**values, "path": str(tmp_path / "elsewhere")}))
    here = simulate(CONFIG, out=tmp_path / "process")
    there = simulate(on_ray(), out=tmp_path / "ray")
    assert len(submitted) > 15
    assert "A worker is lost; 2 are left" in caplog.text
    assert_same(here, there)


@pytest.mark.slow
def test_a_node_that_is_lost_between_rounds_changes_nothing(nodes: Any, tmp_path: Path) -> None:
    here = simulate(CONFIG, out=tmp_path / "process")
    last = nodes.worker_nodes and next(iter(nodes.worker_nodes))

    def lose(finished: Any) -> None:
        if finished.number == 1:
            nodes.remove_node(last, allow_graceful=False)

    there = simulate(on_ray(), out=tmp_path / "ray", observers=[EachRound(lose)])
    assert_same(here, there)
    assert json.loads((tmp_path / "ray" / "result.json").read_text())["rounds"] == 3
