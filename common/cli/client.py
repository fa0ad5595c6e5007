"""`fedhead client`: the long-running process of one site."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences
from fedhead.errors import UserError

if TYPE_CHECKING:
    from fedhead.client.settings import Kit, SiteSettings

CONNECTION = "The connection"
DEFAULT_COORDINATOR = "127.0.0.1:9092"


@app.command(
    epilog="Example: [bold]fedhead client --kit kit/hospital-a --data folder:/data/xrays[/bold]\n\n"
    "On one machine: [bold]fedhead client --insecure --site here --data digits[/bold]"
)
@in_sentences
def client(
    kit: Annotated[
        Path | None,
        typer.Option(help="The folder that the coordinator made for this site.", rich_help_panel=CONNECTION),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS or keys, on this machine only.", rich_help_panel=CONNECTION)
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port; by default the kit's.", rich_help_panel=CONNECTION)
    ] = None,
    health: Annotated[
        str,
        typer.Option(help="Serve gRPC's health service there.", metavar="HOST:PORT", rich_help_panel=CONNECTION),
    ] = "",
    site: Annotated[
        str | None, typer.Option(help="The site's name; a kit has one.", rich_help_panel=options.SITE)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="'digits', folder:PATH or python:MODULE:FUNCTION.", rich_help_panel=options.SITE)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=options.SITE)
    ] = None,
    strict_data: Annotated[
        bool | None,
        typer.Option(
            "--strict-data", help="Stop at unreadable rows instead of skipping.", rich_help_panel=options.SITE
        ),
    ] = None,
    min_class_count: Annotated[
        int | None,
        typer.Option(help="It withholds classes with fewer training rows; 0 for none.", rich_help_panel=options.SITE),
    ] = None,
    min_rows: Annotated[
        int | None, typer.Option(help="With fewer rows it takes no part; 0 for none.", rich_help_panel=options.SITE)
    ] = None,
    approve: Annotated[
        bool,
        typer.Option("--approve", help="Ask here before the first release of each kind.", rich_help_panel=options.SITE),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Take part with the data of this site, in every run of a coordinator, until it is stopped."""
    from fedhead.client.settings import Kit

    changes: dict[str, Any] = {
        key: value
        for key, value in {
            "coordinator": coordinator,
            "data": data,
            "device": device,
            "strict_data": strict_data,
        }.items()
        if value is not None
    }
    limits = {"min_class_count": min_class_count, "min_rows": min_rows}
    changes["limits"] = {key: value for key, value in limits.items() if value is not None}
    if insecure == (kit is not None):
        raise UserError("A client needs --kit FOLDER, or on one machine --insecure: one of the two.")
    if kit is not None:
        if site is not None:
            raise UserError("A kit has its site's name: leave --site away, or ask for a kit of that name.")
        opened = Kit(kit)
        _serve(opened.settings(changes), opened, approve, health)
    else:
        _serve(_insecure_settings(site, changes), None, approve, health)


def _insecure_settings(site: str | None, changes: dict[str, Any]) -> "SiteSettings":
    from fedhead.client.settings import SiteSettings, require_loopback

    if site is None:
        raise UserError("Give the site a name: --site NAME.")
    settings = SiteSettings.from_values(
        {"name": site, "coordinator": DEFAULT_COORDINATOR, **changes}, "the command line"
    )
    require_loopback(settings.coordinator)
    return settings


def _serve(settings: "SiteSettings", kit: "Kit | None", approve: bool, health: str) -> None:
    from fedhead.client.site import StopSite, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", force=True)
    for chatty in ("httpx", "flwr"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with suppress(StopSite):
        serve(settings, kit, approve=approve, ask=_ask if sys.stdin.isatty() else None, health=health)


def _ask(described: str) -> bool:
    errors.print("[bold]The coordinator asks for what was never released to it before.[/bold] The ledger would have:")
    errors.print(described, markup=False, highlight=False, soft_wrap=True)
    try:
        return typer.confirm("Release it, and from now on all of this kind?", err=True)
    except typer.Abort:
        return False
