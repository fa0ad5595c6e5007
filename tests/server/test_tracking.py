import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.server.tracking import Tracked, find_tracker, trackers
from fedhead.simulations import simulate


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_every_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    told = CliRunner().invoke(app, ["simulate", "--rounds", "2", "--track", "tensorboard", "--out", str(run)])
    assert told.exit_code == 0, told.output
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("score", "loss", "bytes_up", "sites"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["number"], pytest.approx(line[name])) for line in lines_of(run)]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]


class Broken(Observer):
    def on_round(self, finished: Round) -> None:
        self.told = [*getattr(self, "told", []), finished.number]
        raise OSError("the tracking server is gone")


def test_a_tracker_that_fails_never_ends_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    result = simulate(RunConfig(rounds=2), sites=2, out=tmp_path / "run", observers=[Tracked("mine", broken)])
    assert [line.number for line in result.history] == [0, 1, 2]
    assert broken.told == [0]
    assert caplog.text.count("The tracker mine failed and receives nothing more: the tracking server is gone") == 1


def test_a_function_of_ones_own_is_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tracker.py").write_text(
        "from fedhead.server.observer import EachRound\n"
        "seen = []\n"
        "def make():\n"
        "    return EachRound(lambda finished: seen.append(finished.number))\n"
        "def nothing():\n"
        "    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    tracked = Tracked("own", find_tracker("python:own_tracker:make"))
    simulate(RunConfig(rounds=1), sites=2, out=tmp_path / "run", observers=[tracked])
    assert sys.modules["own_tracker"].seen == [0, 1]
    with pytest.raises(UserError, match="must return a fedhead"):
        find_tracker("python:own_tracker:nothing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "Did you mean 'tensorboard'"),
        ("python:no_such_module:make", "cannot be imported: No module named 'no_such_module'"),
        ("python:json:no_such_function", "has no function 'no_such_function'"),
        ("python:", "Expected python:MODULE:FUNCTION"),
    ],
)
def test_what_is_no_tracker_is_told_before_the_run(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_tracker(name)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [("mlflow", "mlflow", "pip install mlflow-skinny"), ("tensorboard", "torch.utils.tensorboard", r"fedhead\[track")],
)
def test_a_missing_package_names_its_command(
    name: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=command):
        trackers[name]()


def test_mlflow_holds_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked = Tracked("mlflow", find_tracker("mlflow"))
    simulate(RunConfig(rounds=2), sites=2, out=tmp_path / "run", observers=[tracked])
    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    history = client.get_metric_history(found.info.run_id, "score")
    assert [one.value for one in history] == [line["score"] for line in lines_of(tmp_path / "run")]
    assert found.info.status == "FINISHED"
