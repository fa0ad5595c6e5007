"""`fedhead rank`: which backbone fits the sites' task."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.cli.settings import SettingsCommand, with_settings
from fedhead.wording import score_words, size

if TYPE_CHECKING:
    from fedhead.simulations.rank import RankedBackbone


@app.command(
    cls=SettingsCommand,
    epilog="Example: [bold]fedhead rank bundled:glyphnet bundled:pixels torchvision:resnet18=resnet18.pth --data "
    "folder:scans[/bold]",
)
@in_sentences
@with_settings(
    ("classes", "classes_from", "task", "holdout", "seed"),
    ("data", "test_data", "sites", "partition", "device", "strict_data", "min_class_count", "min_rows"),
)
def rank(
    settings: dict[str, Any],
    backbones: Annotated[
        list[str], typer.Argument(help="Backbone specs, each with an optional =FILE for its weights.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="TOML file; flags override it.", rich_help_panel=options.RUN)
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to compare, separated by commas; join several by +, as in layer3+penultimate.")
    ] = "",
    costs: Annotated[bool, typer.Option("--tune", help="Show what tuning the last blocks stores and sends.")] = False,
    set_: options.Assignments = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare backbones on the sites' task, by one exchange each and without training."""
    from fedhead import simulations

    run = options.run_config(config, set_, settings)
    with progress_bars() as progress:

        def on_backbone(spec: str) -> Callable[[int, int], None]:
            task = progress.add_task(spec, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        taps = [one.strip() for one in layers.split(",") if one.strip()]
        ranked = simulations.rank(backbones, run, layers=taps, tune=costs, on_backbone=on_backbone)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in ranked]))
        return
    output().print(_compared(ranked, layers=bool(layers)))
    if costs:
        output().print(_tuning_table(ranked))


def _compared(ranked: "Sequence[RankedBackbone]", *, layers: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    tested = any(one.accuracy_test is not None for one in ranked)
    table.add_column("backbone", overflow="fold")
    if layers:
        table.add_column("layer", overflow="fold")
    for column in (
        *(("CV error",) if layers else ()),
        "LogME",
        "H-score",
        "held out",
        *(("test",) if tested else ()),
        "d",
        "a site",
        "seconds",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in ranked:
        table.add_row(
            one.backbone,
            *((one.layer, "-" if one.error is None else f"{one.error:.3f}") if layers else ()),
            f"{one.logme:.3f}",
            "-" if one.h_score is None else f"{one.h_score:.3f}",
            score_words(one.accuracy, one.score_name),
            *([score_words(one.accuracy_test, one.score_name)] if tested else []),
            str(one.num_features),
            size(one.bytes_per_site),
            f"{one.seconds_extraction:.1f}",
        )
    return table


def _tuning_table(ranked: "Sequence[RankedBackbone]") -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("backbone", overflow="fold")
    for column in (
        "--tune",
        "parameters",
        "a site and round",
        "stored, a row",
        "stored, all rows",
        "recomputing, a row",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in ranked:
        for cut in one.cuts:
            table.add_row(
                one.backbone,
                cut.tune,
                f"{cut.parameters:,}",
                size(cut.bytes_per_round),
                size(cut.bytes_per_row) + (" a token" if cut.bytes_stored is None else ""),
                "-" if cut.bytes_stored is None else size(cut.bytes_stored),
                f"{1000 * cut.seconds_per_row:.1f} ms",
            )
    return table
