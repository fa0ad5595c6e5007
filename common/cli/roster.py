"""`fedhead roster`: the sites whose sums may be masked together, signed by the consortium's authority."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output
from fedhead.errors import FedheadError, UserError

if TYPE_CHECKING:
    from fedhead.secure.roster import Roster

roster = typer.Typer(help="Sign, verify and show the roster of secure summation.", no_args_is_help=True)
app.add_typer(roster, name="roster")

_PATH = typer.Argument(help="A roster.toml, or a site's kit.", show_default=False)


@roster.command(epilog="Example: [bold]fedhead roster sign hospital-a/request.pem hospital-b/request.pem[/bold]")
@in_sentences
def sign(
    requests: Annotated[
        list[Path] | None, typer.Argument(help="Requests by fedhead site init.", show_default=False)
    ] = None,
    key: Annotated[Path, typer.Option(help="The authority's private key; made if it is missing.")] = Path("roster.key"),
    out: Annotated[Path, typer.Option(help="The roster; extended if it exists.")] = Path("roster.toml"),
    remove: Annotated[
        list[str] | None, typer.Option(help="Site to remove; repeatable.", metavar="NAME", show_default=False)
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Add sites to the roster, or remove some, and sign it with the authority's key."""
    from fedhead.secure.session import MIN_SITES
    from fedhead.server.rosters import authority_key, requested_members, sign_roster
    from fedhead.wording import counted

    if not requests and not remove:
        raise UserError("Nothing to sign: give the requests of sites to add, or --remove NAME.")
    members = requested_members(requests or [])
    if not members and not key.exists():
        raise UserError(f"There is no authority's key {key}.")
    signed = sign_roster(out, authority_key(key, make=True), members, remove or [])
    _print(signed)
    if len(signed.sites) < MIN_SITES:
        errors.print(
            f"[bold yellow]Warning:[/bold yellow] The roster has {counted(len(signed.sites), 'site')}, and a secure "
            f"sum needs {MIN_SITES}: until more are added, no run can use it.",
            highlight=False,
        )
    output().print(
        f"Signed {out}. Compare each new site's key with the site by telephone: fedhead site init showed it. Send "
        f"{out} to the coordinator and to every site, which must accept it after comparing the fingerprint "
        f"{signed.fingerprint}. Keep {key} secret.",
        highlight=False,
        soft_wrap=True,
    )


@roster.command(epilog="Example: [bold]fedhead roster show roster.toml[/bold]")
@in_sentences
def show(path: Annotated[Path, _PATH], debug: options.Debug = False) -> None:
    """Show the sites of a roster, their keys, and its fingerprint in words."""
    from fedhead.secure.roster import Roster

    _print(Roster.read(_file(path)))


@roster.command(epilog="Example: [bold]fedhead roster verify kit/hospital-a[/bold]")
@in_sentences
def verify(
    path: Annotated[Path, _PATH],
    accept: Annotated[
        str | None,
        typer.Option(
            help="Accept the roster at this site if this is its fingerprint, as the authority says it.",
            metavar="WORDS",
            show_default=False,
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Check a roster's signature; for a site's kit, also its own keys and what has changed. Accept it with --accept."""
    from fedhead.client import accepted_roster
    from fedhead.client.settings import Kit
    from fedhead.secure.roster import Roster

    found = Roster.read(_file(path))
    found.verify()
    console = output()
    console.print(f"The signature of the authority is valid. Fingerprint: {found.fingerprint}.", highlight=False)
    if not path.is_dir():
        if accept is not None:
            raise UserError(f"--accept is for a site's kit, and {path} is a file.")
        return
    kit = Kit(path)
    name = kit.settings({}).name
    keys = kit.site_keys()
    if name not in found.sites or found.sites[name] != keys.member:
        raise FedheadError(
            f"The roster does not have the site {name} with the keys in {path}. Send {path / 'request.pem'} to the "
            "authority again."
        )
    before = accepted_roster.accepted(path, name)
    if accept is None:
        if before is not None and before.digest == found.digest:
            console.print(f"The site {name} is in it with its own keys, and has accepted it.", highlight=False)
            return
        changes = [] if before is None else accepted_roster.changes(before, found)
        about = "; ".join(changes) if changes else "none was accepted before"
        console.print(
            f"The site {name} is in it with its own keys, and has not accepted it ({about}). Compare the fingerprint "
            f"with the authority by telephone, then: fedhead roster verify {path} --accept WORDS",
            highlight=False,
            soft_wrap=True,
        )
        return
    if accept.strip().lower().replace(" ", "-") != found.fingerprint:
        raise UserError(
            "These are not the words of this roster: do not accept it, and ask the authority which roster it signed."
        )
    accepted_roster.accept(path, name, found)
    console.print(f"The site {name} has accepted the roster.", highlight=False)


def _file(path: Path) -> Path:
    return path / "roster.toml" if path.is_dir() else path


def _print(shown: "Roster") -> None:
    from fedhead.certificates import fingerprint
    from fedhead.secure import SecureSumError

    try:
        shown.verify()
        state = "valid"
    except SecureSumError as error:
        state = f"[red]{error}[/red]"
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Fingerprint", shown.fingerprint)
    lines.add_row("Authority", fingerprint(shown.authority.encode()))
    lines.add_row("Signature", state)
    console = output()
    console.print(lines, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "key", "sealing key"):
        table.add_column(column)
    for name, member in sorted(shown.sites.items()):
        table.add_row(name, fingerprint(member.signing_pem), fingerprint(member.sealing_bytes))
    console.print(table, highlight=False)
