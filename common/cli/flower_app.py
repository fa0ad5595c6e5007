"""`fedhead flower-app`: a run as a Flower app, for an existing federation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output
from fedhead.cli.settings import SettingsCommand, with_settings


@app.command(
    "flower-app",
    cls=SettingsCommand,
    epilog="Example: [bold]fedhead flower-app xray run.toml --classes ill,well && flwr run xray my-federation[/bold]",
)
@in_sentences
@with_settings(("backbone", "classes", "classes_from", "rounds"))
def flower_app(
    settings: dict[str, Any],
    folder: Annotated[Path, typer.Argument(help="New folder for the app.")],
    config: Annotated[Path | None, typer.Argument(help="TOML file; flags override it.", show_default=False)] = None,
    set_: options.Assignments = None,
    out: Annotated[
        str, typer.Option(help="The run folder, on the SuperLink's machine.", rich_help_panel=options.OUTPUT)
    ] = "",
    debug: options.Debug = False,
) -> None:
    """Write a Flower app that runs on an existing federation with flwr run."""
    from fedhead.server.flower_app import write_flower_app

    path = write_flower_app(folder, options.run_config(config, set_, settings), out)
    output().print(f"Wrote {path}. Run it with: flwr run {folder} CONNECTION --stream", soft_wrap=True)
