"""`fedhead worth`: the value of each site of a finished run."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.wording import signed

if TYPE_CHECKING:
    from fedhead.evaluation.worth import Worth


@app.command(epilog="Example: [bold]fedhead worth runs/first[/bold]")
@in_sentences
def worth(
    run: options.FinishedRun,
    permutations: Annotated[
        int | None,
        typer.Option(
            min=40,
            help="Orders of the sites to sample; by default values are exact up to 12 sites, and 100 orders beyond.",
            show_default=False,
            rich_help_panel=options.RUN,
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compute the value of each site of a finished run from its sums: Shapley values and leave-one-out losses."""
    from fedhead.server.report import write_report
    from fedhead.server.runs.worth import worth_of_run

    with progress_of("Coalitions") as progress:
        found = worth_of_run(
            run,
            permutations=permutations or 0,
            progress=progress,
        )
    write_report(run)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        _print(found, output())


def _print(found: "Worth", console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", overflow="fold")
    for column in ("rows", "Shapley value", "alone", "lost without it"):
        table.add_column(column, justify="right")
    for one in sorted(found.sites, key=lambda one: (-one.shapley, one.site)):
        limits = f" ({100 * one.low:.1f} to {100 * one.high:.1f})" if found.permutations else ""
        table.add_row(
            one.site,
            f"{one.rows:,}",
            f"{100 * one.shapley:.1f} %{limits}",
            f"{100 * one.alone:.1f} %",
            signed(100 * one.leave_one_out, 2),
        )
    console.print(table)
    how = f"from {found.permutations} sampled orders of the sites" if found.permutations else "exact"
    console.print(
        f"Shares of the variance of {found.rows_held_out:,} held-out rows that the ridge head explains; all sites: "
        f"{100 * found.value:.1f} %. Shapley values are {how}.",
        highlight=False,
    )
