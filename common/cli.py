"""One command, `fedhead`, thin: parse, call, print. It imports what a command needs when that is called."""

import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedhead.errors import FedheadError, UserError

if TYPE_CHECKING:
    from fedhead.config import RunConfig
    from fedhead.metrics import Estimate
    from fedhead.server.coordinator import Round
    from fedhead.simulations.membership import MembershipChange
    from fedhead.simulations.simulate import RunResult

PARTS = {
    "ledger": "fedhead.client.guard",
    "membership": "fedhead.simulations.membership",
    "rank": "fedhead.simulations",
    "simulate": "fedhead.simulations",
}
"""Which module serves a command."""

INTERRUPTED = 130
MOST_LINES = 26
MOST_DIAGNOSES = 8

app = typer.Typer(
    help="Federated transfer learning on Flower: ship the backbone once, share only the heads.",
    epilog="Example: [bold]fedhead simulate[/bold] runs ten sites on bundled data, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
errors = Console(stderr=True, emoji=False)


def main() -> None:
    """Run the command line; the entry point `fedhead`."""
    # Threads that spin while they wait make torch many times slower on a machine with other work to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _version(asked: bool) -> None:
    if asked:
        from fedhead import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def fedhead(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated transfer learning on Flower: ship the backbone once, share only the heads."""


def _in_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Turn failures into one sentence on stderr and an exit status, unless `--debug` asks for the traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> None:
        logging.basicConfig(
            level=logging.WARNING,
            format="%(message)s",
            handlers=[RichHandler(console=errors, show_time=False, show_path=False, markup=False)],
        )
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            errors.print(
                "[bold]Interrupted.[/bold] Features extracted so far are kept; start again to go on from them."
            )
            raise typer.Exit(INTERRUPTED) from None
        except FedheadError as error:
            if options["debug"]:
                traceback.print_exc()
            errors.print("[bold red]Error:[/bold red]", end=" ")
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_status) from None
        except Exception as error:
            if options["debug"]:
                raise
            errors.print("[bold red]Error:[/bold red]", end=" ")
            said = str(error).strip().splitlines()
            errors.print(
                f"An unexpected {type(error).__name__}{f': {said[0]}' if said else ''}. Run again with --debug for the "
                "traceback, and please report it.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(1) from None

    return wrapped


_RUN, _SIMULATION, _SITE, _OUTPUT = "The run", "The simulation", "The site", "Output"

Weights = Annotated[
    str | None, typer.Option(help="'default', a safetensors or state-dict file, or 'random'.", rich_help_panel=_RUN)
]
Layer = Annotated[str | None, typer.Option(help="'penultimate', or the name of a layer.", rich_help_panel=_RUN)]
Head = Annotated[str | None, typer.Option(help="'linear', 'mlp:256' or 'cosine'.", rich_help_panel=_RUN)]
Init = Annotated[
    str | None,
    typer.Option(help="What the head starts from: lda, ridge, nearest-mean, zeros or random.", rich_help_panel=_RUN),
]
Classes = Annotated[
    str | None, typer.Option(help="Class names, with commas between; by default the data's.", rich_help_panel=_RUN)
]
ClassesFrom = Annotated[
    str | None, typer.Option(help="A data spec to take the class names from.", rich_help_panel=_RUN)
]
MultiLabel = Annotated[
    bool | None, typer.Option("--multi-label", help="Rows have any number of classes.", rich_help_panel=_RUN)
]
Rounds = Annotated[
    int | None,
    typer.Option(help="Rounds of training; 0 stops after the one exchange of statistics.", rich_help_panel=_RUN),
]
Holdout = Annotated[
    float | None, typer.Option(help="Share of rows each site holds out for evaluation.", rich_help_panel=_RUN)
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same result.", rich_help_panel=_RUN)]
Data = Annotated[
    str | None, typer.Option(help="'digits', folder:PATH or python:MODULE:FUNCTION.", rich_help_panel=_SIMULATION)
]
TestData = Annotated[str | None, typer.Option(help="A pooled test set, as a data spec.", rich_help_panel=_SIMULATION)]
Sites = Annotated[int | None, typer.Option(help="How many sites.", rich_help_panel=_SIMULATION)]
Partition = Annotated[
    str | None,
    typer.Option(
        help="Who holds what: iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or folder.", rich_help_panel=_SIMULATION
    ),
]
Device = Annotated[str | None, typer.Option(help="'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=_SIMULATION)]
StrictData = Annotated[
    bool | None,
    typer.Option("--strict-data", help="Stop at unreadable rows instead of skipping.", rich_help_panel=_SIMULATION),
]
MinClassCount = Annotated[
    int | None,
    typer.Option(help="Sites withhold classes with fewer training rows; 0 for none.", rich_help_panel=_SIMULATION),
]
MinRows = Annotated[
    int | None, typer.Option(help="Sites with fewer rows take no part; 0 for none.", rich_help_panel=_SIMULATION)
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.KEY=VALUE", help="Any other setting, as in strategy.name=FedAdam.", rich_help_panel=_RUN
    ),
]
FinishedRun = Annotated[Path, typer.Argument(help="The folder of a finished run.", rich_help_panel=_RUN)]
SiteName = Annotated[str, typer.Option("--site", help="The site's name.", rich_help_panel=_SITE)]
SiteSpec = Annotated[
    str, typer.Option("--data", help="Its rows: folder:PATH, python:MODULE:FUNCTION.", rich_help_panel=_SITE)
]
SiteWeights = Annotated[
    str,
    typer.Option("--weights", help="The backbone's file, where this machine has none.", rich_help_panel=_SITE),
]
SiteDevice = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda' or 'mps'.", rich_help_panel=_SITE)]
SiteStrictData = Annotated[
    bool, typer.Option("--strict-data", help="Stop at unreadable rows instead of skipping.", rich_help_panel=_SITE)
]
SiteMinClassCount = Annotated[
    int,
    typer.Option(
        "--min-class-count",
        help="It withholds classes with fewer training rows; 0 for none.",
        rich_help_panel=_SITE,
    ),
]
SiteMinRows = Annotated[
    int, typer.Option("--min-rows", help="With fewer rows it takes no part; 0 for none.", rich_help_panel=_SITE)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.", rich_help_panel=_OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=_OUTPUT)]


@app.command(
    epilog="Example: [bold]fedhead simulate run.toml --sites 20 --partition dirichlet:0.1 --set local.lr=0.05[/bold]"
)
@_in_sentences
def simulate(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; flags lie over it.", show_default=False)] = None,
    backbone: Annotated[
        str | None, typer.Option(help="source:name, as in torchvision:resnet18.", rich_help_panel=_RUN)
    ] = None,
    weights: Weights = None,
    layer: Layer = None,
    head: Head = None,
    init: Init = None,
    classes: Classes = None,
    classes_from: ClassesFrom = None,
    multi_label: MultiLabel = None,
    rounds: Rounds = None,
    diagnose: Annotated[
        bool | None,
        typer.Option("--diagnose/--no-diagnose", help="Tell how each site stands to the pool.", rich_help_panel=_RUN),
    ] = None,
    keep_sums: Annotated[
        str | None,
        typer.Option(help="Keep each site's sums in the run folder, or 'none'.", rich_help_panel=_OUTPUT),
    ] = None,
    holdout: Holdout = None,
    seed: Seed = None,
    data: Data = None,
    test_data: TestData = None,
    sites: Sites = None,
    partition: Partition = None,
    device: Device = None,
    strict_data: StrictData = None,
    min_class_count: MinClassCount = None,
    min_rows: MinRows = None,
    set_: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; by default a new one under runs/.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run many sites on this machine: a frozen backbone, private rows, shared heads."""
    run = _config(
        config,
        set_,
        {
            "backbone": backbone,
            "weights": weights,
            "layer": layer,
            "head": head,
            "init": init,
            "classes": _names(classes),
            "classes_from": classes_from,
            "multi_label": multi_label,
            "rounds": rounds,
            "keep_sums": keep_sums,
            "diagnose": diagnose,
            "holdout": holdout,
            "seed": seed,
        },
        {
            "data": data,
            "test_data": test_data,
            "sites": sites,
            "partition": partition,
            "device": device,
            "strict_data": strict_data,
            "min_class_count": min_class_count,
            "min_rows": min_rows,
        },
    )
    with _progress() as progress:
        extraction = progress.add_task("Features", total=None)
        training = progress.add_task("Rounds", total=run.rounds)
        result = import_module(PARTS["simulate"]).simulate(
            run,
            out=out,
            on_extraction=lambda done, total: progress.update(extraction, completed=done, total=total),
            on_round=lambda finished: progress.update(training, completed=finished.number),
        )
    if as_json:
        typer.echo(json.dumps(result.summary()))
    else:
        _print_result(result, _output())


@app.command(
    epilog="Example: [bold]fedhead rank bundled:glyphnet bundled:pixels torchvision:resnet18=resnet18.pth --data "
    "folder:scans[/bold]"
)
@_in_sentences
def rank(
    backbones: Annotated[list[str], typer.Argument(help="Specs, each perhaps with =FILE for its weights.")],
    config: Annotated[Path | None, typer.Option(help="A TOML file; flags lie over it.", rich_help_panel=_RUN)] = None,
    classes: Classes = None,
    classes_from: ClassesFrom = None,
    multi_label: MultiLabel = None,
    holdout: Holdout = None,
    seed: Seed = None,
    data: Data = None,
    test_data: TestData = None,
    sites: Sites = None,
    partition: Partition = None,
    device: Device = None,
    strict_data: StrictData = None,
    min_class_count: MinClassCount = None,
    min_rows: MinRows = None,
    set_: Assignments = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell which backbone fits the sites' task, from one exchange each, without training."""
    run = _config(
        config,
        set_,
        {
            "classes": _names(classes),
            "classes_from": classes_from,
            "multi_label": multi_label,
            "holdout": holdout,
            "seed": seed,
        },
        {
            "data": data,
            "test_data": test_data,
            "sites": sites,
            "partition": partition,
            "device": device,
            "strict_data": strict_data,
            "min_class_count": min_class_count,
            "min_rows": min_rows,
        },
    )
    with _progress() as progress:

        def on_backbone(spec: str) -> Callable[[int, int], None]:
            task = progress.add_task(spec, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        ranked = import_module(PARTS["rank"]).rank(backbones, run, on_backbone=on_backbone)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in ranked]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    tested = any(one.accuracy_test is not None for one in ranked)
    table.add_column("backbone", overflow="fold")
    for column in ("LogME", "H-score", "held out", *(("test",) if tested else ()), "d", "a site", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in ranked:
        table.add_row(
            one.backbone,
            f"{one.logme:.3f}",
            "-" if one.h_score is None else f"{one.h_score:.3f}",
            _percent(one.accuracy),
            *([_percent(one.accuracy_test)] if tested else []),
            str(one.num_features),
            _size(one.bytes_per_site),
            f"{one.seconds_extraction:.1f}",
        )
    _output().print(table)


@app.command(epilog="Example: [bold]fedhead ledger hospital-a[/bold]")
@_in_sentences
def ledger(
    site: Annotated[str, typer.Argument(help="The site's name, or the path of its ledger.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what left a site: when, for which run, from how many rows, and the digest of what left."""
    guard = import_module(PARTS["ledger"])
    path = Path(site) if site.endswith(".jsonl") else guard.ledger_path(site)
    if not path.is_file():
        raise UserError(f"There is no ledger {path}: nothing was released by a site of this name on this machine.")
    entries = guard.read_ledger(path)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("when", "run", "action", "rows", "classes", "size", "digest"):
        table.add_column(column, justify="right" if column in ("rows", "classes", "size") else "left")
    for entry in entries:
        when = entry.when.strftime("%Y-%m-%d %H:%M")
        size = _size(entry.bytes)
        table.add_row(when, entry.run, entry.action, str(entry.rows), str(len(entry.classes)), size, entry.digest[:8])
    _output().print(table)


@app.command(epilog="Example: [bold]fedhead join runs/flowers --site north --data folder:/data/north[/bold]")
@_in_sentences
def join(
    run: FinishedRun,
    site: SiteName,
    data: SiteSpec,
    min_class_count: SiteMinClassCount = 5,
    min_rows: SiteMinRows = 20,
    weights: SiteWeights = "",
    device: SiteDevice = "auto",
    strict_data: SiteStrictData = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add a site to a finished run, without computing anything of any other site."""
    _change(
        "join",
        (run, site, data),
        as_json,
        min_class_count=min_class_count,
        min_rows=min_rows,
        weights=weights,
        device=device,
        strict_data=strict_data,
    )


@app.command(epilog="Example: [bold]fedhead leave runs/flowers --site north[/bold]")
@_in_sentences
def leave(
    run: FinishedRun,
    site: SiteName,
    sums: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Its sums, sent again, where the run keeps none; once for each part.",
            rich_help_panel=_SITE,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Its rows, to make the sums anew, where the run keeps none.", rich_help_panel=_SITE),
    ] = None,
    min_class_count: SiteMinClassCount = 5,
    min_rows: SiteMinRows = 20,
    weights: SiteWeights = "",
    device: SiteDevice = "auto",
    strict_data: SiteStrictData = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take a site out of a finished run, and solve the statistics head as if it had never been in."""
    _change(
        "leave",
        (run, site),
        as_json,
        sums=sums or (),
        data=data,
        min_class_count=min_class_count,
        min_rows=min_rows,
        weights=weights,
        device=device,
        strict_data=strict_data,
    )


@app.command(
    epilog="Example: [bold]fedhead add-class runs/flowers --name tulip --site north --data folder:/data/north[/bold]"
)
@_in_sentences
def add_class(
    run: FinishedRun,
    name: Annotated[
        list[str], typer.Option(help="The class to add; may be given again for more.", rich_help_panel=_RUN)
    ],
    site: SiteName,
    data: SiteSpec,
    min_class_count: SiteMinClassCount = 5,
    min_rows: SiteMinRows = 20,
    weights: SiteWeights = "",
    device: SiteDevice = "auto",
    strict_data: SiteStrictData = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add a class to a finished run, with a site that has rows of it and joins."""
    _change(
        "add_class",
        (run, name, site, data),
        as_json,
        min_class_count=min_class_count,
        min_rows=min_rows,
        weights=weights,
        device=device,
        strict_data=strict_data,
    )


def _change(function: str, arguments: tuple[Any, ...], as_json: bool, **options: Any) -> None:
    """Change who is in a run, and print what came of it."""
    with _progress() as progress:
        extraction = progress.add_task("Features", total=None, visible=False)
        change = getattr(import_module(PARTS["membership"]), function)(
            *arguments,
            on_extraction=lambda done, total: progress.update(extraction, completed=done, total=total, visible=True),
            **options,
        )
    if as_json:
        typer.echo(json.dumps(change.summary()))
    else:
        _print_change(change, _output())


def _print_change(change: "MembershipChange", console: Console) -> None:
    verb = "left" if change.action == "leave" else "joined"
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Site", f"{change.site} {verb} with {change.rows} rows; in the run are now {len(change.sites)} sites")
    lines.add_row("Rows", f"{change.rows_before} before, {change.rows_after} now")
    classes = f"{len(change.classes) - len(change.classes_added)} before, {len(change.classes)} now"
    lines.add_row("Classes", f"{classes}: added {', '.join(change.classes_added)}" if change.classes_added else classes)
    rows = "all rows, held-out ones included" if change.all_rows else "the training rows"
    lines.add_row("Head", f"{change.head_spec}, the statistics head ({change.method}) of {rows}")
    if change.accuracy is not None:
        before = f", where the model before has {_percent(change.accuracy_before)}"
        lines.add_row(
            "Accuracy",
            f"{_percent(change.accuracy)} on the {change.rows_held_out} held-out rows of {change.site}, solved without "
            f"held-out rows{before if change.accuracy_before is not None else ''}",
        )
    if change.skipped:
        lines.add_row("Skipped", f"{change.skipped} unreadable rows")
    if change.withheld:
        lines.add_row("Withheld", f"{change.withheld} rows, in classes with too few (--min-class-count)")
    for note in change.notes:
        lines.add_row("Note", note)
    lines.add_row("Run folder", str(change.run_dir))
    console.print(lines, highlight=False)


def _config(
    path: Path | None, assignments: list[str] | None, flags: dict[str, Any], simulation: dict[str, Any]
) -> "RunConfig":
    """Lay flags and assignments over a file, or over the defaults."""
    from fedhead.config import RunConfig, merge, parse_assignments

    given = {key: value for key, value in flags.items() if value is not None}
    table = {key: value for key, value in simulation.items() if value is not None}
    changes = merge({**given, "simulation": table}, parse_assignments(assignments or []))
    return RunConfig.from_toml(path, changes) if path else RunConfig.from_values(changes)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _output() -> Console:
    # Names of sites, classes and folders are printed as they are, not read as markup.
    return Console(markup=False, emoji=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )


def _print_result(result: "RunResult", console: Console) -> None:
    console.print(_history_table(result))
    if 0 < len(result.config.classes) <= MOST_LINES and result.sites:
        console.print(_class_table(result))
    summary = result.summary()
    share = summary["bytes_full_model"] / max(summary["bytes_down"] + summary["bytes_up"], 1)
    tested = ""
    if result.test_accuracy is not None:
        tested = f"{_percent(result.test_accuracy)} on the test set; "
    sites = result.sites
    if sites:
        by_site = result.accuracy_by_site
        worst = min(by_site, key=lambda name: by_site[name])
        tested += (
            f"{_percent(result.accuracy_held_out)} on {result.evaluation.rows} held-out rows of {len(sites)} sites "
            f"(mean of sites {_percent(result.accuracy_mean_site)}, worst {worst} {_percent(by_site[worst])})"
        )
    lines = Table.grid(padding=(0, 2))
    lines.add_row(
        "All labels right" if result.config.multi_label else "Accuracy",
        tested or "unknown: nothing is held out, and there is no test set",
    )
    lines.add_row("Head", _origin_of_head(result))
    traffic = f"{_size(summary['bytes_down'])} down, {_size(summary['bytes_up'])} up"
    if summary["bytes_full_model"]:
        traffic += f"; the whole model each round would have taken {_size(summary['bytes_full_model'])}"
        traffic += f", {share:.0f} times as much" if share > 1 else ""
    lines.add_row("Traffic", traffic)
    lines.add_row(
        "Time",
        f"{summary['seconds']:.1f} s: features {summary['seconds_extraction']:.1f} s "
        f"({summary['rows_extracted']} rows extracted), rounds {summary['seconds_rounds']:.1f} s",
    )
    if summary["rows_skipped"]:
        lines.add_row("Skipped", f"{summary['rows_skipped']} unreadable rows")
    if summary["rows_withheld"]:
        lines.add_row(
            "Withheld",
            f"{summary['rows_withheld']} rows of {len(result.withheld)} sites, in classes or sites with too few "
            "(--min-class-count, --min-rows)",
        )
    _add_diagnosis(lines, result)
    if result.empty_sites:
        lines.add_row("No rows", f"{len(result.empty_sites)} sites: {', '.join(result.empty_sites)}")
    for site, reason in result.outcome.refused.items():
        lines.add_row("Refused", f"{site}: {reason}")
    lines.add_row("Run folder", str(result.run_dir))
    console.print(lines, highlight=False)


def _add_diagnosis(lines: Table, result: "RunResult") -> None:
    """Tell what each site should do where that is not simply to join, and which classes rest on one site."""
    diagnoses = result.outcome.diagnoses
    joining = sum(one.recommendation == "join" for one in diagnoses)
    if diagnoses:
        lines.add_row("Diagnosis", f"{joining} of {len(diagnoses)} sites gain by joining")
    others = [one for one in diagnoses if one.recommendation not in ("join", "not enough rows to tell")]
    undecided = [one.site for one in diagnoses if one.recommendation == "not enough rows to tell"]
    for one in others[:MOST_DIAGNOSES]:
        lines.add_row("", one.sentence)
    if undecided:
        lines.add_row("", f"not enough rows to tell: {', '.join(undecided[:MOST_DIAGNOSES])}")
    for covered in result.outcome.coverage:
        if covered.rests_on_one_site:
            lines.add_row("", covered.sentence)


def _origin_of_head(result: "RunResult") -> str:
    outcome = result.outcome
    if outcome.all_rows:
        return f"{result.config.init}, of one exchange, solved again of all rows, held-out ones included"
    if outcome.kept_round == 0:
        return f"{result.config.init}, before any round"
    kept = "" if outcome.kept_round == len(outcome.history) - 1 else ", the best by held-out loss"
    return f"of round {outcome.kept_round}{kept}"


def _history_table(result: "RunResult") -> Table:
    table = Table(
        title=f"{result.config.strategy.name} on {len(result.outcome.participants)} sites",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    history = result.history
    has_test = result.test_accuracy is not None
    for column in ("round", "sites", "loss", "accuracy", *(("test",) if has_test else ()), "down", "up", "seconds"):
        table.add_column(column, justify="right")
    step = -(-len(history) // MOST_LINES)
    for finished in history:
        if finished.number % step and finished is not history[-1]:
            continue
        table.add_row(
            *_cells(finished, has_test), style="bold" if finished.number == result.outcome.kept_round else None
        )
    return table


def _class_table(result: "RunResult") -> Table:
    table = Table(title="Held-out rows: % with 95 % intervals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for column in ("rows", "sensitivity", "specificity", "AUROC"):
        table.add_column(column, justify="right")
    for one in result.evaluation.classes:
        table.add_row(
            one.name, str(one.rows), _interval(one.sensitivity), _interval(one.specificity), _interval(one.auroc)
        )
    return table


def _interval(estimate: "Estimate") -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"


def _cells(finished: "Round", has_test: bool) -> list[str]:
    return [
        str(finished.number),
        f"{finished.sites}" + (f" (-{len(finished.dropped)})" if finished.dropped else "") if finished.number else "",
        "" if finished.loss is None else f"{finished.loss:.4f}",
        _percent(finished.accuracy),
        *([_percent(finished.test_accuracy)] if has_test else []),
        _size(finished.bytes_down),
        _size(finished.bytes_up),
        f"{finished.seconds:.2f}",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    for unit, factor in (("kB", 1e3), ("MB", 1e6)):
        if count < 1000 * factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"
