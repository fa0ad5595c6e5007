"""`fedhead simulate --seeds N --sweep KEY=VALUES`: many runs, one table."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli.application import output, progress_bars
from fedhead.errors import FedheadError
from fedhead.wording import size

if TYPE_CHECKING:
    from fedhead.config import RunConfig
    from fedhead.simulations.study import Interval, Study


def run_study(
    config: "RunConfig", seeds: int, sweep: list[str], out: Path | None, csv: Path | None, *, as_json: bool
) -> None:
    """Run a study, print its table, and exit with 1 if a run failed."""
    from fedhead.files import write_atomically
    from fedhead.simulations.study import parse_sweep, study

    grid = parse_sweep(sweep)
    runs = seeds
    for values in grid.values():
        runs *= len(values)
    with progress_bars() as progress:
        extraction = progress.add_task("Features", total=None)
        task = progress.add_task("Runs", total=runs)
        found = study(
            config,
            grid,
            seeds,
            out=out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-study",
            on_extraction=lambda done, total: progress.update(extraction, completed=done, total=total),
            on_trial=lambda trial: progress.advance(task),
        )
    if csv is not None:
        write_atomically(csv, found.to_csv())
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print_study(found)
    if found.failed:
        raise FedheadError(f"{len(found.failed)} of {runs} runs failed; the others are complete. {_reasons(found)}")


def _print_study(study: "Study") -> None:
    console = output()
    keys = list(study.cells[0].settings)
    table = Table(title="Mean over seeds, with 95 % intervals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for key in keys:
        table.add_column(key, no_wrap=True)
    for column in ("runs", "R2" if study.score_name == "r2" else study.score_name, "worst site", "traffic", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for cell in study.cells:
        down, up, seconds = (cell.interval(name) for name in ("bytes_down", "bytes_up", "seconds_rounds"))
        table.add_row(
            *(str(cell.settings[key]) for key in keys),
            str(sum(not trial.error for trial in cell.trials)),
            _scored(cell.interval(study.score_name), study.score_name),
            _scored(cell.interval(f"{study.score_name}_worst_site"), study.score_name),
            "-" if down is None or up is None else size(round(down.mean + up.mean)),
            "-" if seconds is None else f"{seconds.mean:.2f}",
        )
    console.print(table)
    console.print(f"Run folders  {study.folder}", highlight=False)


def _reasons(study: "Study") -> str:
    """Return why runs failed, each reason once with the first run that it is of."""
    first = {trial.error: trial for trial in reversed(study.failed)}
    return " ".join(
        f"{', '.join([*(f'{key} {value}' for key, value in trial.settings.items()), f'seed {trial.seed}'])}: {reason}"
        for reason, trial in reversed(first.items())
    )


def _scored(interval: "Interval | None", name: str) -> str:
    """Return a score with its interval, an accuracy in per cent."""
    if interval is None:
        return "-"
    factor, form = (100, ".1f") if name == "accuracy" else (1, ".3f")
    if interval.low is None or interval.high is None:
        return f"{factor * interval.mean:{form}}"
    return f"{factor * interval.mean:{form}} ± {factor / 2 * (interval.high - interval.low):{form}}"
