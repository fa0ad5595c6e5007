"""`fedhead rank`: which backbone fits the sites' task."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.wording import percent, size


@app.command(
    epilog="Example: [bold]fedhead rank bundled:glyphnet bundled:pixels torchvision:resnet18=resnet18.pth --data "
    "folder:scans[/bold]"
)
@in_sentences
def rank(
    backbones: Annotated[list[str], typer.Argument(help="Specs, each perhaps with =FILE for its weights.")],
    config: Annotated[
        Path | None, typer.Option(help="A TOML file; flags lie over it.", rich_help_panel=options.RUN)
    ] = None,
    classes: options.Classes = None,
    classes_from: options.ClassesFrom = None,
    multi_label: options.MultiLabel = None,
    holdout: options.Holdout = None,
    seed: options.Seed = None,
    data: options.Data = None,
    test_data: options.TestData = None,
    sites: options.Sites = None,
    partition: options.Partition = None,
    device: options.Device = None,
    strict_data: options.StrictData = None,
    min_class_count: options.MinClassCount = None,
    min_rows: options.MinRows = None,
    set_: options.Assignments = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Tell which backbone fits the sites' task, from one exchange each, without training."""
    from fedhead import simulations

    run = options.run_config(
        config,
        set_,
        {
            "classes": options.names(classes),
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
    with progress_bars() as progress:

        def on_backbone(spec: str) -> Callable[[int, int], None]:
            task = progress.add_task(spec, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        ranked = simulations.rank(backbones, run, on_backbone=on_backbone)
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
            percent(one.accuracy),
            *([percent(one.accuracy_test)] if tested else []),
            str(one.num_features),
            size(one.bytes_per_site),
            f"{one.seconds_extraction:.1f}",
        )
    output().print(table)
