"""How a run stands, told by its folder; and the coordinator's command, as processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.flower import FleetClient
from fedhead.server.history import Round
from fedhead.server.observer import SiteState
from fedhead.server.status import FILE, RunStatus, read_status
from fedhead.server.superlink import SuperLink


@pytest.fixture
def link() -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0) as link:
        yield link


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def line(number: int, **dropped: str) -> Round:
    return Round(number, sites=2, seconds=0.1, bytes_down=10, bytes_up=20, loss=0.5, accuracy=0.9, dropped=dropped)


def test_sites_and_rounds_stand_in_the_folder_from_start_to_end(link: SuperLink, folder: Path) -> None:
    site = FleetClient(f"127.0.0.1:{link.port}", ec.generate_private_key(ec.SECP256R1()), None, 0, "ward")
    site.activate(20.0)
    status = RunStatus(link)
    status.on_started(RunConfig(rounds=3), folder)
    assert read_status(folder)["state"] == "running"
    status.on_sites({"ward": SiteState("ready", rows=50, weights=1.0), "gone": SiteState("lost", reason="no answer")})
    status.on_step("train", 1)
    status.on_round(line(1, gone="no answer"))
    status.on_round(line(2))
    status.on_waiting("1 of 2 sites are connected.")
    status.on_failed(FedheadError("The quorum was lost."))
    values = read_status(folder)
    assert (values["state"], values["message"], values["rounds"]) == ("failed", "The quorum was lost.", 3)
    ward, gone = values["sites"]["ward"], values["sites"]["gone"]
    assert (ward["connected"], ward["rows"], ward["weights"], ward["standing"]) == (True, 50, 1.0, "ready")
    assert (gone["connected"], gone["standing"], gone["reason"]) == (False, "lost", "no answer")
    assert time.time() - ward["seen"] < 3600
    assert [entry["number"] for entry in values["history"]] == [1, 2]
    assert values["history"][0]["dropped"] == {"gone": "no answer"}


def test_a_resumed_run_keeps_the_rounds_that_were_complete(link: SuperLink, folder: Path) -> None:
    lines = [json.dumps({"number": number, "seconds": 1.0}) for number in range(3)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"number": 3, "sec']))
    status = RunStatus(link)
    status.on_started(RunConfig(), folder)
    status.on_round(line(2))
    status.on_failed(KeyboardInterrupt())
    values = read_status(folder)
    assert [entry["number"] for entry in values["history"]] == [0, 1, 2]
    assert values["history"][2]["accuracy"] == 0.9
    assert values["state"] == "interrupted"


def test_a_process_that_ended_without_a_word_is_dead(link: SuperLink, folder: Path) -> None:
    status = RunStatus(link)
    status.on_started(RunConfig(), folder)
    status.on_failed(FedheadError("x"))
    values = json.loads((folder / FILE).read_text())
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()

    def told(**changes: object) -> str:
        (folder / FILE).write_text(json.dumps({**values, "state": "running", "message": "", **changes}))
        return str(read_status(folder)["state"])

    assert told() == "running"
    assert told(pid=ended.pid) == "dead"
    assert told(process_started="1") == "dead"
    assert told(host="elsewhere", updated=time.time()) == "running"
    assert told(host="elsewhere", updated=time.time() - 120) == "dead"
    assert told(state="finished", pid=ended.pid) == "finished"


def test_a_folder_without_a_status_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no status\.json"):
        read_status(tmp_path)
    for text in ("", "[]", "{}", '{"state": "running"}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match="not a status that fedhead server wrote"):
            read_status(tmp_path)


# The command.

COMMAND = [sys.executable, "-c", "from fedhead.cli import main; main()"]
CLASSES = ",".join(str(number) for number in range(10))


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "FEDHEAD_HOME": str(home), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def started(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def server(port: int, out: Path, *more: str) -> list[str]:
    where = ["server", "--insecure", "--port", str(port), "--out", str(out)]
    return [*where, "--classes", CLASSES, "--backbone", "bundled:pixels", *more]


def until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < stop, "it never came about"
        time.sleep(0.1)


def state_of(out: Path) -> str:
    return str(read_status(out)["state"]) if (out / FILE).exists() else ""


@pytest.mark.slow
def test_a_run_over_processes_succeeds_and_says_so(tmp_path: Path) -> None:
    port, health, out = free_port(), free_port(), tmp_path / "run"
    with ExitStack() as stack:
        for name in ("a", "b"):
            client = ["client", "--insecure", "--coordinator", f"127.0.0.1:{port}", "--site", name, "--data", "digits"]
            stack.enter_context(started(tmp_path / name, *client))
        arguments = server(port, out, "--rounds", "2", "--min-sites", "2", "--health", f"127.0.0.1:{health}")
        running = stack.enter_context(started(tmp_path, *arguments))
        said, _ = running.communicate(timeout=180)
    assert running.returncode == 0, said
    assert "finished" in said
    values = read_status(out)
    assert values["state"] == "finished"
    assert [entry["number"] for entry in values["history"]] == [0, 1, 2]
    assert sorted(values["sites"]) == ["a", "b"]
    assert (out / "model.safetensors").exists()
    shown = subprocess.run([*COMMAND, "status", str(out)], env=environment(tmp_path), capture_output=True, text=True)
    assert (shown.returncode, "ready" in shown.stdout) == (0, True)


@pytest.mark.slow
def test_exit_statuses_tell_how_a_run_ended(tmp_path: Path) -> None:
    waiting = ("--min-sites", "3", "--round-deadline", "600")
    for number, status, state in ((signal.SIGTERM, 143, "interrupted"), (signal.SIGINT, 130, "interrupted")):
        out = tmp_path / f"stopped-{number}"
        with started(tmp_path, *server(free_port(), out, *waiting)) as running:
            until(lambda out=out: state_of(out) == "waiting")
            running.send_signal(number)
            said, _ = running.communicate(timeout=60)
        assert running.returncode == status, said
        assert state_of(out) == state
    out = tmp_path / "killed"
    with started(tmp_path, *server(free_port(), out, *waiting)) as running:
        until(lambda: state_of(out) == "waiting")
        running.kill()
        running.wait()
    shown = subprocess.run([*COMMAND, "status", str(out)], env=environment(tmp_path), capture_output=True, text=True)
    assert (shown.returncode, "ended without a word" in " ".join(shown.stdout.split())) == (1, True)
    with started(
        tmp_path, *server(free_port(), tmp_path / "alone", "--min-sites", "2", "--round-deadline", "1")
    ) as run:
        said, _ = run.communicate(timeout=120)
    assert (run.returncode, "the run needs 2 or more" in " ".join(said.split())) == (1, True), said
    with started(tmp_path, *server(1, tmp_path / "mistaken", "--backbone", "bundled:nothing")) as run:
        assert run.wait(timeout=120) == 2
