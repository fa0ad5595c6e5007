"""`fedhead report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences


@app.command(epilog="Example: [bold]fedhead report runs/first --out first.html[/bold]")
@in_sentences
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.", rich_help_panel=options.RUN)],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default report.html in the run folder.", rich_help_panel=options.OUTPUT),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write a run's report again, as one self-contained HTML file."""
    from fedhead.server.report import write_report

    typer.echo(str(write_report(run, out)))
