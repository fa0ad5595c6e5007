"""The folder of one run: its configuration, its metrics as they come, its model and its result."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from fedhead.adaptation import adaptation_file
from fedhead.backbones.split import Tail
from fedhead.backbones.tail_file import TAIL_FILE, save_tail
from fedhead.config import RunConfig
from fedhead.drift import head_digest
from fedhead.errors import UserError
from fedhead.files import disk_errors, write_atomically
from fedhead.heads import TunedHead
from fedhead.model import BACKBONE_FILE, MODEL_FILE, TransferModel
from fedhead.server.exchange import POOL
from fedhead.server.observer import Observer
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.site_sums import SiteSums
from fedhead.tasks import Task, make_task

_MOST_INDENTED = 1000
"""A file on more sites is written densely, which is many times faster and half the size."""


class RunFolder(Observer):
    """A folder under `runs/` (or where told) that belongs to one run; it observes the run to write its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums = SiteSums(path / "sums")
        self._begun = True

    @classmethod
    def create(cls, path: Path | str | None, name: str) -> Self:
        """Make a new folder: `path`, or one under `runs/` named by the time and `name`.

        Raises:
            UserError: if it holds something already, or cannot be written.
        """
        chosen = Path(path) if path is not None else Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        with disk_errors(chosen):
            if path is None:
                chosen = _made(chosen)
            elif chosen.exists() and not _is_unused(chosen):
                raise UserError(f"{chosen} exists and is not an empty folder; a run needs one of its own.")
            chosen.mkdir(parents=True, exist_ok=True)
            (chosen / "metrics.jsonl").touch()
            folder = cls(chosen.resolve())
        folder._begun = False
        return folder

    @classmethod
    def open(cls, path: Path | str) -> tuple[Self, RunConfig]:
        """Open the folder of a run that did not finish, to resume it; return its configuration, too.

        Raises:
            UserError: if there is none, or it finished.
        """
        folder = cls(Path(path).resolve())
        if not (folder.path / "run.toml").is_file():
            raise UserError(not_resumable(folder.path))
        if (folder.path / "result.json").is_file():
            raise UserError(f"The run in {path} has finished; there is nothing to resume.")
        config = RunConfig.from_toml(folder.path / "run.toml")
        folder.sums = _sums(folder.path, config)
        return folder, config

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration, as a TOML file that reproduces the run; from now on sums are kept as it says.

        The caller holds the folder's lock: of two runs that were given one folder, the first takes it.

        Raises:
            UserError: if another run has taken the folder since it was made.
        """
        if not self._begun and (self.path / "run.toml").exists():
            raise UserError(f"Another run has taken {self.path} meanwhile; a run needs a folder of its own.")
        self._begun = True
        self.sums = _sums(self.path, config)
        write_atomically(self.path / "run.toml", config.to_toml())

    def on_round(self, finished: Round) -> None:
        """Append one line to the metrics."""
        with disk_errors(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finished)) + "\n")

    def flush_metrics(self) -> None:
        """Flush the appended metrics to the disk."""
        with disk_errors(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def rewind(self, rounds: int) -> list[Round]:
        """Keep the first so many lines of the metrics, and return them.

        Raises:
            UserError: if there are fewer.
        """
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            if len(lines) < rounds:
                raise ValueError(f"{rounds} lines were written, and {len(lines)} are there")
            history = [Round.from_line(json.loads(line)) for line in lines[:rounds]]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}. Restore it, or start the run again.") from None
        write_atomically(path, "".join(f"{line}\n" for line in lines[:rounds]))
        return history

    def discard_if_unused(self) -> None:
        """Remove the folder of a run that ended before it had a head."""
        metrics = self.path / "metrics.jsonl"
        if (
            self._begun
            and not (metrics.exists() and metrics.stat().st_size)
            and not (self.path / "checkpoint").exists()
        ):
            shutil.rmtree(self.path, ignore_errors=True)

    def write_model(self, model: TransferModel, config: RunConfig) -> None:
        """Write the model that the run delivers, and its backbone if the run is to keep it."""
        if config.with_backbone:
            model.backbone.save(self.path / BACKBONE_FILE)
        model.save(self.path / MODEL_FILE)

    def write_tail(self, outcome: Outcome) -> None:
        """Write the tuned parameters alone, if the run delivers any."""
        head = outcome.head
        if isinstance(head, TunedHead):
            assert isinstance(head.tail, Tail)
            save_tail(self.path / TAIL_FILE, head.tail, head.tail_parameters)

    def write_adaptation(self, model: TransferModel, outcome: Outcome) -> None:
        """Write all that adapts the model to rows without labels, if the run compared adaptations."""
        if outcome.adaptation is not None:
            outcome.adaptation.save(adaptation_file(self.path / MODEL_FILE), head_digest(model))

    @staticmethod
    def _before(task: Task, outcome: Outcome) -> dict[str, Any]:
        sites = {} if POOL in outcome.before else outcome.before
        return {
            "pooled": task.report(task.pooled(outcome.before.values())).to_dict(),
            "sites": {name: task.report(sums).to_dict() for name, sums in sites.items()},
        }

    def write_evaluation(self, outcome: Outcome, config: RunConfig, baseline: Mapping[str, Any] | None = None) -> None:
        """Write the figures of the delivered head, pooled and by site, with their intervals.

        Args:
            outcome: of the run.
            config: of the run, with its classes.
            baseline: the figures of a backbone to compare with, if one was asked for.
        """
        task = make_task(config.task, config.classes)
        pooled = task.pooled(outcome.sites.values())
        values = {
            "pooled": task.report(pooled).to_dict(),
            "curves": task.curves(pooled),
            "sites": {name: task.report(sums).to_dict() for name, sums in outcome.single_sites.items()},
            "diagnosis": [diagnosis.to_dict() for diagnosis in outcome.diagnoses],
            "calibration": outcome.calibrated.to_dict() if outcome.calibrated else None,
            "unlearned": list(outcome.unlearned),
            "choices": [dict(one) for one in outcome.choices],
            "coverage": [one.to_dict() for one in outcome.coverage],
            "traffic": outcome.traffic.to_dict(),
            **({"personal": outcome.personal.to_dict()} if outcome.personal else {}),
            **({"subgroups": dict(outcome.subgroups)} if outcome.subgroups else {}),
            **({"baseline": dict(baseline)} if baseline else {}),
            **({"privacy": dict(outcome.privacy)} if outcome.privacy else {}),
            **({"foreign": outcome.foreign.to_dict()} if outcome.foreign else {}),
            **({"clusters": dict(outcome.clusters)} if outcome.clusters else {}),
            **({"before": self._before(task, outcome)} if outcome.before else {}),
            **({"attack": dict(outcome.attack)} if outcome.attack else {}),
        }
        indent = 1 if len(outcome.participants) <= _MOST_INDENTED else None
        write_atomically(self.path / "evaluation.json", json.dumps(values, indent=indent) + "\n")


def _sums(path: Path, config: RunConfig) -> SiteSums:
    return SiteSums(path / "sums", "folder" if config.keep_sums == "folder" else "none")


def _made(path: Path) -> Path:
    """Make a folder of this name, or with a number after it where others have the name."""
    number, chosen = 1, path
    while True:
        try:
            chosen.mkdir(parents=True)
        except FileExistsError:
            number += 1
            chosen = path.with_name(f"{path.name}-{number}")
        else:
            return chosen


def _is_unused(path: Path) -> bool:
    """Return whether a path is an empty folder, or that of a run that ended before it wrote its configuration."""
    if not path.is_dir():
        return False
    return all(file.name == "metrics.jsonl" and file.stat().st_size == 0 for file in path.iterdir())


def not_resumable(path: Path) -> str:
    """Return why a folder without run.toml cannot be resumed, as a sentence."""
    if (path / "metrics.jsonl").is_file() and _is_unused(path):
        return f"The run in {path} had not begun, so there is nothing to resume: start it again, with --out {path}."
    return f"{path} is no run folder: it holds no run.toml. Give the folder of the run to resume."
