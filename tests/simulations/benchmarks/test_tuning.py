import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.client.labelled_features import SiteRows
from fedhead.config import LocalConfig
from fedhead.data import load_samples
from fedhead.errors import FedheadError
from fedhead.simulations.benchmarks import tuning
from fedhead.simulations.benchmarks.measurement import OURS
from fedhead.simulations.benchmarks.tuning import Problem, Stored, app, check, difference, pictures, usual_loop

from ...common.backbones.test_hf import saved_text_model

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


def test_both_ways_give_one_tail_of_texts(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = ["pain", "cough", "fever", "a", "the", "in"]
    lines = [f"{' '.join(words[: 1 + row % 5])},{'ab'[row % 2]}" for row in range(12)]
    (tmp_path / "notes.csv").write_text("\n".join(["text,label", *lines]))
    samples = load_samples(f"csv:{tmp_path / 'notes.csv'}?text=text")
    backbone = load_backbone(f"hf:{saved_text_model(tmp_path / 'model', 'bert')}")
    sites = [SiteRows("a", np.arange(5)), SiteRows("b", np.arange(5, 12))]
    local = LocalConfig(batch_size=4, optimizer="sgd", lr=0.1)
    assert check(Problem(backbone, "lora:2@last:1", samples, sites, local), tmp_path) < tuning.TOLERANCE


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
    usual = [f"last:1, {sites} sites: usual loop" for sites in (2, 3)]
    assert printed["ratio"].keys() == {*usual, *(f"{name} without its frozen part" for name in usual)}
    assert {f"last:1, 3 sites: {OURS}", "last:1: storing activations, once"} <= printed["seconds"].keys()
    assert printed["setting"]["difference"]["last:1, SGD"] <= tuning.TOLERANCE
    refused = CliRunner().invoke(app, ["tuning", "--sites", "many"])
    assert "separated by commas" in str(refused.exception)
