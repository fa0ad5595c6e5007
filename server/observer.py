"""Observers of a run: live tables, status files, reports, trackers."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedhead.config import RunConfig
from fedhead.server.runs.history import Outcome, Round

logger = logging.getLogger(__name__)

Step = Literal["describe", "install", "statistics", "standardise", "train", "evaluate", "finish"]
"""Steps of a run, in order; `train` is repeated in each round."""

Phase = Literal["open", "mask", "agree", "unmask"]
"""Exchanges of a secure sum, in order: keys, masked sums, the survivors, and the shares that remove their masks."""

Standing = Literal["described", "lacking", "ready", "lost", "refused"]
"""State of a site: it knows of the run; it lacks the backbone's weights; it takes part; it is gone or silent, and takes
part again once it answers; it cannot take part."""


@dataclass(frozen=True)
class SiteState:
    """A site as the coordinator knows it.

    Attributes:
        standing: see `Standing`.
        rows: the number of rows that it claims.
        weights: the share of the backbone's weights that it has received, 0 to 1.
        reason: the reason why it is lost or refused, a sentence.
        joined: the first round that it takes part in; 0 from the start.
        seen: `time.time()` of its last answer; 0.0 before the first.
        steps: a sentence for each step that its replies pass, as it describes them.
    """

    standing: Standing
    rows: int = 0
    weights: float = 0.0
    reason: str = ""
    joined: int = 0
    seen: float = 0.0
    steps: tuple[str, ...] = ()


class Observer:
    """Receives the events of a run, in the coordinator's thread; override the methods for the events you need.

    An exception from an observer ends the run, except from `on_failed`, where it is logged.
    """

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        """A run starts or resumes; `run_dir` is its folder, if it has one."""

    def on_step(self, step: Step, server_round: int) -> None:
        """The coordinator begins a step, for the head of `server_round` (0 before rounds)."""

    def on_phase(self, phase: Phase) -> None:
        """A secure sum of the current step begins one of its exchanges."""

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        """The state of a site has changed; `sites` has all of them by name."""

    def on_waiting(self, reason: str) -> None:
        """The run waits for more sites; `reason` is a sentence."""

    def on_round(self, finished: Round) -> None:
        """A head has been made and evaluated."""

    def on_finished(self, outcome: Outcome) -> None:
        """The run is complete, and so is its folder."""

    def on_failed(self, error: BaseException) -> None:
        """The run ends with `error`, which may be an interruption; its folder keeps its content."""


class EachRound(Observer):
    """Calls a function with each finished round."""

    def __init__(self, call: Callable[[Round], object]) -> None:
        self._call = call

    def on_round(self, finished: Round) -> None:
        self._call(finished)


class Observers(Observer):
    """Several observers, notified in order."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = list(observers)

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        for observer in self._observers:
            observer.on_started(config, run_dir)

    def on_step(self, step: Step, server_round: int) -> None:
        for observer in self._observers:
            observer.on_step(step, server_round)

    def on_phase(self, phase: Phase) -> None:
        for observer in self._observers:
            observer.on_phase(phase)

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
            try:
                observer.on_failed(error)
            # The run's own error is the one to report.
            except Exception:
                logger.exception("%s failed after the run's own failure.", type(observer).__name__)
