"""`fedhead solve`: another question to a finished run, answered from its sums."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.server.runs.solve import Solved


@app.command(epilog="Example: [bold]fedhead solve runs/xray --merge mild+severe=ill --without north --out ill[/bold]")
@in_sentences
def solve(
    run: options.FinishedRun,
    out: Annotated[
        Path, typer.Option(help="New folder for the model.", show_default=False, rich_help_panel=options.OUTPUT)
    ],
    classes: Annotated[
        str,
        typer.Option(metavar="A,B", help="Classes or targets to keep; by default all.", rich_help_panel=options.RUN),
    ] = "",
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A+B=NAME", help="Classes to merge, as in mild+severe=ill; repeatable.", rich_help_panel=options.RUN
        ),
    ] = None,
    priors: Annotated[
        str,
        typer.Option(
            metavar="PRIORS",
            help="Class priors: 'empirical', 'uniform' or A=0.2,B=0.8; by default those of the closed form.",
            rich_help_panel=options.RUN,
        ),
    ] = "",
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="Site to leave out; repeatable.", rich_help_panel=options.RUN),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="Closed form: lda, ridge or nearest-mean; by default the run's.", rich_help_panel=options.RUN
        ),
    ] = "",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Solve a sub-problem of a finished run from its sums, without an exchange: other classes, priors or sites."""
    from fedhead.server.runs.solve import SubProblem
    from fedhead.server.runs.solve import solve as solve_again

    problem = SubProblem(classes, tuple(merge or ()), priors, tuple(without or ()), init)
    solved = solve_again(run, out, problem)
    if as_json:
        typer.echo(json.dumps(asdict(solved)))
    else:
        print_solved(solved, output())


def print_solved(solved: "Solved", console: Console) -> None:
    """Print a solved sub-problem."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Head", f"{solved.method}, from the sums of {counted(solved.sites, 'site')}")
    lines.add_row("Rows", ", ".join(f"{name}: {rows}" for name, rows in solved.rows.items()))
    if solved.priors:
        lines.add_row("Priors", ", ".join(f"{name}: {percent(share)}" for name, share in solved.priors.items()))
    for note in solved.notes:
        lines.add_row("Note", note)
    lines.add_row("Model", solved.out)
    console.print(lines, highlight=False)
