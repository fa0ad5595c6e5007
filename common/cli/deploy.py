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
    kit: Annotated[Path, typer.Option(help="Kit of a site or of the coordinator.")],
    data: Annotated[str, typer.Option(help="Data spec of a site; by default that of its site.toml.")] = "",
    run: Annotated[Path | None, typer.Option(help="TOML file of the coordinator's run.")] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Make the coordinator run every TOML file in /var/lib/fedhead/queue.")
    ] = False,
    out: Annotated[str, typer.Option(help="Name of the run folder, in /var/lib/fedhead/runs.")] = "run",
    health: Annotated[
        str, typer.Option(help="Make it serve gRPC's health service at this address.", metavar="HOST:PORT")
    ] = "",
    source: Annotated[Path, typer.Option(help="Checkout of fedhead to build the image from.")] = Path(),
    user: Annotated[str, typer.Option(help="User that the unit runs as.")] = "fedhead",
    debug: options.Debug = False,
) -> None:
    """Print a systemd unit or a Compose file that restarts a coordinator or a site after failures and reboots."""
    from fedhead.server import deployment
    from fedhead.server.kit import CoordinatorKit

    program = "fedhead" if what == "compose" else shutil.which("fedhead") or "fedhead"
    if (kit / "coordinator.toml").is_file():
        port = split_address(CoordinatorKit.read(kit).listen)[1]
        if run is not None and not queue:
            service = deployment.coordinator_service(kit, run, out, port, health, program)
        elif queue and run is None:
            service = deployment.queue_service(kit, port, health, program)
        else:
            raise UserError("A coordinator needs --run FILE, the TOML file of its run, or --queue: one of the two.")
    else:
        service = deployment.site_service(kit, data, health, program)
    if what == "systemd":
        typer.echo(deployment.systemd_unit(service, user), nl=False)
    else:
        typer.echo(deployment.compose_file(service, source), nl=False)
