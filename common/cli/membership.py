"""`fedhead join`, `leave` and `add-class`: change the sites and classes of a finished run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.wording import counted, score_words

if TYPE_CHECKING:
    from fedhead.server.runs.membership import MembershipChange


@app.command(epilog="Example: [bold]fedhead join runs/flowers --site north --data folder:/data/north[/bold]")
@in_sentences
def join(
    run: options.FinishedRun,
    site: options.SiteName,
    data: options.SiteSpec,
    min_class_count: options.SiteMinClassCount = 5,
    min_rows: options.SiteMinRows = 20,
    weights: options.SiteWeights = "",
    device: options.SiteDevice = "auto",
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Add a site to a finished run, without work for any other site."""
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
@in_sentences
def leave(
    run: options.FinishedRun,
    site: options.SiteName,
    sums: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="File with the site's sums, if the run keeps none; repeatable, once for each part.",
            rich_help_panel=options.SITE,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data spec of the site's rows, to compute its sums again if the run keeps none.",
            rich_help_panel=options.SITE,
        ),
    ] = None,
    min_class_count: options.SiteMinClassCount = 5,
    min_rows: options.SiteMinRows = 20,
    weights: options.SiteWeights = "",
    device: options.SiteDevice = "auto",
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove a site from a finished run, and solve the head as if the site had never taken part."""
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
@in_sentences
def add_class(
    run: options.FinishedRun,
    name: Annotated[list[str], typer.Option(help="Class to add; repeatable.", rich_help_panel=options.RUN)],
    site: options.SiteName,
    data: options.SiteSpec,
    min_class_count: options.SiteMinClassCount = 5,
    min_rows: options.SiteMinRows = 20,
    weights: options.SiteWeights = "",
    device: options.SiteDevice = "auto",
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Add a class to a finished run, with a joining site that has rows of it."""
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
    """Change the sites or classes of a run, and print the result."""
    from fedhead import membership

    with progress_of("Features", visible=False) as progress:
        change = getattr(membership, function)(*arguments, on_extraction=progress, **options)
    if as_json:
        typer.echo(json.dumps(change.summary()))
    else:
        _print_change(change, output())


def _print_change(change: "MembershipChange", console: Console) -> None:
    verb, row = "left" if change.action == "leave" else "joined", change.task.row_name
    lines = Table.grid(padding=(0, 2))
    sites = counted(len(change.sites), "site")
    lines.add_row("Site", f"{change.site} {verb} with {counted(change.rows, row)}; the run now has {sites}")
    lines.add_row(f"{row.capitalize()}s", f"{change.rows_before} before, {change.rows_after} now")
    shown = len(change.task.shown(change.classes))
    classes = f"{shown - len(change.classes_added)} before, {shown} now"
    named = change.task.output_names[1].capitalize()
    lines.add_row(named, f"{classes}: added {', '.join(change.classes_added)}" if change.classes_added else classes)
    rows = "all rows, held-out ones included" if change.all_rows else "the training rows"
    lines.add_row("Head", f"{change.head_spec}, the statistics head ({change.method}) of {rows}")
    if change.accuracy is not None:
        after, before = (score_words(one, change.score_name) for one in (change.accuracy, change.accuracy_before))
        lines.add_row(
            change.task.score_title,
            f"{after} on {counted(change.rows_held_out, f'held-out {row}')} of {change.site}, solved without held-out "
            f"{row}s" + (f", where the model before has {before}" if before else ""),
        )
    if change.skipped:
        lines.add_row("Skipped", counted(change.skipped, f"unreadable {row}"))
    if change.withheld:
        lines.add_row("Withheld", f"{counted(change.withheld, row)}, in classes with too few (--min-class-count)")
    for note in change.notes:
        lines.add_row("Note", note)
    lines.add_row("Run folder", str(change.run_dir))
    console.print(lines, highlight=False)
