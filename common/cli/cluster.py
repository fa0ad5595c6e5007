"""`fedhead cluster`: the clusters of a run without labels; show a site's rows in them, and name them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.errors import UserError
from fedhead.wording import percent

if TYPE_CHECKING:
    from fedhead.gallery import Shown

cluster = typer.Typer(
    help="Show and name the clusters of a run without labels (--task clusters).", no_args_is_help=True
)
app.add_typer(cluster, name="cluster")


@cluster.command(epilog="Example: [bold]fedhead cluster show runs/birds --data 'folder:birds?labels=no'[/bold]")
@in_sentences
def show(
    model: Annotated[Path, typer.Argument(help="Run folder or model file.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="Data spec of the site's own rows, as in 'folder:PATH?labels=no'.",
            show_default=False,
            rich_help_panel=options.SITE,
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="HTML page to write, with examples of each cluster.", rich_help_panel=options.OUTPUT),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, max=200, help="Examples of each cluster.", rich_help_panel=options.OUTPUT)
    ] = 12,
    weights: options.SiteWeights = "",
    device: options.SiteDevice = "auto",
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Assign a site's rows to a run's clusters, and show examples of each; nothing leaves the site."""
    from fedhead.data import load_samples
    from fedhead.devices import pick_device
    from fedhead.gallery import gallery, write_gallery
    from fedhead.model import TransferModel

    samples = load_samples(data)
    loaded = TransferModel.load(model, weights=weights)
    loaded.backbone.to(pick_device(device))
    with progress_of("Features") as progress:
        shown = gallery(
            loaded,
            samples,
            examples,
            strict=strict_data,
            progress=progress,
        )
    if html is not None:
        write_gallery(html, samples, shown)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in shown]))
        return
    output().print(_table(shown, "cluster" if loaded.task.name == "clusters" else "class"))
    if html is not None:
        output().print(f"Examples are in {html}; they are rows of this site.", highlight=False, soft_wrap=True)


@cluster.command(epilog="Example: [bold]fedhead cluster name runs/birds 0=wren 1=tit 2=wren --out birds[/bold]")
@in_sentences
def name(
    run: options.FinishedRun,
    names: Annotated[
        list[str] | None, typer.Argument(help="The class of each cluster, as in 0=rose.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV file with lines such as 0,rose, instead.", rich_help_panel=options.RUN)
    ] = None,
    rest: Annotated[
        str, typer.Option(metavar="NAME", help="The class of all other clusters.", rich_help_panel=options.RUN)
    ] = "",
    *,
    out: Annotated[
        Path, typer.Option(help="New folder for the model.", show_default=False, rich_help_panel=options.OUTPUT)
    ],
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Name the clusters of a run, and solve a classifier from its sums; clusters of one name become one class."""
    from fedhead.cli.solve import print_solved
    from fedhead.server.runs.clusters import name_clusters, parse_names, read_names

    if labels is not None and names:
        raise UserError("Give the names as arguments or as --labels FILE, not both.")
    given = read_names(labels) if labels is not None else parse_names(names or [])
    solved = name_clusters(run, out, given, rest)
    if as_json:
        typer.echo(json.dumps(asdict(solved)))
    else:
        print_solved(solved, output())


def _table(shown: "list[Shown]", what: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(what, overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("surest rows", overflow="fold")
    total = max(sum(one.rows for one in shown), 1)
    for one in shown:
        surest = ", ".join(name for _, name in one.examples[:2])
        table.add_row(one.name, f"{one.rows:,}", percent(one.rows / total), surest)
    return table
