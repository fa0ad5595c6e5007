"""The coordinator's log of a run: its start, steps, sites, rounds, waits and end."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from fedhead.config import RunConfig
from fedhead.logs import with_fields
from fedhead.server.observer import Observer, SiteState, Step
from fedhead.server.runs.history import Outcome, Round
from fedhead.tasks import tasks
from fedhead.wording import counted, duration, listed, score_words, size

logger = logging.getLogger(__name__)

NAMED = 5
"""Sites named in one line."""
SECONDS_BETWEEN_WAITS = 5.0

_STEPS: Mapping[Step, str] = {
    "describe": "Describing the run to the sites.",
    "install": "Sending the backbone's weights to the sites that lack them.",
    "statistics": "Asking the sites for sums of their features; the first time, they extract features.",
    "standardise": "Telling the sites how features are standardised.",
    "evaluate": "Evaluating the best head.",
    "finish": "Writing the model and the report.",
}


class RunLog(Observer):
    """Logs a run's progress at INFO, with its figures as fields for JSON lines."""

    def __init__(self) -> None:
        self._run = ""
        self._task = "classification"
        self._score_name = "score"
        self._rounds = 0
        self._standing: Mapping[str, str] = {}
        self._waited = float("-inf")

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self._task = config.task
        self._score_name = tasks[config.task].score_name
        self._run = run_dir.name if run_dir else ""
        self._rounds = config.rounds
        kind = "noisy gradients" if config.privacy.on else config.strategy.name
        self._log(
            "start",
            f"Run {self._run} begins: {config.backbone}, {counted(config.rounds, 'round')} of {kind}. "
            f"It needs {counted(config.min_sites, 'site')} or more; with fewer it waits up to "
            f"{duration(config.round_deadline)}.",
            backbone=config.backbone,
            rounds=config.rounds,
            min_sites=config.min_sites,
            folder=str(run_dir or ""),
        )

    def on_step(self, step: Step, server_round: int) -> None:
        if said := _STEPS.get(step):
            self._log("step", said, step=step, round=server_round)

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        now = {name: state.standing for name, state in sites.items()}
        ready = sorted(name for name, standing in now.items() if standing == "ready" != self._standing.get(name))
        self._standing = now
        if ready:
            every = sum(standing == "ready" for standing in now.values())
            take = "takes" if len(ready) == 1 else "take"
            self._log(
                "sites",
                f"{listed(ready, NAMED)} {take} part; {counted(every, 'site')} in all.",
                ready=ready,
                sites=every,
            )

    def on_waiting(self, reason: str) -> None:
        # Hundreds of sites may come one by one.
        if time.monotonic() - self._waited > SECONDS_BETWEEN_WAITS:
            self._waited = time.monotonic()
            self._log("waiting", f"Waiting: {reason}", level=logging.WARNING)

    def on_round(self, finished: Round) -> None:
        score = score_words(finished.score, self._score_name)
        figures = [
            *([f"{self._score_name} {score}"] if score else []),
            *([f"loss {finished.loss:.4f}"] if finished.loss is not None else []),
            *([counted(finished.sites, "site")] if finished.sites else []),
            duration(finished.seconds),
            f"{size(finished.bytes_down)} down",
            f"{size(finished.bytes_up)} up",
        ]
        dropped = f" Left out: {listed(sorted(finished.dropped), NAMED)}." if finished.dropped else ""
        self._log(
            "round",
            f"Round {finished.number} of {self._rounds}: {', '.join(figures)}.{dropped}",
            round=finished.number,
            score=finished.score,
            score_name=self._score_name,
            loss=finished.loss,
            sites=finished.sites,
            seconds=finished.seconds,
            bytes_down=finished.bytes_down,
            bytes_up=finished.bytes_up,
            dropped=dict(finished.dropped),
        )

    def on_finished(self, outcome: Outcome) -> None:
        score = outcome.history[outcome.kept_round].score
        words = score_words(score, self._score_name)
        self._log(
            "finish",
            f"Run {self._run} is finished: the {tasks[self._task].kept_words(outcome.kept_round)}"
            + (f", {self._score_name} {words}." if words else "."),
            kept_round=outcome.kept_round,
            score=score,
        )

    def on_failed(self, error: BaseException) -> None:
        # The command logs failures; it does not log interruptions.
        if not isinstance(error, Exception):
            self._log("stop", f"Run {self._run} is stopped; completed rounds are saved.")

    def _log(self, event: str, sentence: str, level: int = logging.INFO, **fields: object) -> None:
        logger.log(level, "%s", sentence, extra=with_fields(event=event, run=self._run, **fields))
