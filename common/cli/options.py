"""The options that several commands share, and the run that they and a file describe together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedhead.config import RunConfig

RUN, SIMULATION, STUDY, SITE, OUTPUT = "The run", "The simulation", "A study of many runs", "The site", "Output"

Weights = Annotated[
    str | None, typer.Option(help="'default', a safetensors or state-dict file, or 'random'.", rich_help_panel=RUN)
]
Layer = Annotated[
    str | None,
    typer.Option(
        help="'penultimate', or the name of a layer, perhaps with a pooling: 'hidden:6:cls'.", rich_help_panel=RUN
    ),
]
Head = Annotated[str | None, typer.Option(help="'linear', 'mlp:256' or 'cosine'.", rich_help_panel=RUN)]
Init = Annotated[
    str | None,
    typer.Option(help="What the head starts from: lda, ridge, nearest-mean, zeros or random.", rich_help_panel=RUN),
]
Classes = Annotated[
    str | None, typer.Option(help="Class names, with commas between; by default the data's.", rich_help_panel=RUN)
]
ClassesFrom = Annotated[str | None, typer.Option(help="A data spec to take the class names from.", rich_help_panel=RUN)]
MultiLabel = Annotated[
    bool | None, typer.Option("--multi-label", help="Rows have any number of classes.", rich_help_panel=RUN)
]
Rounds = Annotated[
    int | None,
    typer.Option(help="Rounds of training; 0 stops after the one exchange of statistics.", rich_help_panel=RUN),
]
Holdout = Annotated[
    float | None, typer.Option(help="Share of rows each site holds out for evaluation.", rich_help_panel=RUN)
]
MinSites = Annotated[
    int | None, typer.Option(help="With fewer sites a run waits, up to --round-deadline.", rich_help_panel=RUN)
]
RoundDeadline = Annotated[
    float | None,
    typer.Option(help="Seconds to wait for sites' replies, and for enough sites.", rich_help_panel=RUN),
]
Diagnose = Annotated[
    bool | None,
    typer.Option("--diagnose/--no-diagnose", help="Tell how each site stands to the pool.", rich_help_panel=RUN),
]
KeepSums = Annotated[
    str | None,
    typer.Option(
        help="Keep each site's sums in the 'folder' of the run, or 'none' but their digests, or only their 'total'.",
        rich_help_panel=OUTPUT,
    ),
]
WithBackbone = Annotated[
    bool | None,
    typer.Option(
        "--with-backbone",
        help="Keep the backbone beside the model, which then needs no other weights.",
        rich_help_panel=OUTPUT,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same result.", rich_help_panel=RUN)]
Data = Annotated[
    str | None, typer.Option(help="'digits', folder:PATH, csv:FILE or another data spec.", rich_help_panel=SIMULATION)
]
TestData = Annotated[str | None, typer.Option(help="A pooled test set, as a data spec.", rich_help_panel=SIMULATION)]
Sites = Annotated[int | None, typer.Option(help="How many sites.", rich_help_panel=SIMULATION)]
Partition = Annotated[
    str | None,
    typer.Option(
        help="Who holds what: iid, dirichlet:ALPHA, shards:K, quantity:ALPHA, sample:ROWS or folder (the data's).",
        rich_help_panel=SIMULATION,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(help="'process', or 'ray' for Flower's own simulation engine.", rich_help_panel=SIMULATION),
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster; by default one is started here.", rich_help_panel=SIMULATION),
]
Device = Annotated[str | None, typer.Option(help="'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=SIMULATION)]
Precision = Annotated[
    str | None,
    typer.Option(help="'float32', or 'mixed' for faster extraction on a GPU.", rich_help_panel=SIMULATION),
]
StrictData = Annotated[
    bool | None,
    typer.Option("--strict-data", help="Stop at unreadable rows instead of skipping.", rich_help_panel=SIMULATION),
]
MinClassCount = Annotated[
    int | None,
    typer.Option(help="Sites withhold classes with fewer training rows; 0 for none.", rich_help_panel=SIMULATION),
]
MinRows = Annotated[
    int | None, typer.Option(help="Sites with fewer rows take no part; 0 for none.", rich_help_panel=SIMULATION)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.KEY=VALUE", help="Any other setting, as in strategy.name=FedAdam.", rich_help_panel=RUN
    ),
]
FinishedRun = Annotated[Path, typer.Argument(help="The folder of a finished run.", rich_help_panel=RUN)]
SiteName = Annotated[str, typer.Option("--site", help="The site's name.", rich_help_panel=SITE)]
SiteSpec = Annotated[
    str, typer.Option("--data", help="Its rows: folder:PATH, csv:FILE or another data spec.", rich_help_panel=SITE)
]
SiteWeights = Annotated[
    str,
    typer.Option("--weights", help="The backbone's file, where this machine has none.", rich_help_panel=SITE),
]
SiteDevice = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=SITE)]
SiteStrictData = Annotated[
    bool, typer.Option("--strict-data", help="Stop at unreadable rows instead of skipping.", rich_help_panel=SITE)
]
SiteMinClassCount = Annotated[
    int,
    typer.Option(
        "--min-class-count",
        help="It withholds classes with fewer training rows; 0 for none.",
        rich_help_panel=SITE,
    ),
]
SiteMinRows = Annotated[
    int, typer.Option("--min-rows", help="With fewer rows it takes no part; 0 for none.", rich_help_panel=SITE)
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR", help="Go on with a run that was interrupted, from its last round.", rich_help_panel=OUTPUT
    ),
]
Dashboard = Annotated[
    str,
    typer.Option(
        "--dashboard",
        metavar="HOST:PORT",
        help="Serve the report there while the run goes on, as in 127.0.0.1:8080.",
        rich_help_panel=OUTPUT,
    ),
]
DashboardAnywhere = Annotated[
    bool,
    typer.Option(
        "--dashboard-anywhere", help="Other machines may read that page, without a password.", rich_help_panel=OUTPUT
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Tell a tracker: tensorboard, mlflow or python:MODULE:FUNCTION; may be given again.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]


def run_config(
    path: Path | None, assignments: list[str] | None, flags: dict[str, Any], simulation: dict[str, Any]
) -> "RunConfig":
    """Lay flags and assignments over a file, or over the defaults."""
    from fedhead.config import RunConfig, merge, parse_assignments

    given = {key: value for key, value in flags.items() if value is not None}
    table = {key: value for key, value in simulation.items() if value is not None}
    changes = merge({**given, "simulation": table}, parse_assignments(assignments or []))
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
        raise UserError(f"{run_dir} is no run folder: it holds no run.toml. Give the folder of the run to resume.")
    return run_dir / "run.toml", run_dir


def names(text: str | None) -> list[str] | None:
    """Return the names in a list with commas between."""
    return None if text is None else [name.strip() for name in text.split(",")]
