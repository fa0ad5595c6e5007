"""Secure summation by real processes over TLS: sites are killed after each of its four exchanges, and start again."""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.client.settings import Kit
from fedhead.protocol.actions import AGREE, OPEN, TRAIN, UNMASK
from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.server.provision import provision
from fedhead.server.runs.record import RunRecord
from fedhead.server.status import read_status
from fedhead.simulations.benchmarks.problem import CLASSES, Problem
from fedhead.simulations.benchmarks.processes import CLIENT, FEDHEAD, answers, environment, free_ports

SECONDS = 500.0
COORDINATOR = 99
PROBLEM = Problem(sites=5, rows=60, features=64, rounds=4)
NAMES = [f"site-{number}" for number in range(PROBLEM.sites)]
KILLED = {1: OPEN, 2: TRAIN, 3: AGREE, 4: UNMASK}
"""The exchange of which each site's process does not survive the first reply."""


class Federation:
    """A coordinator and five sites with a roster, which demand masks."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (self.port,) = free_ports(1)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        kit = home / "kit"
        provision(kit, f"127.0.0.1:{self.port}", NAMES)
        if not (kit / "coordinator" / "roster.toml").is_file():
            self.add_roster(kit)
        for name in NAMES:
            settings = kit / name / "site.toml"
            settings.write_text(settings.read_text().replace('require = "none"', 'require = "secure-sum"'))

    def add_roster(self, kit: Path) -> None:
        keys = {name: SiteKeys(Kit(kit / name).key, SiteKeys.generate().sealing) for name in NAMES}
        roster = signed_roster(
            ec.generate_private_key(ec.SECP256R1()), {name: own.member for name, own in keys.items()}
        )
        for name in ["coordinator", *NAMES]:
            roster.save(kit / name / "roster.toml")
        for name, own in keys.items():
            path = kit / name / "sealing.key"
            path.write_bytes(base64.b64encode(own.sealing))
            path.chmod(0o600)

    def start(self, number: int) -> None:
        if number == COORDINATOR:
            command = [*FEDHEAD, "server", "--kit", str(self.home / "kit" / "coordinator"), "--secure-sum"]
            command += ["--out", str(self.home / "run"), "--classes", ",".join(str(each) for each in range(CLASSES))]
            command += ["--rounds", str(PROBLEM.rounds), "--min-sites", "5", "--round-deadline", str(SECONDS)]
        else:
            command = [*CLIENT, "--kit", str(self.home / "kit" / NAMES[number])]
        with self.log(number).open("a") as log:
            self.processes[number] = subprocess.Popen(
                command,
                env=environment(PROBLEM, self.home, number),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self, number: int) -> int:
        """How often a site has answered in the exchange that its process does not survive."""
        return (
            self.log(number)
            .read_text()
            .count(f"{KILLED[number]}{' of round' if KILLED[number] == TRAIN else ': done'}")
        )

    def log(self, number: int) -> Path:
        return self.home / f"{number}.log"

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills process groups")
def test_sites_killed_after_each_exchange_start_again_and_the_run_ends_well(
    federation: Federation,
) -> None:
    federation.start(COORDINATOR)
    stop = time.monotonic() + SECONDS
    while not answers(federation.port):
        assert time.monotonic() < stop, federation.log(COORDINATOR).read_text()
        time.sleep(0.1)
    for number in range(PROBLEM.sites):
        federation.start(number)
    left, phases = list(KILLED), set()
    known: dict[str, Any] = {}
    before = 0
    while federation.processes[COORDINATOR].poll() is None:
        assert time.monotonic() < stop, federation.log(COORDINATOR).read_text()[-3000:]
        if (federation.home / "run" / "status.json").is_file():
            known = read_status(federation.home / "run")
            phases.add(known.get("phase", ""))
        # One at a time: five sites may lose one in a sum.
        if left and sum(site["connected"] for site in known.get("sites", {}).values()) == PROBLEM.sites:
            done = federation.answers(left[0])
            if done > before and done:
                number = left.pop(0)
                federation.processes[number].kill()
                federation.processes[number].wait()
                federation.start(number)
                known = {}
                before = federation.answers(left[0]) if left else 0
        time.sleep(0.02)
    said = federation.log(COORDINATOR).read_text()
    assert federation.processes[COORDINATOR].returncode == 0, said[-3000:]
    assert not left
    for number in [*range(PROBLEM.sites), COORDINATOR]:
        assert "Traceback" not in federation.log(number).read_text()
    record = RunRecord.read(federation.home / "run")
    assert record.secure
    assert record.sites == {}
    assert [line.number for line in record.rounds] == list(range(PROBLEM.rounds + 1))
    assert all(line.sites >= 4 for line in record.rounds[1:])
    assert phases & {"open", "mask", "agree", "unmask"}
    # Which sites a sum lacked depends on how soon they were back, so there is no one head to compare with.
    assert record.score is not None
    assert record.score > 2 / CLASSES
    ledgers = list(federation.home.glob("home-*/ledger/*.jsonl"))
    assert len(ledgers) == PROBLEM.sites
