"""What it takes to ship a backbone of 100 MB to sites: bytes to each, and the memory of coordinator and clients."""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedhead.backbones import ImagePreprocessing
from fedhead.errors import FedheadError
from fedhead.protocol.actions import INSTALL
from fedhead.server.provision import provision
from fedhead.simulations.benchmarks.problem import CLASSES, Problem
from fedhead.simulations.benchmarks.processes import CLIENT, FEDHEAD, free_ports, peak_bytes, started

WIDTH, HIDDEN = 512, 24_414
WEIGHTS_BYTES = 4 * (2 * WIDTH * HIDDEN + HIDDEN + WIDTH)
"""Of `heavy`: 100 MB."""
COORDINATOR = 99
LONGEST = 300.0

Made = tuple[nn.Module, ImagePreprocessing]


def bare() -> Made:
    """Return a backbone without weights."""
    return nn.Flatten(), ImagePreprocessing(1, (8, WIDTH // 8), None, (0.5,), (0.25,))


def heavy() -> Made:
    """Return a backbone with 100 MB of weights, which a site takes from the coordinator alone."""
    flatten, preprocessing = bare()
    return nn.Sequential(flatten, nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)), preprocessing


@dataclass(frozen=True)
class Shipped:
    """One run over new processes.

    Attributes:
        bytes_each: that a site was sent of weights.
        coordinator: the most memory that it had, in bytes.
        client: the same of the client that had most.
    """

    bytes_each: float
    coordinator: int
    client: int


def shipping(problem: Problem, home: Path) -> dict[str, float]:
    """Return bytes and memory of a first and of a second run with 100 MB of weights, in multiples of these.

    Memory is beyond that of the same run without weights: what the interpreter and the libraries take is in both.
    """
    home.mkdir()
    (port,) = free_ports(1)
    kits = home / "kit"
    allowed = {f"python:{__name__}:{made.__name__}": "the benchmark's own" for made in (bare, heavy)}
    names = [f"site-{number}" for number in range(problem.sites)]
    provision(kits, f"127.0.0.1:{port}", names, backbones=allowed)
    without = _run(problem, home, bare.__name__, "without")
    first = _run(problem, home, heavy.__name__, "first")
    second = _run(problem, home, heavy.__name__, "second")
    coordinator, client = first.coordinator - without.coordinator, first.client - without.client
    times = f"times {WEIGHTS_BYTES / 1e6:.0f} MB"
    return {
        f"weights to each site in the first run, {times}": first.bytes_each / WEIGHTS_BYTES,
        f"weights to each site in the second run, {times}": second.bytes_each / WEIGHTS_BYTES,
        f"the coordinator's peak memory beyond that without weights, {times}": coordinator / WEIGHTS_BYTES,
        f"a client's peak memory beyond that without weights, {times}": client / WEIGHTS_BYTES,
        "the coordinator's peak memory without weights, MB": without.coordinator / 1e6,
        "a client's peak memory without weights, MB": without.client / 1e6,
    }


def _run(problem: Problem, home: Path, backbone: str, name: str) -> Shipped:
    """Run over new processes with a backbone of this module, in the same homes."""
    out = home / name
    classes = ",".join(str(number) for number in range(CLASSES))
    server = [*FEDHEAD, "server", "--kit", str(home / "kit" / "coordinator"), "--out", str(out), "--classes", classes]
    run = ["--backbone", f"python:{__name__}:{backbone}", "--rounds", "2", "--min-sites", str(problem.sites)]
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(started([*server, *run], problem, home, COORDINATOR))
        clients = [
            stack.enter_context(
                started([*CLIENT, "--kit", str(home / "kit" / f"site-{number}")], problem, home, number)
            )
            for number in range(problem.sites)
        ]
        stop, most = time.monotonic() + LONGEST, 0
        while coordinator.poll() is None:
            most = max(most, peak_bytes(coordinator.pid))
            if time.monotonic() > stop:
                break
            time.sleep(0.05)
        if coordinator.returncode != 0:
            log = (home / f"site-{COORDINATOR}.log").read_text(encoding="utf-8")
            raise FedheadError(f"The run over weights of {WEIGHTS_BYTES / 1e6:.0f} MB failed. {log[-1000:]}")
        client = max(peak_bytes(process.pid) for process in clients)
    actions = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["traffic"]["actions"]
    return Shipped(actions.get(INSTALL, [0, 0, 0])[1] / problem.sites, most, client)
