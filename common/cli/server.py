"""`fedhead server`: a run over real sites, from this machine."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.live import Live

from fedhead.addresses import split_address
from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, terminal_handler
from fedhead.cli.extras import extras
from fedhead.cli.observers import watching
from fedhead.cli.settings import SettingsCommand, with_settings
from fedhead.cli.status import LiveTables, run_tables
from fedhead.errors import UserError
from fedhead.logs import configure_logging

if TYPE_CHECKING:
    from fedhead.server.kit import CoordinatorKit
    from fedhead.server.network.superlink import SuperLink
    from fedhead.server.status import RunStatus

logger = logging.getLogger(__name__)

DEFAULT_PORT = 9092
TERMINATED = 143

_Kit = Annotated[
    Path | None,
    typer.Option(help="Coordinator's kit, made by fedhead provision.", rich_help_panel=options.CONNECTION),
]
_Port = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port to listen on; by default the kit's, or 9092.",
        rich_help_panel=options.CONNECTION,
    ),
]
_Queue = Annotated[
    Path | None,
    typer.Option(
        help="Run the TOML files of this folder one after another, also those that come later; --out holds the run "
        "folders.",
        metavar="DIR",
        rich_help_panel=options.OUTPUT,
    ),
]
_StoppedOk = Annotated[
    bool,
    typer.Option(
        "--stopped-ok",
        help="Exit 0, not 143, after fedhead stop, so that a service manager does not start the run again.",
        rich_help_panel=options.CONNECTION,
    ),
]


@app.command(
    cls=SettingsCommand,
    epilog="Example: [bold]fedhead server run.toml --kit kit/coordinator --min-sites 2 --out runs/xray[/bold]\n\n"
    "On one machine: [bold]fedhead server run.toml --insecure[/bold]",
)
@in_sentences
@with_settings()
def server(
    settings: dict[str, Any],
    config: options.ConfigFile = None,
    kit: _Kit = None,
    insecure: options.Insecure = False,
    port: _Port = None,
    health: options.Health = "",
    set_: options.Assignments = None,
    out: options.RunFolder = None,
    resume: options.Resume = None,
    queue: _Queue = None,
    stopped_ok: _StoppedOk = False,
    dashboard: options.Dashboard = "",
    dashboard_anywhere: options.DashboardAnywhere = False,
    track: options.Track = None,
    log_format: options.LogFormat = "text",
    log_file: options.LogFile = None,
    metrics: options.Metrics = "",
    metrics_anywhere: options.MetricsAnywhere = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Coordinate a run over real sites; exit 0 only if the run succeeded."""
    _require_fitting_flags(kit, insecure, queue, by_itself=config is not None or resume is not None or as_json)
    path, out = options.run_to_resume(resume, config, out)
    read = partial(options.run_config, assignments=set_, settings=settings)
    # Mistakes in flags are found before anything starts.
    run = read(path)
    from fedhead.monitoring import Monitoring
    from fedhead.server.kit import CoordinatorKit
    from fedhead.server.network.serve import NetworkRuns, serve
    from fedhead.server.queue import RunQueue

    keys = CoordinatorKit.read(kit) if kit is not None else None
    link = _link(keys, port)
    quiet = as_json or log_format == "json" or not sys.stdout.isatty()
    configure_logging(log_format, log_file, terminal=None if quiet else terminal_handler())
    signal.signal(signal.SIGTERM, _terminate)
    monitoring = Monitoring(health, metrics, metrics_anywhere)
    watched = watching(dashboard, anywhere=dashboard_anywhere, track=track)
    with _Terminal(quiet=quiet, tables=not as_json, stopped_ok=stopped_ok) as terminal, watched as observers:
        if queue is not None:
            with NetworkRuns(link, keys, monitoring) as runs:
                runs.run_queue(RunQueue(queue, out), read, shown=terminal.show, observers=observers)
            return
        result = serve(
            run,
            link,
            kit=keys,
            out=out,
            resume=resume is not None,
            monitoring=monitoring,
            shown=terminal.show,
            observers=observers,
        )
    if as_json:
        typer.echo(json.dumps(result.summary()))
    else:
        for title, text in (*extras(result), ("Run folder", str(result.run_dir))):
            output().print(f"{title}  {text}", highlight=False, soft_wrap=True)


def _require_fitting_flags(kit: Path | None, insecure: bool, queue: Path | None, *, by_itself: bool) -> None:
    """Check flags against each other; `by_itself` says whether one is for a run outside a queue.

    Raises:
        UserError: if they do not fit.
    """
    if queue is not None and by_itself:
        raise UserError("--queue DIR takes its runs from DIR: leave out the configuration file, --resume and --json.")
    if insecure == (kit is not None):
        raise UserError("Give either --kit FOLDER, or --insecure on one machine.")


def _link(keys: "CoordinatorKit | None", port: int | None) -> "SuperLink":
    """Return the link that listens where the kit says, or on this machine alone; at `port` if it is given."""
    from fedhead.server.network.superlink import SuperLink

    host, usual = split_address(keys.listen) if keys is not None else ("127.0.0.1", DEFAULT_PORT)
    return SuperLink(host, usual if port is None else port, keys)


class _Terminal:
    """Shows runs at the terminal while it is entered, and the last one's final tables when it is left.

    Args:
        quiet: whether to show nothing during a run.
        tables: whether to print the final tables.
        stopped_ok: whether to exit 0 if the run was stopped by `fedhead stop`.
    """

    def __init__(self, *, quiet: bool, tables: bool, stopped_ok: bool) -> None:
        self._quiet = quiet
        self._tables = tables
        self._stopped_ok = stopped_ok
        self._status: RunStatus | None = None

    @contextmanager
    def show(self, status: "RunStatus") -> Iterator[None]:
        """Show a run while it is entered."""
        self._status = status
        if self._quiet:
            yield
            return
        tables = LiveTables(status.snapshot)
        with Live(tables, console=output(), refresh_per_second=2, redirect_stdout=False, transient=True):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._status is None:
            return
        if self._tables and self._status.snapshot()["run"]:
            output().print(run_tables(self._status.snapshot()), highlight=False)
        if self._stopped_ok and isinstance(error, SystemExit) and self._status.stop_asked:
            raise typer.Exit from None


def _terminate(number: int, frame: FrameType | None) -> None:
    logger.warning("Stopping; completed rounds are kept.")
    sys.exit(TERMINATED)
