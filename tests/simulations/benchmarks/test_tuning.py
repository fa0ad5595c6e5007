import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.client.labelled_features import SiteRows
from fedhead.config import LocalConfig
from fedhead.errors import FedheadError
from fedhead.simulations.benchmarks import tuning
from fedhead.simulations.benchmarks.measurement import OURS
from fedhead.simulations.benchmarks.tuning import Problem, Stored, app, check, difference, pictures, usual_loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tune", ["last:1", "lora:2"])
def test_both_ways_give_one_tail(tmp_path: Path, tune: str) -> None:
    if tune.startswith("lora"):
        pytest.importorskip("peft")
    sites = [SiteRows("a", np.arange(5)), SiteRows("b", np.arange(5, 12))]
    backbone = load_backbone("bundled:glyphnet")
    problem = Problem(backbone, tune, pictures(12), sites, LocalConfig(batch_size=4, optimizer="sgd", lr=1e-2))
    assert check(problem, tmp_path) < tuning.TOLERANCE
    stored = Stored(backbone, tune, problem.samples, tmp_path, "float32")
    _, trained = usual_loop(problem, stored.tail)
    _, fewer = usual_loop(Problem(backbone, tune, problem.samples, sites[:1], problem.local), stored.tail)
    with pytest.raises(FedheadError, match="differ by"):
        difference(fewer, trained, problem.head(stored.tail).trainable(), tuning.AFTER_ADAMW)


def test_other_parameters_are_found_out() -> None:
    one = {"weight": torch.zeros(3)}
    with pytest.raises(FedheadError, match="names or shapes"):
        difference({"weight": torch.ones(2)}, one, one, 1.0)
    with pytest.raises(FedheadError, match="differ by"):
        difference(one, one, one, 1.0)


def test_the_command_prints_one_object() -> None:
    arguments = ["tuning", "--backbone", "bundled:glyphnet", "--weights", "default", "--sites", "2,3", "--rows", "5"]
    done = CliRunner().invoke(app, [*arguments, "--only", "last:1", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["ratio"].keys() == {"last:1, 2 sites: usual loop", "last:1, 3 sites: usual loop"}
    assert {f"last:1, 3 sites: {OURS}", "last:1: storing activations, once"} <= printed["seconds"].keys()
    assert printed["setting"]["difference"]["last:1, SGD"] <= tuning.TOLERANCE
    refused = CliRunner().invoke(app, ["tuning", "--sites", "many"])
    assert "separated by commas" in str(refused.exception)
