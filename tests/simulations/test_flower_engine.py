from pathlib import Path

import pytest
import torch

from fedhead.config import RunConfig
from fedhead.simulations import simulate

CONFIG = RunConfig(
    rounds=3,
    strategy={"name": "FedAvg", "fraction_train": 0.5},
    local={"batch_size": 8, "momentum": 0.5, "lr": 0.001},
    simulation={"sites": 4, "partition": "shards:4", "device": "cpu"},
)


@pytest.mark.slow
def test_flowers_engine_makes_the_same_head(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = simulate(CONFIG, out=tmp_path / "process")
    there = simulate(CONFIG.changed({"simulation": {"engine": "flower"}}), out=tmp_path / "flower")
    assert there.outcome.refused == here.outcome.refused == {}
    assert there.outcome.participants == here.outcome.participants
    assert there.outcome.kept_round == here.outcome.kept_round
    for name, value in here.model.head.state_dict().items():
        torch.testing.assert_close(there.model.head.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert [line.score for line in there.history] == [line.score for line in here.history]
    assert there.accuracy_by_site == here.accuracy_by_site
    assert there.withheld == here.withheld
    assert there.bytes_down == here.bytes_down
