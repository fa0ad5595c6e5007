"""`fedhead fairness`: how good a model is in each group of rows."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.cli.predict import Device, Model, Weights, load_model
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.evaluation.metrics import Estimate
    from fedhead.evaluation.subgroups import GroupReport
    from fedhead.fairness import GroupCounts


@app.command(
    epilog="Example: [bold]fedhead fairness runs/xray --data 'csv:scans.csv?label=finding&group_by=sex' --out sex.json"
    "[/bold]"
)
@in_sentences
def fairness(
    model: Model,
    data: Annotated[str, typer.Option(help="Labelled rows, with the column of groups as group_by=COLUMN.")] = "",
    counts: options.Counts = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(help="For two classes: add each group's own threshold for this sensitivity to the last class."),
    ] = None,
    weights: Weights = "",
    device: Device = "auto",
    min_class_count: Annotated[
        int,
        typer.Option(
            help="Minimum rows of a group; the site withholds groups with fewer.", rich_help_panel=options.SITE
        ),
    ] = 5,
    strict_data: options.SiteStrictData = False,
    out: options.CountsFile = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare a model's accuracy and calibration between groups of rows, and name the worst; only counts leave."""
    from fedhead.data import load_samples
    from fedhead.errors import UserError
    from fedhead.evaluation.subgroups import compare_groups, worst_group
    from fedhead.fairness import GroupCounts, count_groups

    if not (data or counts):
        raise UserError("Give --data with labelled rows, or --counts with the counts of other sites.")
    loaded = load_model(model, weights, device)
    loaded.require_items("A comparison of groups")
    found = [GroupCounts.load(path, loaded) for path in counts or ()]
    if data:
        samples = load_samples(data)
        with progress_of("Features") as progress:
            found.append(
                count_groups(
                    loaded,
                    samples,
                    min_class_count=min_class_count,
                    strict=strict_data,
                    progress=progress,
                )
            )
    first, *others = found
    total = sum(others, start=first)
    groups = compare_groups(total.groups, total.classes, sensitivity)
    if out is not None:
        total.save(out)
    if as_json:
        values = {"groups": [one.to_dict() for one in groups], "withheld": total.withheld}
        typer.echo(json.dumps({**values, "sentence": worst_group(groups)}))
    else:
        _print(groups, total, worst_group(groups), output())


def _print(groups: "list[GroupReport]", total: "GroupCounts", sentence: str, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    thresholds = any(one.threshold is not None for one in groups)
    table.add_column("group", overflow="fold")
    for column in ("rows", "accuracy", "balanced", "calibration error", *(("threshold",) if thresholds else ())):
        table.add_column(column, justify="right")
    for one in groups:
        cells = [
            f"{one.metrics.rows:,}",
            _interval(one.metrics.accuracy),
            _interval(one.metrics.balanced_accuracy),
            percent(one.calibration_error),
        ]
        if thresholds:
            cells.append("" if one.threshold is None else f"{one.threshold:.3f}")
        table.add_row(one.name, *cells)
    console.print(table)
    console.print(sentence, highlight=False)
    if total.withheld:
        withheld = counted(total.withheld, "group")
        console.print(f"{withheld} withheld, with too few rows (--min-class-count).", highlight=False)


def _interval(estimate: "Estimate") -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    return f"{percent(estimate.value)} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"
