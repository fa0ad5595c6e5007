"""`fedhead provision`: keys and certificates for a coordinator and its sites."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output

if TYPE_CHECKING:
    from fedhead.server.kit import CoordinatorKit

KIT = "The kit"

_Coordinator = Annotated[
    str | None, typer.Option(help="Address that sites connect to.", metavar="HOST:PORT", rich_help_panel=KIT)
]
_Sites = Annotated[
    list[str] | None, typer.Option(help="Name of a site; repeatable.", metavar="NAME", rich_help_panel=KIT)
]
_Also = Annotated[
    list[str] | None,
    typer.Option(help="Another name or address of the coordinator; repeatable.", metavar="HOST", rich_help_panel=KIT),
]
_Out = Annotated[Path, typer.Option(help="Folder of kits.", rich_help_panel=KIT)]
_Run = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of a run, whose backbone the new kits allow. Its weights are loaded for their digest.",
        metavar="FILE",
        rich_help_panel=KIT,
    ),
]
_Days = Annotated[
    int,
    typer.Option(min=1, max=3650, help="Validity of the coordinator's certificate, in days.", rich_help_panel=KIT),
]
_AddSites = Annotated[
    list[str] | None, typer.Option(help="Site to add; repeatable.", metavar="NAME", rich_help_panel=KIT)
]
_Sign = Annotated[
    list[Path] | None,
    typer.Option(
        help="Request of a site that made its own key with fedhead site init; repeatable.", rich_help_panel=KIT
    ),
]
_Revoke = Annotated[
    list[str] | None,
    typer.Option(help="Site to refuse from now on; repeatable.", metavar="NAME", rich_help_panel=KIT),
]
_Renew = Annotated[bool, typer.Option("--renew", help="Renew the coordinator's certificate.", rich_help_panel=KIT)]
_Show = Annotated[
    Path | None,
    typer.Option(help="Folder of kits to show, with its sites and expiry dates.", rich_help_panel=KIT),
]


@app.command(
    epilog="Example: [bold]fedhead provision --coordinator coord.example.org:9092 --site hospital-a --site hospital-b "
    "--out kit/[/bold]"
)
@in_sentences
def provision(
    coordinator: _Coordinator = None,
    site: _Sites = None,
    also: _Also = None,
    out: _Out = Path("kit"),
    run: _Run = None,
    days: _Days = 730,
    add_site: _AddSites = None,
    sign: _Sign = None,
    revoke: _Revoke = None,
    renew: _Renew = False,
    show: _Show = None,
    debug: options.Debug = False,
) -> None:
    """Make a private certificate authority, and a folder of keys for the coordinator and each site."""
    from fedhead.certificates import read_request
    from fedhead.config import RunConfig
    from fedhead.errors import UserError
    from fedhead.server import provision as kits
    from fedhead.server.kit import CoordinatorKit

    if show is not None:
        _show(show)
        return
    if run is not None and not (site or add_site or sign):
        raise UserError(
            "--run is for new kits: give --site, --add-site or --sign. Edit the site.toml of existing kits."
        )
    if also and not (coordinator or renew):
        raise UserError(
            "--also is for the coordinator's certificate: give it with --coordinator for a new kit, or with --renew."
        )
    for request in sign or ():
        # Before anything is made.
        read_request(request)
    backbones = {} if run is None else kits.backbones_of(RunConfig.from_toml(run))
    changes = [name for name, given in (("--add-site", add_site), ("--revoke", revoke), ("--renew", renew)) if given]
    if coordinator or site:
        if not (site or sign):
            raise UserError("No site is named: --site NAME or --sign REQUEST for each.")
        if changes or not coordinator:
            raise UserError(
                "A new kit takes --coordinator HOST:PORT and --site NAME; --add-site, --revoke and --renew change one."
            )
        kits.provision(out, coordinator, site or [], also or [], days, backbones)
        _say_made(out)
    elif not changes and not sign:
        raise UserError(
            "Nothing to do: --coordinator HOST:PORT --site NAME, --add-site, --sign, --revoke, --renew or --show."
        )
    _change(
        out, backbones, add_site or [], sign or [], revoke or [], also or [], days, renew=renew, new=bool(coordinator)
    )
    _warn(CoordinatorKit.read(out / "coordinator"))


def _change(
    out: Path,
    backbones: dict[str, str],
    add_site: list[str],
    sign: list[Path],
    revoke: list[str],
    also: list[str],
    days: int,
    *,
    renew: bool,
    new: bool,
) -> None:
    """Change the kits in a folder, and print the files to copy."""
    from fedhead.certificates import fingerprint
    from fedhead.server import provision as kits
    from fedhead.server.site_requests import sign_requests

    console = output()
    if add_site:
        kits.add_sites(out, add_site, backbones)
        folders = ", ".join(str(out / name) for name in add_site)
        console.print(f"Made {folders}. Copy each to its site alone.", highlight=False)
    for name, key in sign_requests(out, sign, backbones).items() if sign else ():
        console.print(
            f"Registered {name} with the key {fingerprint(key)}. Ask the site whether fedhead site init showed this "
            f"key, and send it {out / name}, which holds no secret.",
            highlight=False,
        )
    if revoke:
        kits.revoke(out, revoke)
        console.print(f"Revoked {', '.join(revoke)}.", highlight=False)
    if renew:
        kits.renew(out, also, days)
        console.print(
            f"Renewed {out / 'coordinator' / 'server.pem'}; copy it and server.key to the coordinator, and start "
            "it again.",
            highlight=False,
        )
    if add_site or sign or revoke:
        _say_changed(out, new)


def _say_made(out: Path) -> None:
    output().print(
        f"Made {out}. Copy {out / 'coordinator'} to the coordinator, and each site's folder to that site alone. "
        f"Keep {out / 'ca.key'} and {out / 'roster.key'} secret: whoever has the first can pretend to be the "
        "coordinator, and whoever has the second decides whom the sites of a secure sum trust.",
        highlight=False,
    )


def _say_changed(out: Path, new: bool) -> None:
    output().print(
        f"Copy {out / 'coordinator' / 'sites.toml'} to the coordinator, if it is another machine; one that runs "
        "reads it within seconds.",
        highlight=False,
    )
    roster = out / "coordinator" / "roster.toml"
    if roster.is_file():
        said = "Every kit has the roster of secure sums. A site that made its own key must accept it"
        if not new:
            said = (
                f"The roster of secure sums has changed. Copy {roster} to the coordinator and to every site, which "
                "must accept it"
            )
        output().print(f"{said}: fedhead roster verify KIT --accept WORDS.", highlight=False)


def _warn(kit: "CoordinatorKit") -> None:
    from fedhead.server.kit import expiry_warnings

    for sentence in expiry_warnings(kit):
        errors.print(f"[bold yellow]Warning:[/bold yellow] {sentence}", highlight=False)


def _show(folder: Path) -> None:
    from fedhead.certificates import fingerprint
    from fedhead.server.kit import CoordinatorKit, validity

    kit = CoordinatorKit.read(folder / "coordinator" if (folder / "coordinator").is_dir() else folder)
    console = output()
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Coordinator", kit.address)
    for what, until in validity(kit).items():
        lines.add_row(what, f"valid until {until:%Y-%m-%d}")
    console.print(lines, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "key", "state"):
        table.add_column(column)
    for name, key in sorted(kit.sites.items()):
        table.add_row(name, fingerprint(key), "registered")
    for key, name in kit.revoked.items():
        table.add_row(name, fingerprint(key), "revoked")
    console.print(table, highlight=False)
    _warn(kit)
