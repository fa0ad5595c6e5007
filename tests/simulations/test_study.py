import csv
import io
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.simulations import simulate
from fedhead.simulations.study import Interval, Trial, parse_sweep, study

CONFIG = RunConfig(
    backbone="bundled:pixels", rounds=1, init="zeros", diagnose=False, simulation={"sites": 3, "min_rows": 0}
)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_grid_is_run_under_every_seed_and_summed_up(tmp_path: Path) -> None:
    ended: list[Trial] = []
    found = study(
        CONFIG,
        {"partition": ["iid", "shards:2"], "local.lr": [0.01, 0.1]},
        3,
        out=tmp_path / "study",
        on_trial=ended.append,
    )
    settings = [tuple(cell.settings.values()) for cell in found.cells]
    assert settings == [("iid", 0.01), ("iid", 0.1), ("shards:2", 0.01), ("shards:2", 0.1)]
    assert ended == found.trials
    assert [trial.seed for trial in found.cells[2].trials] == [0, 1, 2]
    assert not found.failed
    accuracies = [trial.summary["accuracy"] for trial in found.cells[2].trials]
    interval = found.cells[2].interval("accuracy")
    assert interval is not None
    assert interval.mean == pytest.approx(np.mean(accuracies))
    expected = stats.t.interval(0.95, 2, loc=np.mean(accuracies), scale=stats.sem(accuracies))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_features_are_extracted_once_for_all_runs_and_each_is_reproduced_by_its_folder(tmp_path: Path) -> None:
    found = study(CONFIG, {"partition": ["iid", "shards:3"]}, [4, 7], out=tmp_path / "study")
    assert sum(trial.summary["rows_extracted"] > 0 for trial in found.trials) <= 1
    last = found.trials[-1].summary
    folder = Path(last["run_dir"])
    again = simulate(RunConfig.from_toml(folder / "run.toml"), out=tmp_path / "again")
    assert (again.config.seed, again.config.simulation.partition) == (7, "shards:3")
    assert again.accuracy == last["accuracy"]


def test_a_run_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    found = study(CONFIG, {"sites": [3, 5000]}, 2, out=tmp_path / "study")
    assert [bool(trial.error) for trial in found.trials] == [False, False, True, True]
    assert "5000 sites cannot share" in found.failed[0].error
    assert found.cells[0].interval("accuracy") is not None
    assert found.cells[1].interval("accuracy") is None
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["sites"] for row in rows] == ["3", "3", "5000", "5000"]
    assert float(rows[1]["accuracy"]) == found.trials[1].summary["accuracy"]
    assert rows[3]["accuracy"] == ""
    assert rows[3]["error"]
    plain = found.to_dict()
    assert plain["cells"][0]["measures"]["accuracy"]["runs"] == 2
    assert plain["cells"][1]["measures"] == {}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"partiton": ["iid"]}, "partition"),
        ({"local.lr": [-1]}, "local.lr"),
        ({"seed": [1, 2]}, "--seeds"),
        ({"rounds": ["many"]}, "rounds"),
    ],
)
def test_a_sweep_of_nothing_is_refused_before_anything_runs(
    sweep: dict[str, list[object]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        study(CONFIG, {"head": ["linear"], **sweep}, out=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_sweeps_are_written_with_commas() -> None:
    assert parse_sweep(["partition=iid,dirichlet:0.3", "local.lr = 0.1, 1e-2", "multi_label=true"]) == {
        "partition": ["iid", "dirichlet:0.3"],
        "local.lr": [0.1, 0.01],
        "multi_label": [True],
    }
    for wrong in (["partition"], ["partition="], ["=iid"], ["head=linear,"], ["head=linear", "head=mlp:4"]):
        with pytest.raises(UserError):
            parse_sweep(wrong)


def test_one_run_has_a_mean_and_no_interval() -> None:
    assert Interval.of([0.5]) == Interval(0.5, None, None, 1)
