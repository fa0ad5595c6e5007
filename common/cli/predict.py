"""`fedhead predict` and `fedhead evaluate`: a finished model on new data."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import ANY_NAME, app, in_sentences, output, progress_bars, progress_of
from fedhead.wording import counted, percent

if TYPE_CHECKING:
    from fedhead.coco_results import CocoIds
    from fedhead.data.inputs import Input
    from fedhead.model import TransferModel
    from fedhead.prediction import ModelEvaluation, Prediction

Model = Annotated[Path, typer.Argument(help="A model's file, or the folder of a finished run.", show_default=False)]
Weights = Annotated[str, typer.Option(help="File with the backbone's weights, if this machine has none.")]
Device = Annotated[str, typer.Option(help="Device: 'auto', 'cpu', 'cuda' or 'mps'.")]
Coverage = Annotated[
    float | None,
    typer.Option(help="Add prediction sets or intervals that contain the truth with this probability, as in 0.9."),
]


@app.command(epilog="Example: [bold]fedhead predict runs/flowers new/*.jpg --all > predictions.csv[/bold]")
@in_sentences
def predict(
    model: Model,
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, CSV files with a column path or text, or coco:FILE?images=DIR."),
    ],
    every: Annotated[bool, typer.Option("--all", help="Add the probability of every class.")] = False,
    coverage: Coverage = None,
    site_model: Annotated[
        bool, typer.Option("--site-model", help="MODEL is a site's name: use the personal head that it keeps here.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            help="Folder for drawings of each image, such as its mask and the image under the mask.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    weights: Weights = "",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; .jsonl gives JSON lines, .html tagged texts, .json COCO results of boxes.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of CSV.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Predict the classes or numbers of new inputs, as CSV or JSON lines; exit 1 if one could not be read."""
    from fedhead.prediction import find_inputs, predict_inputs

    loaded = load_model(_site_model(str(model)) if site_model else model, weights, device)
    inputs = find_inputs(paths, loaded.backbone.kind, getattr(loaded.backbone.preprocessing, "columns", ()))
    unreadable = 0
    drawn = _drawer(draw, loaded) if draw is not None else None
    coco = _coco_ids(out, loaded, paths) if not as_json else None
    with _writer(out) as file, _written(coco, file) as results, progress_bars() as progress:
        page = out is not None and out.suffix.lower() in (".html", ".htm")
        lines = as_json or (out is not None and out.suffix.lower() in (".jsonl", ".ndjson"))
        form = _write_html if page and not as_json else _write_json if lines else _write_csv
        write = results or form(file, loaded, every, coverage is not None)
        # Where predictions appear on the terminal, a bar among them would only be in the way.
        task = progress.add_task("Predicted", total=len(inputs), visible=out is not None or not sys.stdout.isatty())
        for one, prediction in zip(inputs, predict_inputs(loaded, inputs, coverage=coverage), strict=True):
            write(prediction)
            if drawn is not None and not prediction.error:
                drawn(one, prediction)
            unreadable += bool(prediction.error)
            progress.advance(task)
    if unreadable:
        where = "their lines say why" if coco is None else "they have no boxes in the file"
        typer.echo(f"{unreadable} of {len(inputs)} could not be read; {where}.", err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]fedhead evaluate runs/flowers --data folder:flowers/val --coverage 0.9[/bold]")
