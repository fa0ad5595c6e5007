"""The options that several commands share, and the run that they and a file describe together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fedhead.config import RunConfig

RUN, SIMULATION, STUDY, SITE, OUTPUT = "The run", "The simulation", "A study of many runs", "The site", "Output"
LOG, PRIVACY, CONNECTION = "Log and metrics", "Privacy", "The connection"

ConfigFile = Annotated[Path | None, typer.Argument(help="TOML file; flags override it.", show_default=False)]
RunFolder = Annotated[
    Path | None, typer.Option(help="Run folder; by default a new one under runs/.", rich_help_panel=OUTPUT)
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Run without TLS or keys, on this machine only.", rich_help_panel=CONNECTION)
]
Health = Annotated[
    str,
    typer.Option(help="Serve gRPC's health service at this address.", metavar="HOST:PORT", rich_help_panel=CONNECTION),
]

Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.KEY=VALUE", help="Any other setting, as in strategy.name=FedAdam.", rich_help_panel=RUN
    ),
]
FinishedRun = Annotated[Path, typer.Argument(help="Folder of a finished run.", rich_help_panel=RUN)]
SiteName = Annotated[str, typer.Option("--site", help="The site's name.", rich_help_panel=SITE)]
SiteSpec = Annotated[
    str,
    typer.Option(
        "--data", help="Data spec of the site's rows: folder:PATH, csv:FILE or another.", rich_help_panel=SITE
    ),
]
SiteWeights = Annotated[
    str,
    typer.Option("--weights", help="File with the backbone's weights, if this machine has none.", rich_help_panel=SITE),
]
SiteDevice = Annotated[
    str, typer.Option("--device", help="Device: 'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=SITE)
]
SiteStrictData = Annotated[
    bool, typer.Option("--strict-data", help="Stop at unreadable rows instead of skipping them.", rich_help_panel=SITE)
]
SiteMinClassCount = Annotated[
    int,
    typer.Option(
        "--min-class-count",
        help="Minimum training rows of a class; the site withholds classes with fewer. 0 for no limit.",
        rich_help_panel=SITE,
    ),
]
SiteMinRows = Annotated[
    int,
    typer.Option(
        "--min-rows", help="Minimum rows; with fewer, the site takes no part. 0 for no limit.", rich_help_panel=SITE
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR", help="Resume an interrupted run from its last saved round.", rich_help_panel=OUTPUT
    ),
]
Dashboard = Annotated[
    str,
    typer.Option(
        "--dashboard",
        metavar="HOST:PORT",
        help="Serve the report at this address during the run, as in 127.0.0.1:8080.",
        rich_help_panel=OUTPUT,
    ),
]
DashboardAnywhere = Annotated[
    bool,
    typer.Option(
        "--dashboard-anywhere",
        help="Let other machines read the dashboard, without a password.",
        rich_help_panel=OUTPUT,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Tracker: tensorboard, mlflow or python:MODULE:FUNCTION; repeatable.",
        rich_help_panel=OUTPUT,
    ),
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", help="Form of log lines; 'json' for one object per line.", rich_help_panel=LOG),
]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", help="Also append the log to this file, rotated at 10 MB.", rich_help_panel=LOG),
]
Metrics = Annotated[
    str,
    typer.Option(
        "--metrics",
        metavar="HOST:PORT",
        help="Serve Prometheus metrics at this address, as in 127.0.0.1:9100.",
        rich_help_panel=LOG,
    ),
]
MetricsAnywhere = Annotated[
    bool,
    typer.Option(
        "--metrics-anywhere", help="Let other machines read the metrics, without a password.", rich_help_panel=LOG
    ),
]
Counts = Annotated[
    list[Path] | None,
    typer.Option("--counts", metavar="FILE", help="Counts of another site, to be added; repeatable."),
]
CountsFile = Annotated[
    Path | None,
    typer.Option("--out", help="File for the counts, to be added elsewhere.", rich_help_panel=OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]


def run_config(path: Path | None, assignments: list[str] | None, settings: dict[str, Any]) -> "RunConfig":
    """Apply flags and assignments to a file, or to the defaults.

    Args:
        path: of a TOML file.
        assignments: the values of `--set`.
        settings: changes by flags; see `fedhead.cli.settings`.

    Raises:
        UserError: if they describe no run, or ask for privacy without an epsilon.
    """
    from fedhead.config import RunConfig, merge, parse_assignments
    from fedhead.errors import UserError

    changes = merge(settings, parse_assignments(assignments or []))
    privacy = changes.get("privacy")
    if isinstance(privacy, dict) and privacy.get("epsilon") == 0:
        raise UserError(
            "With epsilon 0 a head could not depend on any row: choose one above 0, such as --epsilon 3, or leave it "
            "out for a run without differential privacy."
        )
    return RunConfig.from_toml(path, changes) if path else RunConfig.from_values(changes)


def run_to_resume(run_dir: Path | None, config: Path | None, out: Path | None) -> tuple[Path | None, Path | None]:
    """Return the configuration file and the run folder: those given, or those of the run that is resumed.

    Raises:
        UserError: if a run is resumed with another file, or into another folder.
    """
    from fedhead.errors import UserError

    if run_dir is None:
        return config, out
    if config is not None or out is not None:
        raise UserError(f"--resume {run_dir} takes the configuration and the folder of that run; leave out the other.")
    if not (run_dir / "run.toml").is_file():
        from fedhead.server.runs.folder import not_resumable

        raise UserError(not_resumable(run_dir))
    return run_dir / "run.toml", run_dir
