"""What a benchmark gives: seconds, ratios and the setting they hold in, as a table or one JSON object."""

import gc
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Measure fedhead against its peers, all in one run.", no_args_is_help=True, add_completion=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Repeats = Annotated[int, typer.Option(help="Time each of the quick ones so often, and take the least.", min=1)]

OURS = "fedhead"


@app.callback()
def benchmarks() -> None:
    """Measure fedhead against its peers, all in one run."""


@dataclass(frozen=True)
class Measurement:
    """What one benchmark found.

    Attributes:
        title: of the measurement, in a few words.
        seconds: the time of each.
        setting: sizes, versions and the machine of the figures.
        ratio: of each to ours, where seconds are of the same work; other figures by name.
        units: what `ratio` counts.
        left_out: peers that are not installed, with how to install them.
        columns: more columns of the table, by name and by the row's name; the key `runs` of `setting` holds them.
    """

    title: str
    seconds: Mapping[str, float]
    setting: Mapping[str, Any]
    ratio: Mapping[str, float]
    units: str = "times ours"
    left_out: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def against_ours(
        cls,
        title: str,
        seconds: Mapping[str, float],
        setting: Mapping[str, Any],
        left_out: Mapping[str, str] | None = None,
    ) -> "Measurement":
        """Compare the seconds of all others with ours, for the same work."""
        ratio = {name: value / seconds[OURS] for name, value in seconds.items() if name != OURS}
        return cls(title, seconds, setting, ratio, left_out=left_out or {})

    def show(self, *, as_json: bool) -> None:
        """Print everything."""
        setting = {**self.setting, **machine(), "left_out": dict(self.left_out)}
        if as_json:
            typer.echo(json.dumps({"seconds": dict(self.seconds), "ratio": dict(self.ratio), "setting": setting}))
            return
        console = Console(markup=False, emoji=False, highlight=False)
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("seconds", justify="right")
        if self.ratio:
            table.add_column(self.units, justify="right")
        more = list(dict.fromkeys(column for columns in self.columns.values() for column in columns))
        for column in more:
            table.add_column(column, justify="right")
        for name in [*self.seconds, *(key for key in self.ratio if key not in self.seconds)]:
            values = [self.seconds.get(name), *([self.ratio.get(name)] if self.ratio else [])]
            cells = ["" if value is None else f"{value:.3g}" for value in values]
            table.add_row(name, *cells, *(self.columns.get(name, {}).get(column, "") for column in more))
        console.print(table)
        hidden = ("left_out", "runs")
        for name, advice in self.left_out.items():
            console.print(f"{name} is left out: {advice}")
        console.print(", ".join(f"{key} {value}" for key, value in setting.items() if key not in hidden))


def machine() -> dict[str, Any]:
    """Return the conditions that figures depend on, other than the code."""
    return {
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return the least seconds that `work` took, and its last result."""
    least, made = float("inf"), None
    for _ in range(repeats):
        gc.collect()
        started = time.perf_counter()
        made = work()
        least = min(least, time.perf_counter() - started)
    return least, made


def missing(*modules: str) -> bool:
    """Return whether one of `modules` is not installed."""
    return any(importlib.util.find_spec(module) is None for module in modules)
