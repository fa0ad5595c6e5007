"""What a run folder says of its run, finished or not."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from fedhead.errors import FedheadError, UserError

JOURNAL = "journal.json"
REPORT = "report.html"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder, read as plain values; what is not there yet is empty.

    Attributes:
        name: the folder's.
        config: `run.toml`.
        toml: its text.
        journal: see `fedhead.server.report.journal`.
        rounds: `metrics.jsonl`, a value for each head in order.
        evaluation: `evaluation.json`.
        result: `result.json`.
    """

    name: str
    config: Values
    toml: str
    journal: Values
    rounds: Sequence[Values]
    evaluation: Values
    result: Values

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
            journal=_json(path / JOURNAL),
            rounds=_lines(path / "metrics.jsonl"),
            evaluation=_json(path / "evaluation.json"),
            result=_json(path / "result.json"),
        )

    @property
    def status(self) -> str:
        """`running`, `finished`, `failed` or `interrupted`."""
        return str(self.journal.get("status") or ("finished" if self.result else "running"))

    @property
    def classes(self) -> Sequence[str]:
        """The class names."""
        classes: Sequence[str] = self.config.get("classes", ())
        return classes

    @property
    def multi_label(self) -> bool:
        """Whether rows have any number of classes."""
        return bool(self.config.get("multi_label"))

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
    def standing(self) -> Mapping[str, Values]:
        """How sites stand, by name, as the coordinator knew last: all, or of many some."""
        sites: Mapping[str, Values] = self.journal.get("sites", {})
        return sites

    @property
    def diagnoses(self) -> Sequence[Values]:
        """How each site stands to the pool."""
        diagnoses: Sequence[Values] = self.evaluation.get("diagnosis", ())
        return diagnoses

    @property
    def kept_round(self) -> int:
        """Which head is delivered; -1 while that is open."""
        return int(self.result.get("kept_round", -1))

    @property
    def num_sites(self) -> int:
        """How many sites take part."""
        if "sites" in self.result:
            return int(self.result["sites"])
        return self.count("ready") + self.count("lost")

    def count(self, standing: str) -> int:
        """Return how many sites stand like that."""
        return int(self.journal.get("standing", {}).get(standing, 0))

    @property
    def bytes_down(self) -> int:
        """Payload to all sites so far."""
        return sum(line["bytes_down"] for line in self.rounds)

    @property
    def bytes_up(self) -> int:
        """Payload from all sites so far."""
        return sum(line["bytes_up"] for line in self.rounds)

    @property
    def accuracy(self) -> float | None:
        """The latest accuracy that is known: of the delivered head, or of the last one made."""
        known = [self.result.get("accuracy"), *(_accuracy(line) for line in reversed(self.rounds))]
        return next((value for value in known if value is not None), None)


def _accuracy(line: Values) -> float | None:
    tested: float | None = line.get("test_accuracy")
    return tested if tested is not None else line.get("accuracy")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedheadError(f"{path} cannot be read: {error}.") from None


def _json(path: Path) -> Values:
    if not path.is_file():
        return {}
    try:
        values = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise FedheadError(f"{path} is damaged: {error}.") from None
    if not isinstance(values, dict):
        raise FedheadError(f"{path} is damaged: it holds no JSON object.")
    return values


def _lines(path: Path) -> list[Values]:
    """Read JSON lines; a last one that was being written when the process was killed does not count."""
    if not path.is_file():
        return []
    *whole, _ = _text(path).split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise FedheadError(f"Line {number} of {path} is damaged.") from None
    return lines
