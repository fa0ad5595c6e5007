"""`fedhead server`: a run over real sites, from this machine."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from fedhead.addresses import split_address
from fedhead.cli import options
from fedhead.cli.application import app, errors, in_sentences, output
from fedhead.cli.observers import watching
from fedhead.cli.status import LiveTables, run_tables
from fedhead.errors import UserError

if TYPE_CHECKING:
    from fedhead.server.status import RunStatus

CONNECTION = "The connection"
DEFAULT_PORT = 9092
TERMINATED = 143


@app.command(
    epilog="Example: [bold]fedhead server run.toml --kit kit/coordinator --min-sites 2 --out runs/xray[/bold]\n\n"
    "On one machine: [bold]fedhead server run.toml --insecure[/bold]"
)
@in_sentences
def server(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; flags lie over it.", show_default=False)] = None,
    kit: Annotated[
        Path | None,
        typer.Option(help="The coordinator's folder that fedhead provision made.", rich_help_panel=CONNECTION),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS or keys, on this machine only.", rich_help_panel=CONNECTION)
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="To listen on; by default the kit's, or 9092.", rich_help_panel=CONNECTION),
    ] = None,
    health: Annotated[
        str,
        typer.Option(help="Serve gRPC's health service there.", metavar="HOST:PORT", rich_help_panel=CONNECTION),
    ] = "",
    min_sites: options.MinSites = None,
    round_deadline: options.RoundDeadline = None,
    backbone: Annotated[
        str | None, typer.Option(help="source:name, as in torchvision:resnet18.", rich_help_panel=options.RUN)
    ] = None,
    weights: options.Weights = None,
    layer: options.Layer = None,
    head: options.Head = None,
    init: options.Init = None,
    classes: options.Classes = None,
    classes_from: options.ClassesFrom = None,
    multi_label: options.MultiLabel = None,
    rounds: options.Rounds = None,
    diagnose: options.Diagnose = None,
    keep_sums: options.KeepSums = None,
    with_backbone: options.WithBackbone = None,
    holdout: options.Holdout = None,
    seed: options.Seed = None,
    set_: options.Assignments = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder; by default a new one under runs/.", rich_help_panel=options.OUTPUT),
    ] = None,
    resume: options.Resume = None,
    dashboard: options.Dashboard = "",
    dashboard_anywhere: options.DashboardAnywhere = False,
    track: options.Track = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run the coordinator of real sites; exit 0 only if the run succeeded."""
    path, out = options.run_to_resume(resume, config, out)
    run = options.run_config(
        path,
        set_,
        {
            "backbone": backbone,
            "weights": weights,
            "layer": layer,
            "head": head,
            "init": init,
            "classes": options.names(classes),
            "classes_from": classes_from,
            "multi_label": multi_label,
            "rounds": rounds,
            "diagnose": diagnose,
            "keep_sums": keep_sums,
            "with_backbone": with_backbone,
            "holdout": holdout,
            "seed": seed,
            "min_sites": min_sites,
            "round_deadline": round_deadline,
        },
        {},
    )
    if insecure == (kit is not None):
        raise UserError("A coordinator needs --kit FOLDER, or on one machine --insecure: one of the two.")
    from fedhead.server.provision import CoordinatorKit
    from fedhead.server.serve import serve
    from fedhead.server.superlink import SuperLink

    keys = CoordinatorKit.read(kit) if kit is not None else None
    host, kit_port = split_address(keys.listen) if keys is not None else ("127.0.0.1", DEFAULT_PORT)
    link = SuperLink(host, kit_port if port is None else port, keys)
    quiet = as_json or not sys.stdout.isatty()
    if quiet:
        _log_lines()
    shown: list[RunStatus] = []

    @contextmanager
    def show(status: "RunStatus") -> Iterator[None]:
        shown.append(status)
        if quiet:
            yield
            return
        tables = LiveTables(status.snapshot)
        with Live(tables, console=output(), refresh_per_second=2, redirect_stdout=False, transient=True):
            yield

    signal.signal(signal.SIGTERM, _terminate)
    try:
        with watching(dashboard, anywhere=dashboard_anywhere, track=track) as observers:
            folder = serve(
                run,
                link,
                kit=keys,
                out=out,
                resume=resume is not None,
                health=health,
                shown=show,
                observers=observers,
            )[1]
    finally:
        if shown and shown[-1].snapshot()["run"] and not as_json:
            output().print(run_tables(shown[-1].snapshot()), highlight=False)
    if as_json:
        typer.echo(json.dumps({**json.loads((folder.path / "result.json").read_text()), "run_dir": str(folder.path)}))
    else:
        output().print(f"Run folder  {folder.path}", highlight=False)


def _terminate(number: int, frame: FrameType | None) -> None:
    errors.print("Stopping, as SIGTERM asks; what was complete is kept.")
    sys.exit(TERMINATED)


def _log_lines() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", force=True)
    for chatty in ("alembic", "httpx", "flwr", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
