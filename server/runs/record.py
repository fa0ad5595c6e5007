"""The record of a run, finished or not: the files of its folder, checked and typed."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from fedhead.data import Kind
from fedhead.errors import FedheadError, UserError
from fedhead.server.runs.examples import Example, read_examples
from fedhead.server.runs.history import Round
from fedhead.server.runs.summary import RunSummary, damaged
from fedhead.tasks import Task, tasks
from fedhead.wording import counted, score_words

JOURNAL = "journal.json"
REPORT = "report.html"
WORTH = "worth.json"
"""The value of each site; see `fedhead.server.runs.worth`."""

Values = Mapping[str, Any]


class SiteRecord(BaseModel):
    """The last known state of a site; see `fedhead.server.observer.SiteState`."""

    model_config = ConfigDict(frozen=True)

    standing: str
    rows: int | None = None
    reason: str = ""
    steps: tuple[str, ...] = ()


class BackboneRecord(BaseModel):
    """The backbone of a run."""

    model_config = ConfigDict(frozen=True)

    kind: Kind = "image"
    digest: str = ""
    weights_digest: str = ""
    num_features: int | None = None
    num_bytes: int | None = None
    trained: bool = True
    licence: str = ""
    preprocessing: dict[str, str] = {}


class JournalRecord(BaseModel):
    """The file `journal.json`: the run's progress, and the parts that ran.

    Attributes:
        status: empty in folders of earlier versions.
        error: why the run failed.
        started: date and time in UTC.
        ended: the same; empty until then.
        step: the coordinator's current step; see `fedhead.server.observer.Step`.
        phase: the exchange of the current secure sum; see `fedhead.server.observer.Phase`.
        simulated: whether the sites are simulated; None if unknown.
        seconds: by step.
        standing: the number of sites in each state.
        sites: the state of each site, or of many sites some.
        backbone: the frozen part.
        versions: of the software, by name.
        release_steps: a sentence for each step that all sites' replies pass; None if each site has its own, or unknown.
    """

    model_config = ConfigDict(validate_assignment=True)

    status: Literal["", "running", "finished", "failed", "interrupted"] = ""
    error: str = ""
    started: str = ""
    ended: str = ""
    step: str = ""
    phase: str = ""
    simulated: bool | None = None
    seconds: dict[str, float] = {}
    standing: dict[str, int] = {}
    sites: dict[str, SiteRecord] = {}
    backbone: BackboneRecord = BackboneRecord()
    versions: dict[str, str] = {}
    release_steps: tuple[str, ...] | None = None


class RunRecord(BaseModel):
    """The files of a run folder; missing ones are empty.

    Attributes:
        name: of the folder.
        config: `run.toml`.
        toml: its text.
        journal: `journal.json`.
        rounds: `metrics.jsonl`, a line for each head in order.
        evaluation: `evaluation.json`, whose figures are the task's own.
        worth: `worth.json`, the value of each site, if it was computed.
        result: `result.json`; None while the run is not finished.
        examples: `examples.json`, drawn images of a simulated run, if it kept any.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    config: dict[str, Any]
    toml: str
    journal: JournalRecord = JournalRecord()
    rounds: tuple[Round, ...] = ()
    evaluation: dict[str, Any] = {}
    worth: dict[str, Any] = {}
    result: RunSummary | None = None
    examples: tuple[Example, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a run folder.

        Raises:
            UserError: if there is none at `path`, or it is of no run.
            FedheadError: if a file in it is damaged.
        """
        if not (path / "run.toml").is_file():
            raise UserError(f"{path} is not a run folder: it holds no run.toml. Runs are in folders under runs/.")
        toml = _text(path / "run.toml")
        try:
            config = tomllib.loads(toml)
        except tomllib.TOMLDecodeError as error:
            raise FedheadError(f"{path / 'run.toml'} is damaged: {error}.") from None
        return cls(
            name=path.resolve().name,
            config=config,
            toml=toml,
            journal=read_journal(path) or JournalRecord(),
            rounds=tuple(read_rounds(path)),
            evaluation=_figures(path / "evaluation.json"),
            worth=_worth(path),
            result=RunSummary.read(path),
            examples=read_examples(path),
        )

    @property
    def status(self) -> str:
        """`running`, `finished`, `failed` or `interrupted`."""
        return self.journal.status or ("finished" if self.result else "running")

    @property
    def classes(self) -> Sequence[str]:
        """The class names."""
        classes: Sequence[str] = self.config.get("classes", ())
        return classes

    @property
    def task(self) -> type[Task]:
        """What the run predicts."""
        earlier = "multi-label" if self.config.get("multi_label") else "classification"
        return tasks[str(self.config.get("task", earlier))]

    @property
    def one_class(self) -> bool:
        """Whether every row has one class."""
        return self.task.kind.exclusive

    @property
    def real(self) -> bool:
        """Whether real targets are predicted."""
        return "targets" in self.pooled or (self.task.kind.real and not self.task.dense)

    @property
    def headless(self) -> bool:
        """Whether the model has no head: a language model."""
        return self.config.get("head") == "none"

    @property
    def outputs(self) -> str:
        """The number of classes, targets or time bins in words."""
        return counted(len(self.task.shown(self.classes)), *self.task.output_names)

    @property
    def tested(self) -> float | None:
        """The score on the pooled test set, if there is one."""
        return self.result.score_test if self.result else None

    def words(self, score: float | None) -> str:
        """Return a score as a person reads it."""
        return score_words(score, self.task.score_name)

    @cached_property
    def pooled(self) -> Values:
        """How the kept head does on the pooled held-out rows; empty without any."""
        pooled: Values = self.evaluation.get("pooled", {})
        return pooled if pooled.get("rows") else {}

    @property
    def sites(self) -> Mapping[str, Values]:
        """The same for each site that holds rows out."""
        return {name: one for name, one in self.evaluation.get("sites", {}).items() if one["rows"]}

    @property
    def secure(self) -> bool:
        """Whether the coordinator learned only sums over all sites."""
        return bool(self.config.get("privacy", {}).get("secure_sum"))

    @property
    def private(self) -> bool:
        """Whether the run is differentially private."""
        return bool(self.config.get("privacy", {}).get("epsilon"))

    @property
    def noisy(self) -> Values:
        """The noisy evaluation of a private run's head; empty without one."""
        evaluation: Values = self.evaluation.get("privacy", {}).get("evaluation", {})
        return evaluation

    @property
    def num_evaluated(self) -> int:
        """The number of sites that evaluated the kept head on held-out rows."""
        return self.num_sites if self.secure else len(self.sites)

    @property
    def standing(self) -> Mapping[str, SiteRecord]:
        """The last known state of each site, or of many sites some."""
        return self.journal.sites

    @property
    def compares_sites(self) -> bool:
        """Whether the task compares sites with the pool."""
        return self.task.compares_classes or self.task.compares_losses

    @property
    def diagnoses(self) -> Sequence[Values]:
        """The diagnosis of each site."""
        diagnoses: Sequence[Values] = self.evaluation.get("diagnosis", ())
        return diagnoses

    @property
    def tuned(self) -> str:
        """The layers that were tuned, as in `tune.layers`; empty if the delivered backbone is the pretrained one."""
        if self.result is None or self.result.kept != "tuned":
            return ""
        tune = self.config.get("tune")
        return str(tune.get("layers", "")) if isinstance(tune, dict) else str(tune or "")

    @property
    def objective(self) -> str:
        """The objective of the layers that were tuned, as in `tune.objective`; empty for the task's own loss."""
        tune = self.config.get("tune")
        named = str(tune.get("objective", "task")) if self.tuned and isinstance(tune, dict) else "task"
        return "" if named == "task" else named

    @property
    def kept_round(self) -> int:
        """The round of the delivered head; -1 while that is open."""
        return self.result.kept_round if self.result else -1

    @property
    def num_sites(self) -> int:
        """The number of sites that take part."""
        if self.result is not None:
            return self.result.sites
        return self.count("ready") + self.count("lost")

    def count(self, standing: str) -> int:
        """Return the number of sites in a state."""
        return self.journal.standing.get(standing, 0)

    @property
    def bytes_down(self) -> int:
        """Payload to all sites so far."""
        return sum(line.bytes_down for line in self.rounds)

    @property
    def bytes_up(self) -> int:
        """Payload from all sites so far."""
        return sum(line.bytes_up for line in self.rounds)

    @property
    def score(self) -> float | None:
        """The latest score that is known: of the delivered head, or of the last one made."""
        known = [self.result.score if self.result else None, *map(_score, reversed(self.rounds))]
        return next((value for value in known if value is not None), None)


def read_journal(path: Path) -> JournalRecord | None:
    """Return the journal of a run folder; None if there is none.

    Raises:
        FedheadError: if it is damaged.
    """
    file = path / JOURNAL
    if not file.is_file():
        return None
    try:
        return JournalRecord.model_validate(json.loads(_text(file)))
    except ValueError as error:
        raise FedheadError(damaged(file, error)) from None


def _score(line: Round) -> float | None:
    return line.test_score if line.test_score is not None else line.score


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedheadError(f"{path} cannot be read: {error}.") from None


def _worth(folder: Path) -> dict[str, Any]:
    try:
        return _figures(folder / WORTH)
    except FedheadError as error:
        raise FedheadError(f"{error} Delete it, and make it again: fedhead worth {folder}") from None


def _figures(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(_text(path))
    except ValueError as error:
        raise FedheadError(damaged(path, error)) from None
    if not isinstance(values, dict):
        raise FedheadError(f"{path} is damaged: it holds no JSON object.")
    return values


def read_rounds(folder: Path) -> list[Round]:
    """Return the lines of a run's metrics; a last line without an end was being written when the process was killed.

    Raises:
        FedheadError: if a line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *whole, _ = _text(path).split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(Round.from_line(json.loads(line)))
        except (ValueError, TypeError, AttributeError):
            raise FedheadError(f"Line {number} of {path} is damaged.") from None
    return lines
