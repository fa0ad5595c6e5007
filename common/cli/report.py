"""`fedhead report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences


@app.command(epilog="Example: [bold]fedhead report runs/first --out first.html[/bold]")
@in_sentences
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.", rich_help_panel=options.RUN)],
    out: Annotated[
        Path | None,
        typer.Option(help="The file; by default report.html in the run folder.", rich_help_panel=options.OUTPUT),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write the report of a run again: one HTML file that needs nothing else."""
    from fedhead.server.report import write_report

    typer.echo(str(write_report(run, out)))
