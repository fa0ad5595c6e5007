"""Who wants to know what happens in a run: live tables, status files, reports, trackers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedhead.config import RunConfig
from fedhead.server.history import Outcome, Round

Step = Literal["describe", "install", "statistics", "standardise", "train", "evaluate", "finish"]
"""What the coordinator asks of the sites; `train` comes once for each round."""

Standing = Literal["described", "lacking", "ready", "lost", "refused"]
"""How a site stands: it was told of the run; it lacks the backbone's weights; it takes part; it did not answer or is
gone, and takes part again once it answers; it cannot take part."""


@dataclass(frozen=True)
class SiteState:
    """A site as the coordinator knows it.

    Attributes:
        standing: see `Standing`.
        rows: how many it said that it has.
        weights: the share of the backbone's weights that is there, 0 to 1.
        reason: why it is lost or refused, in a sentence.
        joined: the round from which it takes part: 0 if from the start.
        seen: `time.time()` of its last answer; 0.0 before the first.
    """

    standing: Standing
    rows: int = 0
    weights: float = 0.0
    reason: str = ""
    joined: int = 0
    seen: float = 0.0


class Observer:
    """Is told what happens in a run, in the coordinator's thread; override what you want to know.

    What an observer raises ends the run, as a failure of the coordinator's own would.
    """

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        """A run starts, or is resumed; `run_dir` is its folder, where it has one."""

    def on_step(self, step: Step, server_round: int) -> None:
        """The coordinator turns to a step, for the head of `server_round` (0 before rounds)."""

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        """Something changed about the sites, all of which are given, by name."""

    def on_waiting(self, reason: str) -> None:
        """The run cannot go on before more sites are there; `reason` is a sentence."""

    def on_round(self, finished: Round) -> None:
        """A head has been made and evaluated."""

    def on_finished(self, outcome: Outcome) -> None:
        """The run is complete, and so is its folder."""

    def on_failed(self, error: BaseException) -> None:
        """The run ends with `error`, an interruption included; what is in its folder stays."""


class EachRound(Observer):
    """Calls a function with each finished round."""

    def __init__(self, call: Callable[[Round], object]) -> None:
        self._call = call

    def on_round(self, finished: Round) -> None:
        self._call(finished)


class Observers(Observer):
    """Several observers, told in order."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = list(observers)

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        for observer in self._observers:
            observer.on_started(config, run_dir)

    def on_step(self, step: Step, server_round: int) -> None:
        for observer in self._observers:
            observer.on_step(step, server_round)

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        for observer in self._observers:
            observer.on_sites(sites)

    def on_waiting(self, reason: str) -> None:
        for observer in self._observers:
            observer.on_waiting(reason)

    def on_round(self, finished: Round) -> None:
        for observer in self._observers:
            observer.on_round(finished)

    def on_finished(self, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.on_finished(outcome)

    def on_failed(self, error: BaseException) -> None:
        for observer in self._observers:
            observer.on_failed(error)
