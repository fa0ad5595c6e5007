"""`fedhead monitor`: whether the rows that a model meets today are like those that it was made from."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.cli.predict import Device, Model, Weights, load_model
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.drift import Drift, DriftCounts
    from fedhead.model import TransferModel


@app.command(epilog="Example: [bold]fedhead monitor runs/xray /data/today --out counts.json[/bold]")
@in_sentences
def monitor(
    model: Model,
    paths: Annotated[
        list[str] | None, typer.Argument(help="New files, folders, patterns, or CSV files with a column path or text.")
    ] = None,
    data: Annotated[str, typer.Option(help="New rows as a data spec instead: folder:PATH, csv:FILE or another.")] = "",
    counts: options.Counts = None,
    weights: Weights = "",
    device: Device = "auto",
    min_rows: options.SiteMinRows = 20,
    strict_data: options.SiteStrictData = False,
    out: options.CountsFile = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Count foreign inputs and drift among new rows; only counts are printed or written, never a row."""
    from fedhead.drift import DriftCounts, compare_drift
    from fedhead.errors import UserError

    found = [DriftCounts.load(path) for path in counts or ()]
    if paths and data:
        raise UserError("Give files or --data, not both.")
    if not (paths or data or found):
        raise UserError("Give new files, --data with new rows, or --counts with the counts of other sites.")
    loaded = load_model(model, weights, device)
    if paths or data:
        found.append(_counted(loaded, paths or [], data, min_rows, strict_data))
    drift = compare_drift(loaded, found)
    first, *others = found
    total = sum(others, start=first)
    if out is not None:
        total.save(out)
    if as_json:
        typer.echo(json.dumps({**asdict(drift), "predicted": dict(total.predicted), "sentence": drift.sentence}))
    else:
        _print(drift, total, output())


def _counted(model: "TransferModel", paths: list[str], data: str, min_rows: int, strict: bool) -> "DriftCounts":
    from fedhead.data import load_samples
    from fedhead.data.inputs import find_inputs
    from fedhead.drift import count_drift, count_inputs

    with progress_of("Features") as show:
        if data:
            return count_drift(model, load_samples(data), min_rows=min_rows, strict=strict, progress=show)
        columns = getattr(model.backbone.preprocessing, "columns", ())
        inputs = find_inputs(paths, model.backbone.kind, columns)
        return count_inputs(model, inputs, min_rows=min_rows, strict=strict, progress=show)


def _print(drift: "Drift", total: "DriftCounts", console: Console) -> None:
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Rows", f"{drift.rows:,}, compared with {drift.rows_known:,} held-out rows of the run")
    limits = f"{percent(drift.foreign_low)} to {percent(drift.foreign_high)}"
    lines.add_row(
        "Foreign",
        f"{percent(drift.foreign)} ({limits}) are unlike anything seen; {percent(drift.expected)} or less are expected",
    )
    lines.add_row("Distances", f"differ by {percent(drift.statistic)} at most (p = {drift.p_value:.2g})")
    if total.predicted:
        most = sorted(total.predicted.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = ", ".join(f"{name}: {percent(count / total.rows)}" for name, count in most[:8] if count)
        rest = sum(1 for _, count in most[8:] if count)
        lines.add_row("Predicted", shown + (f" and {counted(rest, 'more class', 'more classes')}" if rest else ""))
    lines.add_row("Finding", drift.sentence)
    console.print(lines, highlight=False)
