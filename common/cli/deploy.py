"""`fedhead deploy`: a systemd unit or a Compose file for a kit."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedhead.addresses import split_address
from fedhead.cli import options
from fedhead.cli.application import app, in_sentences
from fedhead.errors import UserError


@app.command(
    epilog="Example: [bold]fedhead deploy systemd --kit /etc/fedhead/hospital-a --data folder:/data/xrays[/bold]"
)
@in_sentences
def deploy(
    what: Annotated[Literal["systemd", "compose"], typer.Argument(help="'systemd' or 'compose'.")],
    kit: Annotated[Path, typer.Option(help="A site's kit, or the coordinator's.")],
    data: Annotated[str, typer.Option(help="A site's data; by default what its site.toml says.")] = "",
    run: Annotated[Path | None, typer.Option(help="A coordinator's run, a TOML file.")] = None,
    out: Annotated[str, typer.Option(help="The name of its run folder, in /var/lib/fedhead/runs.")] = "run",
    health: Annotated[str, typer.Option(help="Have it serve gRPC's health service.", metavar="HOST:PORT")] = "",
    source: Annotated[Path, typer.Option(help="A checkout of fedhead, to build the image from.")] = Path(),
    user: Annotated[str, typer.Option(help="Whom the unit runs as.")] = "fedhead",
    debug: options.Debug = False,
) -> None:
    """Print what keeps a coordinator or a site up: after failures, and after the machine was started again."""
    from fedhead.server import deployment
    from fedhead.server.provision import CoordinatorKit

    program = "fedhead" if what == "compose" else shutil.which("fedhead") or "fedhead"
    if (kit / "coordinator.toml").is_file():
        if run is None:
            raise UserError("A coordinator needs --run FILE: the TOML file of its run.")
        port = split_address(CoordinatorKit.read(kit).listen)[1]
        service = deployment.coordinator_service(kit, run, out, port, health, program)
    else:
        service = deployment.site_service(kit, data, health, program)
    if what == "systemd":
        typer.echo(deployment.systemd_unit(service, user), nl=False)
    else:
        typer.echo(deployment.compose_file(service, source), nl=False)