@in_sentences
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Labelled rows: folder:PATH, csv:FILE or another data spec.")],
    coverage: Coverage = None,
    weights: Weights = "",
    device: Device = "auto",
    strict_data: options.SiteStrictData = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate a model on labelled data, with intervals."""
    from fedhead.data import load_samples
    from fedhead.prediction import evaluate_model

    loaded = load_model(model, weights, device)
    samples = load_samples(data)
    with progress_of("Features") as progress:
        evaluated = evaluate_model(
            loaded,
            samples,
            coverage=coverage,
            strict=strict_data,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(_as_json(evaluated, loaded)))
    else:
        _print(evaluated, loaded, output())


def _site_model(site: str) -> Path:
    """Return the file of a site's personal head.

    Raises:
        UserError: if this machine has none.
    """
    from fedhead.errors import UserError
    from fedhead.model import find_site_model, site_model_path

    path = find_site_model(site)
    if path is None:
        raise UserError(
            f"No personal head of {site!r} is on this machine ({site_model_path(site)}): a run makes one at the site "
            "with personal = 'closed', 'head' or 'ditto', or with tune = 'lora:8:sa'."
        )
    return path


def load_model(path: Path, weights: str, device: str) -> "TransferModel":
    """Load the model of a command, and move its backbone to a device.

    Raises:
        UserError: if it is missing or damaged.
        FedheadError: if the backbone's weights are not on this machine.
    """
    from fedhead.devices import pick_device
    from fedhead.model import TransferModel

    model = TransferModel.load(path, weights=weights)
    model.backbone.to(pick_device(device))
    return model


def _coco_ids(out: Path | None, model: "TransferModel", paths: list[str]) -> "CocoIds | None":
    """Return the ids that a file of COCO results needs; None for other files."""
    if out is None or out.suffix.lower() != ".json":
        return None
    from fedhead.coco_results import CocoIds

    return CocoIds.of(model.task, paths)


def _drawer(folder: Path, model: "TransferModel") -> "Callable[[Input, Prediction], None]":
    """Return a function that writes drawings of a prediction.

    Raises:
        UserError: if the model's predictions cannot be drawn.
    """
    from PIL.Image import Image

    from fedhead.errors import UserError
    from fedhead.files import disk_errors
    from fedhead.tasks.dense import DenseTask

    task = model.task
    if not isinstance(task, DenseTask):
        raise UserError(f"--draw is for models of places in images; this model is {task.description}.")
    taken: dict[str, int] = {}

    def draw(one: "Input", prediction: "Prediction") -> None:
        image = one.read()
        if not isinstance(image, Image):
            raise UserError(f"--draw is for images, and {one.name} is none.")
        stem = Path(one.name).stem
        number = taken[stem] = taken.get(stem, 0) + 1
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for ending, drawing in task.drawings(prediction.decoded, image).items():
                drawing.save(folder / f"{stem}{f'-{number}' if number > 1 else ''}{ending}")

    return draw


@contextmanager
def _writer(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    from fedhead.files import disk_errors

    with disk_errors(out), out.open("w", newline="", encoding="utf-8", errors=ANY_NAME) as file:
        yield file


def _write_csv(file: TextIO, model: "TransferModel", every: bool, regions: bool) -> "Callable[[Prediction], None]":
    from fedhead.evaluation.foreign import UNLIKE

    table = csv.writer(file, lineterminator="\n")
    tests = model.foreign is not None
    remark = ["remark"] if tests else []
    table.writerow(["path", *model.task.header(every=every, regions=regions), *remark, "error"])

    def write(prediction: "Prediction") -> None:
        cells = model.task.cells(
            prediction.decision, prediction.answers, prediction.region, every=every, regions=regions
        )
        remark = [UNLIKE if prediction.foreign else ""] if tests else []
        table.writerow([prediction.name, *cells, *remark, prediction.error])
        file.flush()

    return write


def _write_json(file: TextIO, model: "TransferModel", every: bool, regions: bool) -> "Callable[[Prediction], None]":
    def write(prediction: "Prediction") -> None:
        line: dict[str, Any] = {"path": prediction.name}
        if prediction.error:
            line["error"] = prediction.error
        else:
            line |= model.task.record(
                prediction.decision, prediction.answers, prediction.region, every=every, regions=regions
            )
            if prediction.foreign is not None:
                line["foreign"] = prediction.foreign
        file.write(json.dumps(line) + "\n")
        file.flush()

    return write


@contextmanager
def _written(ids: "CocoIds | None", file: TextIO) -> "Iterator[Callable[[Prediction], None] | None]":
    """Yield a function that writes boxes as COCO results, a list in JSON; None without `ids`."""
    if ids is None:
        yield None
        return
    comma = ""

    def write(prediction: "Prediction") -> None:
        nonlocal comma
        if prediction.error:
            typer.echo(f"{prediction.name}: {prediction.error}", err=True)
            return
        for one in ids.results(prediction):
            file.write(comma + json.dumps(one))
            comma = ",\n"

    file.write("[")
    yield write
    file.write("]\n")


def _write_html(file: TextIO, model: "TransferModel", every: bool, regions: bool) -> "Callable[[Prediction], None]":
    from html import escape

    if not model.task.divides_items:
        model.task.as_html(None)
    file.write('<!doctype html>\n<meta charset="utf-8">\n<title>Predictions</title>\n')

    def write(prediction: "Prediction") -> None:
        shown = f"<p>{escape(prediction.error)}</p>" if prediction.error else model.task.as_html(prediction.decision)
        file.write(f"<section><h4>{escape(prediction.name)}</h4>{shown}</section>\n")
        file.flush()

    return write


def _as_json(evaluated: "ModelEvaluation", model: "TransferModel") -> dict[str, Any]:
    regions = None
    if evaluated.coverage is not None:
        regions = {
            "stated": evaluated.coverage,
            "found": evaluated.covered / max(evaluated.sums.rows, 1),
            "mean_size": evaluated.mean_size if math.isfinite(evaluated.mean_size) else None,
        }
    curves = {name: value for name, value in evaluated.curves.items() if name != "roc"}
    return {
        "score": evaluated.report.score.value,
        "score_name": model.task.score_name,
        **evaluated.report.to_dict(),
        **curves,
        "sets": regions,
        "skipped": len(evaluated.skipped),
    }


def _print(evaluated: "ModelEvaluation", model: "TransferModel", console: Console) -> None:
    from fedhead.cli.figures import figure_lines, figure_table

    console.print(figure_table(evaluated.report))
    lines = Table.grid(padding=(0, 2))
    for name, value in figure_lines(evaluated.report):
        lines.add_row(name, value)
    error = evaluated.curves.get("reliability", {}).get("error")
    if error is not None:
        lines.add_row("Calibration", f"expected calibration error {percent(error)}")
    if evaluated.coverage is not None:
        share = percent(evaluated.covered / max(evaluated.report.rows, 1))
        stated = percent(evaluated.coverage)
        lines.add_row(*model.task.say_regions(share, stated, evaluated.mean_size))
    if model.unlearned:
        lines.add_row("Unlearned", f"no site had rows of: {', '.join(model.unlearned)}")
    if evaluated.skipped:
        lines.add_row("Skipped", counted(len(evaluated.skipped), "unreadable row"))
    console.print(lines, highlight=False)
