import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks import scaling, time_to_accuracy
from fedhead.simulations.benchmarks.measurement import OURS
from fedhead.simulations.benchmarks.problem import Problem
from fedhead.simulations.benchmarks.traffic import app


def test_growth_is_the_exponent() -> None:
    sizes = [10, 100, 1000]
    assert scaling.growth(sizes, [3e-3 * size**0.7 for size in sizes]) == pytest.approx(0.7)


def test_scaling_times_rounds_of_every_size() -> None:
    base = Problem(sites=2, rows=10, features=16, rounds=3)
    measured = scaling.measure(base, {"sites": (2, 4), "rows": (5, 10), "features": (8, 16)}, 1)
    assert measured.seconds.keys() == {"2 sites", "4 sites", "5 rows", "10 rows", "8 features", "16 features"}
    assert measured.ratio.keys() == {"growth with sites", "growth with rows", "growth with features"}
    assert np.isfinite(list(measured.ratio.values())).all()


def test_traffic_of_whole_models_is_the_most() -> None:
    done = CliRunner().invoke(app, ["traffic", "--sites", "3", "--rounds", "2", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    counted = printed["setting"]["bytes_per_site"]
    assert counted["full-model FedAvg"] > counted["head-only FedAvg"]
    assert printed["ratio"]["full-model FedAvg"] == pytest.approx(
        counted["full-model FedAvg"] / counted[OURS], rel=1e-3
    )
    # The head of 192 features and 10 classes, down and up, in each of two rounds, and what comes before and after.
    assert counted["head-only FedAvg"] > 2 * 2 * 10 * 193 * 4


def test_both_reach_the_accuracy_from_raw_images() -> None:
    train, test = time_to_accuracy.digits()
    assert (len(train), len(test)) == (1437, 360)
    done = CliRunner().invoke(app, ["time-to-accuracy", "--rounds", "2", "--sites", "3", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    accuracy = printed["setting"]["accuracy"]
    assert accuracy[OURS] >= printed["setting"]["target"] - 5e-5
    assert printed["setting"]["recipe_rounds"] == 2
    assert np.isfinite(list(printed["ratio"].values())).all()
