"""`crowd`: many light sites on one coordinator for a long time: rounds, their slowest, what is lost, and memory."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedhead.errors import FedheadError
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Round
from fedhead.simulations.benchmarks import network
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.simulations.benchmarks.problem import Problem, own_home
from fedhead.simulations.benchmarks.processes import watchable

FIRST = 3
"""Rounds after which memory is compared with that at the end: by then everything has been allocated once."""


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Crowd(Observer):
    """Watches the coordinator's memory and processor time after each round.

    Attributes:
        memory: in bytes, after each round.
        seconds: of the processor, until each round's end.
    """

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.seconds: list[float] = []

    def on_round(self, finished: Round) -> None:
        self.memory.append(resident_bytes())
        self.seconds.append(time.process_time())


def measure(problem: Problem, share: float) -> Measurement:
    """Run rounds over a share of many light sites.

    Raises:
        FedheadError: if a site or a reply is lost, or a round has fewer sites than it asked.
    """
    crowd, began = Crowd(), time.perf_counter()
    with own_home() as home:
        link, kits = network.door([f"site-{number}" for number in range(problem.sites)], home)
        command = [sys.executable, "-m", network.__name__, str(link.port), str(kits)]
        changes = {"strategy": {"fraction_train": share, "fraction_evaluate": share}}
        outcome, _ = network.run(problem, link, kits, [command], home, 0.0, changes=changes, observers=[crowd])
    rounds = outcome.history[1:]
    asked = round(problem.sites * share)
    if len(rounds) != problem.rounds or any(line.sites != asked for line in rounds):
        raise FedheadError(f"Not every one of {problem.rounds} rounds has the replies of {asked} sites.")
    seconds = np.array([line.seconds for line in rounds])
    per_round = (crowd.seconds[-1] - crowd.seconds[0]) / max(len(crowd.seconds) - 1, 1)
    figures = {
        "rounds": float(len(rounds)),
        "minutes of rounds": float(seconds.sum()) / 60,
        "processor seconds of the coordinator a round": per_round,
        "MB of the coordinator after the first rounds": crowd.memory[FIRST] / 1e6,
        "MB of the coordinator at the end": crowd.memory[-1] / 1e6,
    }
    timed = {
        "a round, median": float(np.median(seconds)),
        "a round, 99 % quantile": float(np.quantile(seconds, 0.99)),
    }
    setting = {
        "sites": problem.sites,
        "in a round": asked,
        "rows": problem.rows,
        "features": problem.features,
        "lost": "no site and no reply",
        "total_seconds": round(time.perf_counter() - began, 1),
    }
    title = f"{problem.sites} light sites over loopback TLS, {asked} in a round"
    return Measurement(title, timed, setting, figures, units="figure")


@app.command()
def crowd(
    sites: Annotated[int, typer.Option(help="Light sites in one process.", min=2)] = 1000,
    share: Annotated[float, typer.Option(help="Share of the sites in each round.", min=0.01, max=1)] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rounds; 300 take about ten minutes.", min=FIRST + 1)] = 300,
    rows: Annotated[int, typer.Option(help="At each site.", min=10)] = 50,
    features: Annotated[int, typer.Option(help="Of each row.", min=8)] = 32,
    as_json: Json = False,
) -> None:
    """Rounds over many light sites: median and slowest rounds, lost sites, and the coordinator's memory."""
    if not watchable():
        raise FedheadError("Memory is read from /proc, which only Linux has.")
    measure(Problem(sites=sites, rows=rows, features=features, rounds=rounds), share).show(as_json=as_json)
