"""`fedhead client`: the long-running process of one site."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output
from fedhead.errors import UserError
from fedhead.logs import configure_logging
from fedhead.wording import size

if TYPE_CHECKING:
    from fedhead.client.settings import Kit, SiteSettings

DEFAULT_COORDINATOR = "127.0.0.1:9092"

_Kit = Annotated[
    Path | None,
    typer.Option(help="This site's kit, made by fedhead provision.", rich_help_panel=options.CONNECTION),
]
_Coordinator = Annotated[
    str | None,
    typer.Option(help="Coordinator's host:port; by default the kit's.", rich_help_panel=options.CONNECTION),
]
_CaBundle = Annotated[
    str | None,
    typer.Option(
        help="PEM file of further authorities, such as that of a reverse proxy before the coordinator.",
        rich_help_panel=options.CONNECTION,
    ),
]
_Site = Annotated[str | None, typer.Option(help="Site's name; by default the kit's.", rich_help_panel=options.SITE)]
_Data = Annotated[
    str | None,
    typer.Option(
        help="Data spec: folder:PATH, csv:FILE, python:MODULE:FUNCTION or another; by default the kit's.",
        rich_help_panel=options.SITE,
    ),
]
_Device = Annotated[
    str | None, typer.Option(help="Device: 'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=options.SITE)
]
_Precision = Annotated[
    str | None,
    typer.Option(
        help="Precision of extraction: 'float32', or 'mixed', faster on GPUs and on CPUs that multiply bfloat16.",
        rich_help_panel=options.SITE,
    ),
]
_StrictData = Annotated[
    bool | None,
    typer.Option(
        "--strict-data", help="Stop at unreadable rows instead of skipping them.", rich_help_panel=options.SITE
    ),
]
_MinClassCount = Annotated[
    int | None,
    typer.Option(
        help="Minimum training rows of a class; the site withholds classes with fewer. 0 for no limit.",
        rich_help_panel=options.SITE,
    ),
]
_MinRows = Annotated[
    int | None,
    typer.Option(
        help="Minimum rows; with fewer, the site takes no part. 0 for no limit.", rich_help_panel=options.SITE
    ),
]
_AllowBackbone = Annotated[
    list[str] | None,
    typer.Option(
        help="Accept these weights (sha256:HEX) or any weights of this spec; repeatable. Adds to the kit's list.",
        metavar="BACKBONE",
        rich_help_panel=options.SITE,
    ),
]
_Approve = Annotated[
    bool,
    typer.Option(
        "--approve",
        help="Ask at the terminal before each kind of release of a run, and before unknown weights are taken.",
        rich_help_panel=options.SITE,
    ),
]
_Payloads = Annotated[
    Path | None,
    typer.Option(
        help="Write each reply to this folder before it leaves, with a readable summary.",
        metavar="FOLDER",
        rich_help_panel=options.SITE,
    ),
]
_DryRun = Annotated[
    Path | None,
    typer.Option(
        help="Run this TOML file with this site alone: write its replies to --payloads (by default dry-run), and "
        "connect to nothing.",
        metavar="FILE",
        rich_help_panel=options.SITE,
    ),
]


@app.command(
    epilog="Example: [bold]fedhead client --kit kit/hospital-a --data folder:/data/xrays[/bold]\n\n"
    "On one machine: [bold]fedhead client --insecure --site here --data digits[/bold]"
)
@in_sentences
def client(
    kit: _Kit = None,
    insecure: options.Insecure = False,
    coordinator: _Coordinator = None,
    ca_bundle: _CaBundle = None,
    health: options.Health = "",
    site: _Site = None,
    data: _Data = None,
    device: _Device = None,
    precision: _Precision = None,
    strict_data: _StrictData = None,
    min_class_count: _MinClassCount = None,
    min_rows: _MinRows = None,
    allow_backbone: _AllowBackbone = None,
    approve: _Approve = False,
    payloads: _Payloads = None,
    dry_run: _DryRun = None,
    log_format: options.LogFormat = "text",
    log_file: options.LogFile = None,
    metrics: options.Metrics = "",
    metrics_anywhere: options.MetricsAnywhere = False,
    debug: options.Debug = False,
) -> None:
    """Take part in every run of a coordinator with this site's data, until stopped."""
    configure_logging(log_format, log_file)
    given = {
        "coordinator": coordinator,
        "ca_bundle": ca_bundle,
        "data": data,
        "device": device,
        "precision": precision,
        "strict_data": strict_data,
        "limits": _given({"min_class_count": min_class_count, "min_rows": min_rows}),
        "backbones": {"allow": allow_backbone} if allow_backbone else None,
    }
    opened, settings = _settings(kit, site, _given(given), insecure=insecure)
    if dry_run is not None:
        _dry_run(settings, dry_run, payloads or Path("dry-run"))
        return
    from fedhead.client.site import StopSite, serve
    from fedhead.monitoring import Monitoring

    with suppress(StopSite):
        ask = _ask if sys.stdin.isatty() else None
        monitoring = Monitoring(health, metrics, metrics_anywhere)
        serve(settings, opened, approve=approve, ask=ask, payloads=payloads, monitoring=monitoring)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settings(
    kit: Path | None, site: str | None, changes: dict[str, Any], *, insecure: bool
) -> tuple["Kit | None", "SiteSettings"]:
    """Return the kit, if any, and the settings of the site: the kit's with changes, or those of flags alone.

    Raises:
        UserError: if the flags contradict each other, or the settings are invalid.
    """
    from fedhead.client.settings import Kit

    if insecure == (kit is not None):
        raise UserError("A client needs --kit FOLDER, or on one machine --insecure: one of the two.")
    if kit is None:
        return None, _insecure_settings(site, changes)
    if site is not None:
        raise UserError("A kit has its site's name: leave --site away, or ask for a kit of that name.")
    opened = Kit(kit)
    return opened, opened.settings(changes)


def _dry_run(settings: "SiteSettings", run: Path, folder: Path) -> None:
    from fedhead.client.site_opening import require_data
    from fedhead.config import RunConfig
    from fedhead.simulations.dry_run import dry_run

    require_data(settings)
    written = dry_run(settings, RunConfig.from_toml(run), folder)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("reply", "rows", "size", "file"):
        table.add_column(column, justify="right" if column in ("rows", "size") else "left")
    for path in written:
        about = json.loads(path.read_text(encoding="utf-8"))
        table.add_row(about["action"], str(about["rows"]), size(about["bytes"]), str(path))
    output().print(table)
    output().print("Nothing was sent, and nothing was entered in the ledger.")


def _insecure_settings(site: str | None, changes: dict[str, Any]) -> "SiteSettings":
    from fedhead.client.settings import SiteSettings, require_loopback

    if site is None:
        raise UserError("Give the site a name: --site NAME.")
    settings = SiteSettings.from_values(
        {"name": site, "coordinator": DEFAULT_COORDINATOR, **changes}, "the command line"
    )
    require_loopback(settings.coordinator)
    return settings


def _ask(described: str) -> bool:
    errors.print("[bold]The coordinator asks for a release that nobody here has approved.[/bold]")
    errors.print(described, markup=False, highlight=False, soft_wrap=True)
    try:
        return typer.confirm("Agree, for this run and backbone?", err=True)
    except typer.Abort:
        return False
