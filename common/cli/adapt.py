"""`fedhead adapt`: fit a finished run's model to rows without labels, at the site that has them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_of
from fedhead.cli.predict import Device, Model, Weights, load_model
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.adaptation import AdaptedModel


@app.command(epilog="Example: [bold]fedhead adapt runs/xray --data 'folder:/data/new?labels=no' --out adapted[/bold]")
@in_sentences
def adapt(
    model: Model,
    *,
    data: Annotated[str, typer.Option(help="Rows without labels as a data spec, such as 'folder:PATH?labels=no'.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapted model.", show_default=False)],
    method: Annotated[
        str,
        typer.Option(
            help="'shares', 'mean', 'mean+shares', 'moments', 'soft labels' or 'mean+soft labels' instead of the "
            "adaptation that the run has proven.",
        ),
    ] = "",
    weights: Weights = "",
    device: Device = "auto",
    min_rows: options.SiteMinRows = 20,
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Adapt a model to rows without labels, if its run has proven that this helps; nothing leaves this machine."""
    from fedhead.adaptation import adapt_model, load_adaptation
    from fedhead.data import load_samples
    from fedhead.errors import UserError
    from fedhead.model import MODEL_FILE

    if out.exists():
        raise UserError(f"{out} exists already; choose a new folder.")
    loaded = load_model(model, weights, device)
    loaded.require_items("Adapting")
    adaptation = load_adaptation(loaded, model / MODEL_FILE if model.is_dir() else model)
    samples = load_samples(data)
    with progress_of("Features") as progress:
        made = adapt_model(
            loaded,
            adaptation,
            samples,
            method,
            min_rows=min_rows,
            strict=strict_data,
            progress=progress,
        )
    if made is not None:
        out.mkdir(parents=True)
        made.model.save(out / MODEL_FILE)
    if as_json:
        typer.echo(json.dumps(made.to_dict() if made is not None else {"method": "plain"}))
    elif made is None:
        output().print(
            "The model is left as it is, and nothing is written: on the labelled rows of the run's sites, "
            "no adaptation was proven better. The report compares them; --method takes one nevertheless.",
            soft_wrap=True,
        )
    else:
        _show(made)
        rows = counted(made.rows, "row")
        output().print(f"Adapted to {rows} by {made.method!r}; the model is in {out}.", soft_wrap=True)


def _show(made: "AdaptedModel") -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    for column in ("predicted before", "after"):
        table.add_column(column, justify="right")
    for name, share in made.before.items():
        table.add_row(name, percent(share), percent(made.after[name]))
    output().print(table)
