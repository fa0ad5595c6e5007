"""Faults: runs whose processes are killed, stopped and cut off at random end in the undisturbed run's head."""

import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from fedhead.backbones import ImagePreprocessing
from fedhead.errors import FedheadError
from fedhead.server.provision import provision
from fedhead.simulations.benchmarks.cutting_proxy import Cut, CuttingProxy
from fedhead.simulations.benchmarks.forks import Forked
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.simulations.benchmarks.problem import CLASSES, HEIGHT, Problem, own_home
from fedhead.simulations.benchmarks.processes import AS_CLIENT, answers, environment, free_ports

COORDINATOR = 99
LONGEST = 600.0
"""Seconds after the last fault within which a run has to end."""
MOST_PAUSE = 2.0
"""Seconds before a fault."""
WIDTH, HIDDEN = 64, 40_000
CUTS: tuple[Cut, ...] = ("reset", "stall", "drop")


def shipped() -> tuple[nn.Module, ImagePreprocessing]:
    """Return a backbone with 20 MB of weights, which a site takes from the coordinator in several messages."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    return layers, ImagePreprocessing(1, (HEIGHT, WIDTH // HEIGHT), None, (0.5,), (0.25,))


@app.command()
def faults(
    count: Annotated[int, typer.Option(help="Kills, stops and cuts in all.", min=1)] = 1000,
    each: Annotated[int, typer.Option(help="Faults in one run.", min=1)] = 25,
    sites: Annotated[int, typer.Option(help="Processes of fedhead client.", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="In one run.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 0,
    as_json: Json = False,
) -> None:
    """Disturb runs over TLS in all phases, and check that each ends in the undisturbed run's head, bit by bit."""
    problem = Problem(sites=sites, rows=30, features=WIDTH, rounds=rounds)
    generator = random.Random(seed)
    seconds: dict[str, float] = {}
    faults_by_kind: Counter[str] = Counter()
    with own_home() as home:
        began = time.perf_counter()
        expected = Federation(problem, home / "undisturbed").run([])
        seconds["the undisturbed run"] = time.perf_counter() - began
        left, runs = count, 0
        while left > 0:
            runs += 1
            federation = Federation(problem, home / f"run-{runs}")
            found = federation.run([generator.random() for _ in range(min(each, left))], generator)
            faults_by_kind.update(federation.faults)
            if not federation.faults:
                raise FedheadError("A run ended before its first fault: give it more rounds.")
            # A run that ends early has had fewer.
            left -= federation.faults.total()
            if found != expected:
                raise FedheadError(f"Run {runs} ended in another head, after {dict(federation.faults)}.")
        seconds[f"{runs} disturbed runs"] = time.perf_counter() - began - seconds["the undisturbed run"]
    figures = {f"faults: {kind}": float(number) for kind, number in sorted(faults_by_kind.items())}
    setting = {**asdict(problem), "count": count, "each": each, "seed": seed, "heads": "the same bits"}
    Measurement("Kills, stops and cuts", seconds, setting, figures, units="figure").show(as_json=as_json)


