"""`fedhead export`: a finished model in a form that other software takes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output
from fedhead.cli.predict import Model, Weights
from fedhead.wording import size

if TYPE_CHECKING:
    from fedhead.export import Exported


@app.command(epilog="Example: [bold]fedhead export runs/flowers --format onnx --out flowers.onnx[/bold]")
@in_sentences
def export(
    model: Model,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="'onnx', 'torch-export', 'state-dict', or as a folder 'fedhead' (with the backbone) or 'peft'.",
        ),
    ],
    weights: Weights = "",
    out: Annotated[
        Path | None,
        typer.Option(help="File or folder to write; by default beside the model.", rich_help_panel=options.OUTPUT),
    ] = None,
    nms: Annotated[
        bool,
        typer.Option(
            "--nms/--raw",
            help="ONNX of detectors: suppress overlapping boxes, as predict does, or return the boxes of all cells.",
        ),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Export a model; the export is run on samples first, and refused if its answers differ."""
    from fedhead.errors import UserError
    from fedhead.export import BATCH_SIZES, FORMATS, check_format, export_model
    from fedhead.export.adapter import FOLDER, PEFT_FORMAT, export_adapter
    from fedhead.files import write_atomically
    from fedhead.model import MODEL_FILE, TransferModel
    from fedhead.server.report.card import CARD

    folder = model if model.is_dir() else model.parent
    if file_format == PEFT_FORMAT:
        adapted = export_adapter(TransferModel.load(model, weights=weights), folder, out or folder / FOLDER)
        _print(adapted, "adapters for PEFT. Merged by PEFT, features", as_json)
        return
    check_format(file_format)
    loaded = TransferModel.load(model, weights=weights)
    path = folder / FORMATS[file_format] if out is None else out
    if out is not None and out.is_dir() and file_format != "fedhead":
        path = out / FORMATS[file_format]
    if path.resolve() in (model.resolve(), (folder / MODEL_FILE).resolve()):
        raise UserError(f"{path} is the model itself; choose another --out.")
    written = export_model(loaded, file_format, path, nms=nms)
    if file_format == "fedhead" and (folder / CARD).is_file():
        write_atomically(path / CARD, (folder / CARD).read_bytes())
    *some, last = map(str, BATCH_SIZES)
    checked = f"{loaded.task.description}. Run back on {', '.join(some)} and {last} samples: {loaded.task.answer_name}"
    _print(written, checked, as_json)


def _print(written: "Exported", checked: str, as_json: bool) -> None:
    if as_json:
        values = {"path": str(written.path), "bytes": written.size, "largest_difference": written.difference}
        typer.echo(json.dumps(values))
        return
    output().print(
        f"{written.path}: {size(written.size)}, {checked} differ by {written.difference:.1g} at most.",
        highlight=False,
        soft_wrap=True,
    )
