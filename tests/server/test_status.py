"""How a run stands, told by its folder; and the coordinator's command, as processes."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from fedhead.backbones import load_backbone
from fedhead.cli.status import run_tables
from fedhead.config import RunConfig
from fedhead.data import held_out, load_samples
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.flower.fleet_client import FleetClient
from fedhead.server.network.superlink import SuperLink
from fedhead.server.observer import Phase, SiteState
from fedhead.server.runs.history import Round
from fedhead.server.runs.record import read_rounds
from fedhead.server.status import FILE, RunStatus, read_status
from fedhead.simulations import simulate
from fedhead.sums.segmentation import SegmentationSums


@pytest.fixture
def link() -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0) as link:
        yield link


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def line(number: int, **dropped: str) -> Round:
    return Round(number, sites=2, seconds=0.1, bytes_down=10, bytes_up=20, loss=0.5, score=0.9, dropped=dropped)


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
    lines = [json.dumps(asdict(line(number))) for number in range(3)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"number": 3, "sec']))
    status = RunStatus(link)
    status.on_started(RunConfig(), folder)
    status.on_round(line(2))
    status.on_failed(KeyboardInterrupt())
    values = read_status(folder)
    assert [entry["number"] for entry in values["history"]] == [0, 1, 2]
    assert values["history"][2]["score"] == 0.9
    assert values["state"] == "interrupted"


@pytest.mark.parametrize("phase", ["open", "mask", "agree", "unmask"])
def test_each_exchange_of_a_secure_sum_is_shown(phase: Phase, link: SuperLink, folder: Path) -> None:
    status = RunStatus(link)
    status.on_started(RunConfig(rounds=2), folder)
    status.on_step("train", 2)
    status.on_phase(phase)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(run_tables(status.snapshot()))
    assert f"round 2 of 2, secure sum: {phase}" in console.export_text()
    status.on_step("evaluate", 2)
    console.print(run_tables(status.snapshot()))
    assert "secure sum" not in console.export_text()
    status.on_failed(FedheadError("The test ends."))


def test_the_score_of_an_evaluation_at_the_end_is_in_the_table(link: SuperLink, folder: Path) -> None:
    status = RunStatus(link)
    config = RunConfig(task="segmentation", backbone="torchvision:mobilenet_v2", classes=("a", "b"))
    status.on_started(config, folder)
    first = replace(line(0), score=None)
    status.on_round(first)
    sums = SegmentationSums.of_item(np.array([[90, 10], [0, 40]]), 0.1)
    outcome: Any = SimpleNamespace(history=[first], kept_round=0, sites={"ward": sums + sums})
    status.on_finished(outcome)
    values = read_status(folder)
    assert values["score"] == pytest.approx((90 / 100 + 40 / 50) / 2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run_tables(values))
    assert "0.850" in console.export_text()


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
    (folder / "result.json").touch()
    assert told(pid=ended.pid) == "finished"
    assert told() == "running"


def test_a_folder_without_a_status_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no status\.json"):
        read_status(tmp_path)
    whole = {
        "state": "running",
        "message": "",
        "host": "h",
        "pid": 1,
        "process_started": "",
        "started": 0,
        "updated": 0,
    }
    (tmp_path / FILE).write_text(json.dumps(whole))
    assert read_status(tmp_path)["sites"] == {}
    damaged = [{"pid": -1}, {"pid": 10**400}, {"sites": {"a": []}}, {"history": [{"number": 1}]}, {"state": "well"}]
    for text in ("", "[]", "{}", *(json.dumps({**whole, **wrong}) for wrong in damaged)):
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
    out = tmp_path / "asked"
    with started(tmp_path, *server(free_port(), out, *waiting, "--stopped-ok")) as running:
        until(lambda: state_of(out) == "waiting")
        subprocess.run([*COMMAND, "stop", str(out)], env=environment(tmp_path), check=True, capture_output=True)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert state_of(out) == "interrupted"
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


@pytest.mark.slow
def test_one_coordinator_serves_a_queue_and_a_run_in_it_is_stopped(tmp_path: Path) -> None:
    port, queue = free_port(), tmp_path / "queue"
    queue.mkdir()
    (queue / "a.toml").write_text("rounds = 1\nmin_sites = 3\n")
    (queue / "b.toml").write_text('rounds = 2\nbackbone = "bundled:pixels"\nmin_sites = 1\n')
    (queue / "c.toml").write_text('rounds = 1\nmin_sites = 1\ninit = "ridge"\n')
    command = ["server", "--insecure", "--port", str(port), "--queue", str(queue), "--classes", CLASSES]
    with ExitStack() as stack:
        client = ["client", "--insecure", "--coordinator", f"127.0.0.1:{port}", "--site", "a", "--data", "digits"]
        site = stack.enter_context(started(tmp_path / "a", *client))
        running = stack.enter_context(started(tmp_path, *command))
        until(lambda: state_of(queue / "runs" / "a") == "waiting")
        stopped = subprocess.run(
            [*COMMAND, "stop", str(queue / "runs" / "a")], env=environment(tmp_path), capture_output=True, text=True
        )
        assert (stopped.returncode, "--resume" in stopped.stdout) == (0, True), stopped
        until(lambda: (queue / "done" / "c.toml").exists() or running.poll() is not None)
        assert [site.poll(), running.poll()] == [None, None]
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 143, said
    assert "moved back into the queue" in (queue / "failed" / "a.txt").read_text()
    assert sorted(path.name for path in (queue / "done").iterdir()) == ["b.toml", "c.toml"]
    assert [read_status(queue / "runs" / name)["state"] for name in "abc"] == ["interrupted", "finished", "finished"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_sites_train_on_the_minibatches_of_simulated_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site's training rows leave 1 to 4 for a last minibatch, which no site trains on by themselves."""
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "simulated"))
    whole = load_samples("digits")
    images = np.stack([np.asarray(whole.read(row)) for row in range(1000)])
    np.savez(tmp_path / "all.npz", images=images, labels=whole.labels[:1000].astype(str))
    samples = load_samples(f"npz:{tmp_path / 'all.npz'}")
    out = held_out(FeatureStore.open(load_backbone("bundled:glyphnet"), samples).keys, 0.2)
    rows, start = [], 0
    for left in (1, 3, 4):
        stop = next(n for n in range(start + 200, 1000) if (~out[start:n]).sum() % 32 == left)
        rows.append(np.arange(start, stop))
        start = stop
    for number, own in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", images=images[own], labels=whole.labels[own].astype(str))
    config = RunConfig(init="zeros", rounds=3, local={"lr": 0.5}, diagnose=False)
    simulated = simulate(config, samples, rows, out=tmp_path / "simulated-run")
    unguarded = config.changed({"simulation": {"min_class_count": 0}})
    before = simulate(unguarded, samples, rows, out=tmp_path / "unguarded-run")
    port, real = free_port(), tmp_path / "real"
    with ExitStack() as stack:
        for number in range(3):
            client = ["client", "--insecure", "--coordinator", f"127.0.0.1:{port}", "--site", f"site-{number}"]
            data = ["--data", f"npz:{tmp_path / f'{number}.npz'}", "--device", "cpu"]
            stack.enter_context(started(tmp_path / str(number), *client, *data))
        given = [
            "--backbone",
            "bundled:glyphnet",
            "--init",
            "zeros",
            "--rounds",
            "3",
            "--set",
            "local.lr=0.5",
            "--no-diagnose",
            "--min-sites",
            "3",
        ]
        running = stack.enter_context(started(tmp_path / "home", *server(port, real, *given)))
        said, _ = running.communicate(timeout=400)
    assert running.returncode == 0, said
    losses = [line.loss for line in simulated.history]
    assert [line.loss for line in read_rounds(real)] == pytest.approx(losses, rel=1e-6)
    assert [line.loss for line in before.history][1:] != pytest.approx(losses[1:], rel=1e-4)