class Federation:
    """A coordinator and sites in processes of their own, each site behind a proxy that can cut it off.

    Args:
        problem: the problem that they compute.
        home: the folder of their files.

    Attributes:
        faults: how often each kind of fault came about.
    """

    def __init__(self, problem: Problem, home: Path) -> None:
        self.problem, self.home = problem, home
        self.faults: Counter[str] = Counter()
        self._out = home / "run"
        home.mkdir(parents=True)
        (self._port,) = free_ports(1)
        self._names = [f"site-{number}" for number in range(problem.sites)]
        self._backbone = f"python:{__name__}:{shipped.__name__}"
        provision(home / "kit", f"127.0.0.1:{self._port}", self._names, backbones={self._backbone: "the benchmark's"})
        self._processes: dict[int, Forked] = {}
        self._answered: dict[int, int] = {}
        self._proxies: list[CuttingProxy] = []

    def run(self, when: list[float], generator: random.Random | None = None) -> tuple[bytes, list[tuple[float, ...]]]:
        """Run to the end; return the head's file, and the losses and the score of each round.

        Args:
            when: a fault for each, with its share of the longest pause before it.
            generator: chooses the faults.

        Raises:
            FedheadError: if the run does not end well.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._proxies = [stack.enter_context(CuttingProxy(self._port)) for _ in self._names]
            for number in (COORDINATOR, *range(self.problem.sites)):
                self._start(number)
            for share in when:
                assert generator is not None
                if generator.random() < 0.8:
                    self._wait(LONGEST, until_listening=True)
                self._wait(MOST_PAUSE * share)
                if (self._out / "result.json").exists():
                    break
                self._disturb(generator)
            stop = time.monotonic() + LONGEST
            while self._processes[COORDINATOR].poll() is None:
                if time.monotonic() > stop:
                    break
                time.sleep(0.05)
            if self._processes[COORDINATOR].poll() != 0:
                said = "".join(path.read_text(encoding="utf-8")[-700:] for path in sorted(self.home.glob("*.log")))
                raise FedheadError(f"The run failed after {dict(self.faults)}. {said}")
        return (self._out / "model.safetensors").read_bytes(), self._losses()

    def _losses(self) -> list[tuple[float, ...]]:
        """Return the losses and the score of each round, which a fault must not change either."""
        lines = map(json.loads, (self._out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [tuple(line[name] for name in ("number", "sites", "train_loss", "loss", "score")) for line in lines]

    def _wait(self, seconds: float, *, until_listening: bool = False) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop and self._processes[COORDINATOR].poll() is None:
            if until_listening and answers(self._port):
                return
            time.sleep(0.01)

    def _disturb(self, generator: random.Random) -> None:
        site = generator.randrange(self.problem.sites)
        kinds: dict[str, Callable[[], None]] = {
            "coordinator killed": lambda: self._restart(COORDINATOR, signal.SIGKILL),
            "coordinator stopped": lambda: self._restart(COORDINATOR, signal.SIGTERM),
            "client killed": lambda: self._restart(site, signal.SIGKILL),
            "coordinator suspended": lambda: self._suspend(COORDINATOR, generator.random()),
            "client suspended": lambda: self._suspend(site, generator.random()),
            "network cut": lambda: self._cut(site, generator.choice(CUTS), generator.random()),
        }
        kind = generator.choice(sorted(kinds))
        if kind == "client killed" and not self._may_be_killed(site):
            kind = "network cut"
        if self._processes[COORDINATOR].poll() is not None:
            return
        self.faults[kind] += 1
        kinds[kind]()

    def _may_be_killed(self, site: int) -> bool:
        """Return whether a site has answered since it was killed; a message that kills two processes is refused."""
        answered = self._log(site).read_text(encoding="utf-8").count(": done in ")
        if answered == self._answered.get(site):
            return False
        self._answered[site] = answered
        return True

    def _restart(self, number: int, sent: signal.Signals) -> None:
        process = self._processes[number]
        process.send(sent)
        if process.wait(LONGEST) == 0 and number == COORDINATOR:
            # It had finished.
            return
        self._start(number)

    def _suspend(self, number: int, seconds: float) -> None:
        process = self._processes[number]
        process.send(signal.SIGSTOP)
        time.sleep(seconds)
        process.send(signal.SIGCONT)

    def _cut(self, site: int, how: Cut, seconds: float) -> None:
        self._proxies[site].cut(how)
        time.sleep(seconds)
        self._proxies[site].heal()

    def _log(self, number: int) -> Path:
        return self.home / f"{number}.log"

    def _start(self, number: int) -> None:
        kit = str(self.home / "kit" / ("coordinator" if number == COORDINATOR else self._names[number]))
        if number != COORDINATOR:
            address = f"127.0.0.1:{self._proxies[number].port}"
            command = [*AS_CLIENT, "--kit", kit, "--coordinator", address]
        elif (self._out / "run.toml").exists():
            command = ["server", "--kit", kit, "--resume", str(self._out)]
        else:
            classes = ",".join(str(each) for each in range(CLASSES))
            command = ["server", "--kit", kit, "--out", str(self._out), "--classes", classes]
            command += ["--backbone", self._backbone, "--rounds", str(self.problem.rounds)]
            command += ["--round-deadline", str(LONGEST)]
        own = environment(self.problem, self.home, number)
        self._processes[number] = Forked(command, own, self._log(number))

    def _end(self) -> None:
        for process in self._processes.values():
            process.end()
