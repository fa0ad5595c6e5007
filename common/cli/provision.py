"""`fedhead provision`: keys and certificates for a coordinator and its sites."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output

if TYPE_CHECKING:
    from fedhead.server.provision import CoordinatorKit

KIT = "The kit"


@app.command(
    epilog="Example: [bold]fedhead provision --coordinator coord.example.org:9092 --site hospital-a --site hospital-b "
    "--out kit/[/bold]"
)
@in_sentences
def provision(
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT that sites connect to.", metavar="HOST:PORT", rich_help_panel=KIT)
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="A site's name; once for each.", metavar="NAME", rich_help_panel=KIT)
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="A further name or address of the coordinator.", metavar="HOST", rich_help_panel=KIT),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of kits.", rich_help_panel=KIT)] = Path("kit"),
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long the coordinator's certificate is valid.", rich_help_panel=KIT)
    ] = 730,
    add_site: Annotated[
        list[str] | None, typer.Option(help="Make a kit for a further site.", metavar="NAME", rich_help_panel=KIT)
    ] = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="Refuse a site from now on.", metavar="NAME", rich_help_panel=KIT)
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make the coordinator a new certificate.", rich_help_panel=KIT)
    ] = False,
    show: Annotated[
        Path | None,
        typer.Option(help="Show what a folder of kits holds, and until when it is valid.", rich_help_panel=KIT),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Make a private certificate authority, and a folder of keys for the coordinator and each site."""
    from fedhead.errors import UserError
    from fedhead.server import provision as kits

    console = output()
    if show is not None:
        _show(show)
        return
    changes = [name for name, given in (("--add-site", add_site), ("--revoke", revoke), ("--renew", renew)) if given]
    if coordinator or site:
        if changes or not coordinator:
            raise UserError(
                "A new kit takes --coordinator HOST:PORT and --site NAME; --add-site, --revoke and --renew change one."
            )
        kits.provision(out, coordinator, site or [], also or [], days)
        console.print(
            f"Made {out}. Copy {out / 'coordinator'} to the coordinator, and each site's folder to that site alone. "
            f"Keep {out / 'ca.key'} secret: whoever has it can pretend to be the coordinator.",
            highlight=False,
        )
    elif not changes:
        raise UserError("Nothing to do: --coordinator HOST:PORT --site NAME, --add-site, --revoke, --renew or --show.")
    if add_site:
        kits.add_sites(out, add_site)
        folders = ", ".join(str(out / name) for name in add_site)
        console.print(f"Made {folders}. Copy each to its site alone.", highlight=False)
    if revoke:
        kits.revoke(out, revoke)
        console.print(f"Revoked {', '.join(revoke)}.", highlight=False)
    if renew:
        kits.renew(out, also or [], days)
        console.print(
            f"Renewed {out / 'coordinator' / 'server.pem'}; copy it and server.key to the coordinator, and start "
            "it again.",
            highlight=False,
        )
    if add_site or revoke:
        console.print(
            f"Copy {out / 'coordinator' / 'sites.toml'} to the coordinator, if it is another machine; one that runs "
            "reads it within seconds.",
            highlight=False,
        )
    _warn(kits.CoordinatorKit.read(out / "coordinator"))


def _warn(kit: "CoordinatorKit") -> None:
    from fedhead.server.provision import expiry_warnings

    for sentence in expiry_warnings(kit):
        errors.print(f"[bold yellow]Warning:[/bold yellow] {sentence}", highlight=False)


def _show(folder: Path) -> None:
    from fedhead.server import provision as kits

    kit = kits.CoordinatorKit.read(folder / "coordinator" if (folder / "coordinator").is_dir() else folder)
    console = output()
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Coordinator", kit.address)
    for what, until in kits.validity(kit).items():
        lines.add_row(what, f"valid until {until:%Y-%m-%d}")
    console.print(lines, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "key", "state"):
        table.add_column(column)
    for name, key in sorted(kit.sites.items()):
        table.add_row(name, kits.fingerprint(key), "registered")
    for key, name in kit.revoked.items():
        table.add_row(name, kits.fingerprint(key), "revoked")
    console.print(table, highlight=False)
    _warn(kit)
