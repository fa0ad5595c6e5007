"""`fedhead flower-app`: a run as a Flower app, for an existing federation."""

from pathlib import Path
from typing import Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output


@app.command(
    "flower-app",
    epilog="Example: [bold]fedhead flower-app xray run.toml --classes ill,well && flwr run xray my-federation[/bold]",
)
@in_sentences
def flower_app(
    folder: Annotated[Path, typer.Argument(help="A new folder for the app.")],
    config: Annotated[Path | None, typer.Argument(help="A TOML file; flags lie over it.", show_default=False)] = None,
    backbone: Annotated[
        str | None, typer.Option(help="source:name, as in torchvision:resnet18.", rich_help_panel=options.RUN)
    ] = None,
    classes: options.Classes = None,
    classes_from: options.ClassesFrom = None,
    rounds: options.Rounds = None,
    set_: options.Assignments = None,
    out: Annotated[
        str, typer.Option(help="The run folder, on the SuperLink's machine.", rich_help_panel=options.OUTPUT)
    ] = "",
    debug: options.Debug = False,
) -> None:
    """Write a Flower app that runs this on an existing federation: flwr run."""
    from fedhead.server.flower_app import write_flower_app

    flags = {
        "backbone": backbone,
        "classes": options.names(classes),
        "classes_from": classes_from,
        "rounds": rounds,
    }
    path = write_flower_app(folder, options.run_config(config, set_, flags, {}), out)
    output().print(f"Wrote {path}. Run it with: flwr run {folder} CONNECTION --stream", soft_wrap=True)
