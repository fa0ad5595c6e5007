from pathlib import Path

import pytest
import torch

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.simulations import ray_engine, simulate

CONFIG = RunConfig(
    rounds=3,
    strategy={"name": "FedAvg", "fraction_train": 0.5},
    local={"batch_size": 8, "momentum": 0.5, "lr": 0.001},
    simulation={"sites": 4, "partition": "shards:4", "device": "cpu"},
)


@pytest.mark.slow
def test_both_engines_make_the_same_head(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = simulate(CONFIG, out=tmp_path / "process")
    there = simulate(CONFIG.changed({"simulation": {"engine": "ray"}}), out=tmp_path / "ray")
    assert there.outcome.refused == here.outcome.refused == {}
    assert there.outcome.participants == here.outcome.participants
    assert there.outcome.kept_round == here.outcome.kept_round
    for name, value in here.model.head.state_dict().items():
        torch.testing.assert_close(there.model.head.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert [line.score for line in there.history] == [line.score for line in here.history]
    assert there.accuracy_by_site == here.accuracy_by_site
    assert there.withheld == here.withheld
    assert there.bytes_down == here.bytes_down


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedhead\[ray\]'"):
        simulate(CONFIG.changed({"simulation": {"engine": "ray"}}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_apps_of_ones_own_run_in_this_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from flwr.clientapp import ClientApp

    with pytest.raises(UserError, match="process"):
        simulate(CONFIG.changed({"simulation": {"engine": "ray"}}), apps={"site-0": ClientApp()}, out=tmp_path / "run")
