"""Trackers: a run's figures in TensorBoard, MLflow, or wherever a function of the user's own puts them."""

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedhead.config import RunConfig
from fedhead.data.python import user_function
from fedhead.errors import UserError
from fedhead.registry import Registry
from fedhead.server.observer import Observer, SiteState, Step
from fedhead.server.runs.history import Outcome, Round

logger = logging.getLogger(__name__)

Tracker = Callable[[], Observer]
"""What a tracker's name stands for: makes an observer of one run."""

trackers: Registry[Tracker] = Registry("tracker")

FIGURES = ("score", "loss", "train_loss", "test_score", "bytes_down", "bytes_up", "seconds", "sites")


def find_tracker(name: str) -> Observer:
    """Return the observer called `name`: a registered one, or the result of `python:MODULE:FUNCTION`.

    Raises:
        UserError: if there is none, or it needs a package that is not installed.
    """
    if not name.startswith("python:"):
        return trackers[name]()
    made = user_function(name)()
    if not isinstance(made, Observer):
        raise UserError(
            f"The tracker {name} must return a fedhead.server.observer.Observer, not {type(made).__name__}."
        )
    return made


class Tracked(Observer):
    """Notifies a tracker of a run; a failing tracker is named and dropped, and never ends a run.

    Args:
        name: for messages.
        tracker: the tracker.
    """

    def __init__(self, name: str, tracker: Observer) -> None:
        self._name = name
        self._tracker: Observer | None = tracker

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self._tell(lambda tracker: tracker.on_started(config, run_dir))

    def on_step(self, step: Step, server_round: int) -> None:
        self._tell(lambda tracker: tracker.on_step(step, server_round))

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self._tell(lambda tracker: tracker.on_sites(sites))

    def on_waiting(self, reason: str) -> None:
        self._tell(lambda tracker: tracker.on_waiting(reason))

    def on_round(self, finished: Round) -> None:
        self._tell(lambda tracker: tracker.on_round(finished))

    def on_finished(self, outcome: Outcome) -> None:
        self._tell(lambda tracker: tracker.on_finished(outcome))

    def on_failed(self, error: BaseException) -> None:
        self._tell(lambda tracker: tracker.on_failed(error))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        # A tracker is someone else's code, and may raise anything.
        except Exception as error:
            self._tracker = None
            logger.warning("The tracker %s failed and receives nothing more: %s", self._name, error)


@trackers.register("tensorboard")
class TensorBoard(Observer):
    """Writes TensorBoard events to the folder `tensorboard` of the run folder.

    Raises:
        UserError: if tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("TensorBoard is not installed. Run: pip install 'fedhead[tracking]'") from None
        self._make: Callable[[str], Any] = SummaryWriter
        self._writer: Any = None

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        if run_dir is not None:
            self._writer = self._make(str(run_dir / "tensorboard"))
            self._writer.add_text("run.toml", f"```\n{config.to_toml()}\n```")

    def on_round(self, finished: Round) -> None:
        for name, value in _figures(finished).items():
            self._writer.add_scalar(name, value, finished.number)
        self._writer.flush()

    def on_finished(self, outcome: Outcome) -> None:
        self._writer.close()

    def on_failed(self, error: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()


@trackers.register("mlflow")
class MLflow(Observer):
    """Logs a run to MLflow, wherever `MLFLOW_TRACKING_URI` says.

    Raises:
        UserError: if MLflow is not installed.
    """

    def __init__(self) -> None:
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError:
            raise UserError("MLflow is not installed. Run: pip install mlflow-skinny") from None

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self._mlflow.start_run(run_name=run_dir.name if run_dir else None)
        values = config.model_dump(mode="json", exclude={"classes", "strategy", "local", "simulation"})
        for table in ("strategy", "local"):
            values |= {f"{table}.{key}": value for key, value in getattr(config, table).model_dump().items()}
        self._mlflow.log_params(values)

    def on_round(self, finished: Round) -> None:
        self._mlflow.log_metrics(_figures(finished), step=finished.number)

    def on_finished(self, outcome: Outcome) -> None:
        self._mlflow.end_run()

    def on_failed(self, error: BaseException) -> None:
        self._mlflow.end_run(status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")


def _figures(finished: Round) -> dict[str, float]:
    """Return those of a line's figures that are known."""
    values = asdict(finished)
    known = {name: float(values[name]) for name in FIGURES if values[name] is not None}
    return {**known, "dropped": float(len(finished.dropped))}
