"""`fedhead predict` and `fedhead evaluate`: a finished model on new data."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output, progress_bars
from fedhead.wording import interval, percent

if TYPE_CHECKING:
    from fedhead.model import TransferModel
    from fedhead.prediction import ModelEvaluation, Prediction

Model = Annotated[Path, typer.Argument(help="A model's file, or the folder of a finished run.", show_default=False)]
Weights = Annotated[str, typer.Option(help="The backbone's file, where this machine has none.")]
Device = Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda' or 'mps'.")]
Coverage = Annotated[
    float | None, typer.Option(help="Give sets of classes that hold the true one so often, as in 0.9.")
]

SEPARATOR = ";"
"""Between several classes in one field, as in data that is read."""


@app.command(epilog="Example: [bold]fedhead predict runs/flowers new/*.jpg --all > predictions.csv[/bold]")
@in_sentences
def predict(
    model: Model,
    paths: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns, or CSV files with a column path or text.")
    ],
    every: Annotated[bool, typer.Option("--all", help="Give the probability of every class.")] = False,
    coverage: Coverage = None,
    weights: Weights = "",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this file; .jsonl gives JSON lines.", rich_help_panel=options.OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines instead of CSV.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Tell the class of new images or texts, as CSV or JSON lines; exit 1 if one could not be read."""
    from fedhead.prediction import find_inputs, predict_inputs

    loaded = _load(model, weights, device)
    inputs = find_inputs(paths, loaded.backbone.kind)
    unreadable = 0
    with _writer(out) as file, progress_bars() as progress:
        lines = as_json or (out is not None and out.suffix.lower() in (".jsonl", ".ndjson"))
        write = (_write_json if lines else _write_csv)(file, loaded, every, coverage is not None)
        # Where predictions appear on the terminal, a bar among them would only be in the way.
        task = progress.add_task("Predicted", total=len(inputs), visible=out is not None or not sys.stdout.isatty())
        for prediction in predict_inputs(loaded, inputs, coverage=coverage):
            write(prediction)
            unreadable += bool(prediction.error)
            progress.advance(task)
    if unreadable:
        typer.echo(f"{unreadable} of {len(inputs)} could not be read; their lines say why.", err=True)
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
    """Tell how good a model is on labelled data, with intervals."""
    from fedhead.data import load_samples
    from fedhead.prediction import evaluate_model

    loaded = _load(model, weights, device)
    samples = load_samples(data)
    with progress_bars() as progress:
        task = progress.add_task("Features", total=None)
        evaluated = evaluate_model(
            loaded,
            samples,
            coverage=coverage,
            strict=strict_data,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(_as_json(evaluated)))
    else:
        _print(evaluated, loaded, output())


def _load(path: Path, weights: str, device: str) -> "TransferModel":
    from fedhead.devices import pick_device
    from fedhead.model import TransferModel

    model = TransferModel.load(path, weights=weights)
    model.backbone.to(pick_device(device))
    return model


@contextmanager
def _writer(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    from fedhead.files import disk_errors

    with disk_errors(out), out.open("w", newline="", encoding="utf-8") as file:
        yield file


def _write_csv(file: TextIO, model: "TransferModel", every: bool, sets: bool) -> "Callable[[Prediction], None]":
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["path", "label", "probability", *(["set"] if sets else []), *(model.classes if every else []), "error"]
    )

    def write(prediction: "Prediction") -> None:
        by_class = dict(zip(model.classes, prediction.probabilities, strict=False))
        table.writerow(
            [
                prediction.name,
                SEPARATOR.join(prediction.labels),
                SEPARATOR.join(f"{by_class[name]:.4f}" for name in prediction.labels),
                *([SEPARATOR.join(prediction.candidates)] if sets else []),
                *((f"{by_class[name]:.4f}" if by_class else "" for name in model.classes) if every else ()),
                prediction.error,
            ]
        )
        file.flush()

    return write


def _write_json(file: TextIO, model: "TransferModel", every: bool, sets: bool) -> "Callable[[Prediction], None]":
    def write(prediction: "Prediction") -> None:
        by_class = dict(zip(model.classes, prediction.probabilities, strict=False))
        line: dict[str, Any] = {"path": prediction.name}
        if prediction.error:
            line["error"] = prediction.error
        elif model.multi_label:
            line["labels"] = {name: by_class[name] for name in prediction.labels}
        else:
            line["label"] = prediction.labels[0]
            line["probability"] = by_class[prediction.labels[0]]
        if sets and not prediction.error:
            line["set"] = list(prediction.candidates)
        if every and not prediction.error:
            line["probabilities"] = by_class
        file.write(json.dumps(line) + "\n")
        file.flush()

    return write


def _as_json(evaluated: "ModelEvaluation") -> dict[str, Any]:
    sets = None
    if evaluated.coverage is not None:
        sets = {
            "stated": evaluated.coverage,
            "found": evaluated.covered / max(evaluated.sums.rows, 1),
            "mean_size": evaluated.mean_set_size,
        }
    return {
        **evaluated.report.to_dict(),
        "confusion": evaluated.sums.confusion.tolist(),
        "reliability": evaluated.reliability.to_dict(),
        "sets": sets,
        "skipped": len(evaluated.skipped),
    }


def _print(evaluated: "ModelEvaluation", model: "TransferModel", console: Console) -> None:
    report = evaluated.report
    table = Table(title="% with 95 % intervals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for column in ("rows", "sensitivity", "specificity", "AUROC"):
        table.add_column(column, justify="right")
    for one in report.classes:
        table.add_row(
            one.name, str(one.rows), interval(one.sensitivity), interval(one.specificity), interval(one.auroc)
        )
    console.print(table)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("Accuracy", f"{interval(report.accuracy)} on {report.rows} rows")
    lines.add_row("Balanced", interval(report.balanced_accuracy))
    if evaluated.reliability.error is not None:
        lines.add_row("Calibration", f"expected calibration error {percent(evaluated.reliability.error)}")
    if evaluated.coverage is not None:
        share = evaluated.covered / max(report.rows, 1)
        lines.add_row(
            "Sets",
            f"hold the true class for {percent(share)} of rows, where {percent(evaluated.coverage)} is stated; "
            f"{evaluated.mean_set_size:.2f} classes each",
        )
    if model.unlearned:
        lines.add_row("Unlearned", f"no site had rows of: {', '.join(model.unlearned)}")
    if evaluated.skipped:
        lines.add_row("Skipped", f"{len(evaluated.skipped)} unreadable rows")
    console.print(lines, highlight=False)
