import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedhead.errors import FedheadError
from fedhead.simulations.benchmarks.measurement import OURS
from fedhead.simulations.benchmarks.problem import Problem, own_home
from fedhead.simulations.benchmarks.rounds import app, batched_product, measure, plain_loop

SMALL = Problem(sites=4, rows=20, features=32, rounds=3)


def test_all_that_is_compared_makes_one_head() -> None:
    measured = measure(SMALL, 1, ray=False, peers=True)
    assert {OURS, "batched product", "PyTorch loop"} <= measured.seconds.keys()
    assert measured.ratio.keys() == measured.seconds.keys() - {OURS}
    assert measured.left_out["flower-ray"]


def test_another_head_is_found_out(tmp_path: Path) -> None:
    with own_home():
        samples = SMALL.samples()
        tables = SMALL.tables(samples)
        result = SMALL.simulate(samples, tmp_path / "run")
        for train in (batched_product, plain_loop):
            weight, bias = train(tables)
            tables.check("It", (weight, bias), result)
            with pytest.raises(FedheadError, match="another weight"):
                tables.check("It", (weight + 0.01 * torch.eye(10, 32) * weight.norm(), bias), result)
        fewer = batched_product(replace(tables, problem=replace(SMALL, rounds=2)))
        with pytest.raises(FedheadError, match="differs by"):
            tables.check("It", fewer, result)


def test_the_command_prints_one_object() -> None:
    arguments = ["rounds", "--sites", "3", "--rows", "12", "--features", "16", "--rounds", "1", "--repeats", "1"]
    done = CliRunner().invoke(app, [*arguments, "--no-ray", "--no-peers", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["seconds"].keys() == {OURS, "batched product"}
    assert printed["ratio"]["batched product"] > 0
    assert (printed["setting"]["sites"], printed["setting"]["rows"]) == (3, 12)


@pytest.mark.slow
def test_flowers_ray_engine_makes_the_same_head() -> None:
    pytest.importorskip("ray")
    assert "flower-ray" in measure(SMALL, 1, ray=True, peers=False).seconds
