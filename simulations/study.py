"""`study(config, sweep, seeds)`: the same run under several seeds and settings, in one process, summed up."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.config import RunConfig, SimulationConfig, merge, parse_assignments
from fedhead.data import Samples, load_samples, load_sites
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import Progress
from fedhead.files import safe_name
from fedhead.registry import suggest
from fedhead.simulations.simulate import simulate

SCORES = ("", "_one_exchange", "_after_rounds", "_mean_site", "_worst_site")
"""Endings of the scores in `RunResult.summary`, after the score's own name."""

MEASURES = ("kept_round", "bytes_down", "bytes_up", "seconds_rounds")
"""Names of the other figures of a run that a study sums up."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the runs that have the figure.
        low: of the 95 % interval by Student's t; None for fewer than two runs.
        high: of the same.
        runs: how many.
    """

    mean: float
    low: float | None
    high: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return the mean of one value or more, and where it may be."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2:
            return cls(mean, None, None, count)
        from scipy.stats import t

        half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        settings: its swept values, by the keys of the sweep.
        seed: its seed.
        summary: `RunResult.summary()`; empty if it failed.
        error: why it failed; empty if it did not.
    """

    settings: Mapping[str, Any]
    seed: int
    summary: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Cell:
    """All runs of one point of the grid.

    Attributes:
        settings: the point, by the keys of the sweep.
        trials: one for every seed.
    """

    settings: Mapping[str, Any]
    trials: Sequence[Trial]

    def interval(self, measure: str) -> Interval | None:
        """Return the mean of a measure over the runs that have it; None if none has."""
        values = [trial.summary[measure] for trial in self.trials if trial.summary.get(measure) is not None]
        return Interval.of([float(value) for value in values]) if values else None


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        cells: in the order of the grid, the last key changing fastest.
        folder: where the runs' own folders are.
    """

    cells: Sequence[Cell]
    folder: Path

    @property
    def trials(self) -> list[Trial]:
        """All runs."""
        return [trial for cell in self.cells for trial in cell.trials]

    @property
    def score_name(self) -> str:
        """The name of the runs' score, such as `accuracy`."""
        return next((str(one.summary["score_name"]) for one in self.trials if one.summary), "accuracy")

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the figures that are summed up."""
        return (*(f"{self.score_name}{ending}" for ending in SCORES), *MEASURES)

    @property
    def failed(self) -> list[Trial]:
        """The runs that failed."""
        return [trial for trial in self.trials if trial.error]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        cells = []
        for cell in self.cells:
            intervals = {measure: cell.interval(measure) for measure in self.measures}
            found = {name: vars(interval) for name, interval in intervals.items() if interval is not None}
            cells.append({"settings": dict(cell.settings), "measures": found})
        runs = [
            {"settings": dict(one.settings), "seed": one.seed, "summary": dict(one.summary), "error": one.error}
            for one in self.trials
        ]
        return {"cells": cells, "runs": runs, "folder": str(self.folder)}

    def to_csv(self) -> str:
        """Return a line for each run: settings, seed, figures, folder, and the reason if it failed."""
        text = io.StringIO()
        keys = list(self.cells[0].settings)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*keys, "seed", *self.measures, "run_dir", "error"])
        for trial in self.trials:
            measured = [trial.summary.get(measure) for measure in self.measures]
            writer.writerow(
                [*trial.settings.values(), trial.seed, *measured, trial.summary.get("run_dir", ""), trial.error]
            )
        return text.getvalue()


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Turn texts such as `partition=iid,dirichlet:0.3` into the values of each key; a value is TOML, or else text.

    Raises:
        UserError: if one has no values, or a key occurs twice.
    """
    sweep: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not equals or not key.strip() or not all(values):
            raise UserError(f"Expected KEY=VALUE,VALUE, as in partition=iid,dirichlet:0.3, not {text!r}.")
        if key.strip() in sweep:
            raise UserError(f"The sweep of {key.strip()!r} occurs twice; list all its values once.")
        sweep[key.strip()] = [parse_assignments([f"value={value}"])["value"] for value in values]
    return sweep


def study(
    config: RunConfig,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | Sequence[int] = 1,
    data: str | Samples | None = None,
    sites: int | Sequence[npt.ArrayLike] | None = None,
    *,
    test_data: str | Samples | None = None,
    out: Path | str,
    on_extraction: Progress = lambda done, total: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Study:
    """Run `config` at every point of a grid, under every seed; features are extracted once for each backbone.

    A failed run is noted, and the others continue. Each has a folder of its own, whose `run.toml` reproduces it.

    Args:
        config: the common settings of all runs.
        sweep: values by key: a setting of the run (`head`, `rounds`), of its simulation (`partition`, `sites`), or of
            another table, as in `local.lr`.
        seeds: the seeds, or how many, counted from the config's.
        data: see `simulate`.
        sites: see there.
        test_data: see there.
        out: a folder for the runs'.
        on_extraction: see `simulate`.
        on_trial: called with each run, as it ends.

    Raises:
        UserError: if a key or a value is none; before anything is run.
    """
    sweep = dict(sweep or {})
    numbers = [config.seed + number for number in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise UserError("A study needs one seed or more.")
    points = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    planned = [
        (point, seed, config.changed(merge(_nested(point), {"seed": seed}))) for point in points for seed in numbers
    ]
    loaded = _Loaded()
    folder = Path(out)
    trials: dict[int, list[Trial]] = {}
    for number, (point, seed, chosen) in enumerate(planned):
        name = "-".join([*(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items()), f"seed-{seed}"])
        try:
            result = simulate(
                chosen,
                loaded.data(chosen) if data is None else data,
                sites,
                test_data=test_data,
                out=folder / safe_name(name),
                on_extraction=on_extraction,
            )
            trial = Trial(point, seed, result.summary())
        except FedheadError as error:
            trial = Trial(point, seed, {}, str(error))
        trials.setdefault(number // len(numbers), []).append(trial)
        on_trial(trial)
    return Study([Cell(point, trials[at]) for at, point in enumerate(points)], folder)


class _Loaded:
    """Data that runs share, loaded when the first of them asks for it."""

    def __init__(self) -> None:
        self._samples: dict[tuple[bool, str], Samples] = {}

    def data(self, config: RunConfig) -> Samples:
        """Return the data of a run."""
        table = config.simulation
        by_site = table.partition.partition(":")[0] == "folder"
        if (by_site, table.data) not in self._samples:
            load = load_sites if by_site else load_samples
            self._samples[by_site, table.data] = load(table.data)
        return self._samples[by_site, table.data]


def _nested(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point of the grid as changes to a configuration, nested as that is."""
    changes: dict[str, Any] = {}
    for key, value in point.items():
        path = key.split(".")
        if len(path) == 1 and key not in RunConfig.model_fields:
            if key not in SimulationConfig.model_fields:
                known = [*RunConfig.model_fields, *SimulationConfig.model_fields, "local.lr", "strategy.name"]
                raise UserError(f"There is no setting {key!r} to sweep. {suggest(key, known)}")
            path = ["simulation", key]
        if path == ["seed"]:
            raise UserError("Seeds are not swept but counted: --seeds 5.")
        one: Any = value
        for part in reversed(path):
            one = {part: one}
        changes = merge(changes, one)
    return changes
