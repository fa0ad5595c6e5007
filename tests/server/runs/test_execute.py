import fcntl
import os
from pathlib import Path
from typing import NoReturn

import pytest

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.server.app import Preparation, prepare
from fedhead.server.observer import Observer, Step
from fedhead.server.runs.execute import RunParts, execute
from fedhead.server.runs.history import Outcome
from fedhead.server.runs.record import read_journal

CONFIG = RunConfig(backbone="bundled:pixels", classes=("cat", "dog"), rounds=3)


class Watch(Observer):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self.events.append("started")

    def on_step(self, step: Step, server_round: int) -> None:
        self.events.append(step)

    def on_finished(self, outcome: Outcome) -> None:
        self.events.append("finished")

    def on_failed(self, error: BaseException) -> None:
        self.events.append(f"failed: {error}")


def failing(prepared: Preparation, parts: RunParts) -> NoReturn:
    parts.observer.on_step("describe", 0)
    raise FedheadError("No site came.")


@pytest.mark.parametrize("simulated", [True, False])
def test_only_a_network_run_keeps_its_folder_when_it_fails_without_a_head(simulated: bool, tmp_path: Path) -> None:
    out, watch = tmp_path / "run", Watch()
    with pytest.raises(FedheadError, match="No site came"):
        execute(CONFIG, prepare, failing, simulated=simulated, out=out, observers=[watch])
    assert watch.events == ["started", "describe", "failed: No site came."]
    assert out.exists() != simulated
    assert not (out / "result.json").exists()


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_run_is_recorded_as_interrupted(ending: BaseException, tmp_path: Path) -> None:
    def stopped(prepared: Preparation, parts: RunParts) -> NoReturn:
        parts.observer.on_step("describe", 0)
        raise ending

    with pytest.raises(type(ending)):
        execute(CONFIG, prepare, stopped, simulated=False, out=tmp_path / "run")
    journal = read_journal(tmp_path / "run")
    assert journal is not None
    assert (journal.status, journal.error) == ("interrupted", "")


def test_a_resumed_run_that_fails_keeps_its_folder_and_takes_its_own_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FedheadError):
        execute(CONFIG, prepare, failing, simulated=False, out=out)
    with pytest.raises(UserError, match="rounds would change"):
        execute(CONFIG.changed({"rounds": 9}), prepare, failing, simulated=False, out=out, resume=True)
    with pytest.raises(FedheadError, match="No site came"):
        execute(None, prepare, failing, simulated=True, out=out, resume=True)
    assert RunConfig.from_toml(out / "run.toml") == CONFIG
    with pytest.raises(UserError, match="needs the folder"):
        execute(None, prepare, failing, simulated=True, resume=True)


def test_a_run_that_cannot_be_prepared_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs classes"):
        execute(RunConfig(), prepare, failing, simulated=False, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_failing_baseline_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    def baseline(prepared: Preparation) -> NoReturn:
        raise UserError("There is no such backbone.")

    watch = Watch()
    with pytest.raises(UserError, match="no such backbone"):
        execute(CONFIG, prepare, failing, simulated=True, out=tmp_path / "run", observers=[watch], baseline=baseline)
    assert watch.events == ["failed: There is no such backbone."]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(FedheadError, match="another process"):
            execute(CONFIG, prepare, failing, simulated=True, out=out)
    finally:
        os.close(handle)
    assert not (out / "run.toml").exists()
