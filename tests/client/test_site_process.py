"""Real processes over loopback: coordinator and sites by their commands, killed, stopped and started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedhead.client.release.ledger import read_ledger
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.health import ask
from fedhead.server.provision import provision
from fedhead.server.status import read_status
from fedhead.simulations import simulate
from fedhead.simulations.partition import divide

pytestmark = pytest.mark.slow

SITES = ("ward-a", "ward-b", "ward-c")
CLASSES = tuple(f"digit-{label}" for label in range(10))
PATIENCE = 180.0
ROWS = 622
"""So that no site's last minibatch has fewer rows than its guard asks for: real sites train on none smaller."""


class Process:
    """A `fedhead` command with its log."""

    def __init__(self, folder: Path, name: str, *arguments: str, cwd: Path | None = None, **environment: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("a") as file:
            self.running = subprocess.Popen(
                [sys.executable, "-c", "from fedhead.cli import main; main()", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd or folder,
                env={**os.environ, "FEDHEAD_HOME": str(folder / f"home-{name}"), "OMP_NUM_THREADS": "1", **environment},
            )

    def said(self) -> str:
        return self.log.read_text()

    def until(self, words: str) -> None:
        wait_until(lambda: words in self.said() or self.running.poll() is not None, lambda: self.said())
        assert words in self.said(), self.said()

    def kill(self) -> None:
        self.running.kill()
        self.running.wait()

    def ended(self) -> int:
        try:
            return self.running.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None


def wait_until(condition: Callable[[], bool], why: Callable[[], str] = lambda: "") -> None:
    stop = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < stop, why()
        time.sleep(0.02)


class Federation:
    """A kit with the sites' data, and the processes that were started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.data = folder / "data"
        digits = load_samples("digits")
        for part, rows in zip(SITES, divide("iid", digits.labels[:ROWS], 3, 0).values(), strict=True):
            for row in rows:
                path = self.data / part / CLASSES[digits.labels[row]] / f"{row:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                digits.read(int(row)).save(path)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.port = int(listening.getsockname()[1])
        provision(folder / "kit", f"127.0.0.1:{self.port}", SITES)

    def server(self, out: str, *more: str, name: str = "server") -> Process:
        return self.start(
            name,
            *("server", "--kit", "kit/coordinator", "--classes", ",".join(CLASSES), "--out", out),
            *("--round-deadline", str(PATIENCE), *more),
        )

    def client(self, site: str, data: str = "", *more: str, cwd: Path | None = None) -> Process:
        kit = str(self.folder / "kit" / site)
        return self.start(site, "client", "--kit", kit, "--data", data or f"folder:{self.data / site}", *more, cwd=cwd)

    def start(self, name: str, *arguments: str, cwd: Path | None = None) -> Process:
        self.processes.append(Process(self.folder, name, *arguments, cwd=cwd))
        return self.processes[-1]

    def simulated(self, **config: object) -> dict[str, np.ndarray]:
        run = {"classes": CLASSES, "simulation": {"partition": "folder"}, **config}
        out = self.folder / "simulated"
        simulate(RunConfig(**run), f"folder:{self.data}", out=out)
        return load_file(out / "model.safetensors")

    def head(self, out: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / out / "model.safetensors")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    for process in made.processes:
        if process.running.poll() is None:
            process.kill()


def assert_same_head(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def rounds_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_three_sites_make_the_head_that_a_simulation_makes_and_stay_for_the_next_run(federation: Federation) -> None:
    server = federation.server("run", "--min-sites", "3")
    clients = [federation.client(site) for site in SITES]
    assert server.ended() == 0, server.said()
    assert_same_head(federation.head("run"), federation.simulated())
    assert all(line["sites"] == 3 for line in rounds_of(federation.folder / "run" / "metrics.jsonl")[1:])
    for client in clients:
        client.until("Nothing listens at")
    added = load_samples("digits")
    added.read(700).save(federation.data / "ward-b" / CLASSES[added.labels[700]] / "0700.png")
    again = federation.server("again", "--min-sites", "3", "--rounds", "2", name="server-2")
    assert again.ended() == 0, again.said()
    released = [one for one in read_ledger(federation.folder / "home-ward-b" / "ledger" / "ward-b.jsonl") if one.rows]
    assert len({one.run for one in released}) == 2
    assert len({one.row_set for one in released}) == 1
    second = federation.client("ward-b", f"folder:{federation.data / 'ward-a'}")
    assert second.ended() == 2
    assert "Another fedhead client is up" in second.said()
    for client in clients:
        assert "Connected again" in client.said()
        client.running.send_signal(signal.SIGTERM)
        assert client.ended() == 0
        assert client.said().splitlines()[-1].endswith("Stopping.")
        assert "Traceback" not in client.said()


def test_a_site_that_is_killed_in_a_round_comes_back_and_the_head_is_the_same(federation: Federation) -> None:
    rounds = ("--rounds", "12", "--set", "local.epochs=20")
    server = federation.server("run", "--min-sites", "3", *rounds)
    clients = {site: federation.client(site) for site in SITES}
    for round_number, site in ((3, "ward-a"), (8, "ward-c")):
        clients[site].until(f"train of round {round_number}")
        clients[site].kill()
        clients[site] = federation.client(site)
    assert server.ended() == 0, server.said()
    assert_same_head(federation.head("run"), federation.simulated(rounds=12, local={"epochs": 20}))
    assert all(not line["dropped"] for line in rounds_of(federation.folder / "run" / "metrics.jsonl"))


def test_a_coordinator_that_is_killed_goes_on_with_the_sites_that_stayed(federation: Federation) -> None:
    rounds = ("--rounds", "12", "--set", "local.epochs=20")
    killed = federation.server("run", "--min-sites", "3", *rounds)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        health = f"127.0.0.1:{listening.getsockname()[1]}"
    clients = [federation.client(site) for site in SITES[1:]]
    clients.append(federation.client(SITES[0], "", "--health", health))
    metrics = federation.folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4, killed.said)
    assert ask(health) == "SERVING"
    killed.kill()
    for client in clients:
        client.until("Nothing listens at")
    wait_until(lambda: ask(health) == "NOT_SERVING", clients[-1].said)
    resumed = federation.start("resumed", "server", "--kit", "kit/coordinator", "--resume", "run")
    assert resumed.ended() == 0, resumed.said()
    assert_same_head(federation.head("run"), federation.simulated(rounds=12, local={"epochs": 20}))
    assert [line["number"] for line in rounds_of(metrics)] == list(range(13))


SLOW_DATA = """
import time
from dataclasses import replace
from pathlib import Path

from fedhead.data import load_samples


def digits():
    samples = load_samples("digits")

    def read(row):
        time.sleep(0.002)
        with Path("read.txt").open("a") as file:
            file.write(f"{row}\\n")
        return samples.read(row)

    return replace(samples, read=read)
"""


def test_a_site_that_is_killed_while_it_extracts_goes_on_at_the_block(federation: Federation) -> None:
    (federation.folder / "slow.py").write_text(SLOW_DATA)
    classes = ",".join(map(str, range(10)))
    server = federation.server("run", "--classes", classes, "--rounds", "1", "--min-sites", "1")
    site = federation.client("ward-a", "python:slow:digits")
    home = federation.folder / "home-ward-a"

    def first_block_is_safe() -> bool:
        metas = list(home.glob("features/*.partial/meta.json"))
        return bool(metas) and json.loads(metas[0].read_text())["done"] >= 1024

    wait_until(first_block_is_safe, site.said)
    site.kill()
    assert not list(home.glob("features/*/meta.json")) or list(home.glob("features/*.partial"))
    read = federation.folder / "read.txt"
    before = len(read.read_text().splitlines())
    site = federation.client("ward-a", "python:slow:digits")
    assert server.ended() == 0, server.said()
    after = [int(line) for line in read.read_text().splitlines()[before:]]
    assert min(after) == 1024
    assert sorted(after) == list(range(1024, 1797))


def test_a_site_that_is_stopped_while_it_extracts_ends_at_once_and_says_so(federation: Federation) -> None:
    (federation.folder / "slow.py").write_text(SLOW_DATA.replace("0.002", "0.2"))
    classes = ",".join(map(str, range(10)))
    server = federation.server("run", "--classes", classes, "--rounds", "1", "--min-sites", "1")
    site = federation.client("ward-a", "python:slow:digits")
    wait_until((federation.folder / "read.txt").exists, site.said)
    site.running.send_signal(signal.SIGTERM)
    assert site.ended() == 0
    assert server.ended() == 1
    assert "was stopped meanwhile" in server.said()


def test_a_person_is_asked_and_what_nobody_approves_stays(federation: Federation) -> None:
    server = federation.server("run", "--min-sites", "1", "--rounds", "1")
    site = federation.client("ward-a", "", "--approve")
    assert server.ended() == 1
    assert "only after a person there has approved it" in server.said()
    site.until("without a terminal")
    ledger = federation.folder / "home-ward-a" / "ledger" / "ward-a.jsonl"
    # Only that the site can take part has left, which rests on no row.
    assert all((entry.rows, entry.classes) == (0, {}) for entry in read_ledger(ledger))


def test_below_its_quorum_a_run_waits_and_ends_by_its_deadline_and_goes_on_later(federation: Federation) -> None:
    rounds = ("--rounds", "12", "--set", "local.epochs=100")
    # Longer than it takes until a site that was killed counts as gone.
    deadline = ("--round-deadline", "50")
    server = federation.server("run", "--min-sites", "2", *rounds, *deadline)
    clients = {site: federation.client(site) for site in SITES}
    for client in clients.values():
        client.until("train of round")
    # The run begins with two sites, so that the third may begin in a later round.
    first = clients[SITES[0]]
    wait_until(lambda: re.search(r"train of round ([3-9]|1\d)", first.said()) is not None, first.said)
    for site in SITES[1:]:
        clients[site].kill()
    folder = federation.folder / "run"
    wait_until(lambda: read_status(folder)["state"] == "waiting", server.said)
    assert "the run needs 2 or more" in read_status(folder)["message"]
    assert server.ended() == 1
    said = " ".join(server.said().split())
    assert "Waiting: " in said
    assert "This did not change within 50 s" in said
    assert "go on with --resume" in said
    status = read_status(folder)
    assert (status["state"], status["sites"]["ward-a"]["standing"]) == ("failed", "ready")
    assert {status["sites"][site]["standing"] for site in SITES[1:]} == {"lost"}
    done = len(rounds_of(folder / "metrics.jsonl"))
    assert done >= 2
    for site in SITES[1:]:
        federation.client(site)
    resumed = federation.start("resumed", "server", "--kit", "kit/coordinator", "--resume", "run")
    assert resumed.ended() == 0, resumed.said()
    assert [line["number"] for line in rounds_of(folder / "metrics.jsonl")] == list(range(13))
