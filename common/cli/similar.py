"""`fedhead similar`: how alike inputs are, by the covariance within classes of a run's sums."""

import csv
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, progress_of
from fedhead.cli.predict import Device, Model, Weights, load_model
from fedhead.wording import counted

if TYPE_CHECKING:
    from fedhead.data import Samples
    from fedhead.model import TransferModel
    from fedhead.similarity import Similarity

MOST_INPUTS = 500
"""Most inputs of which all pairs are printed."""

Row = dict[str, Any]


@app.command(epilog="Example: [bold]fedhead similar runs/faces new.jpg --data folder:known --top 5[/bold]")
@in_sentences
def similar(
    model: Model,
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files, folders, patterns, or CSV files with a column path or text.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Labelled rows to search: folder:PATH, csv:FILE or another data spec.")
    ] = "",
    top: Annotated[int, typer.Option(min=1, max=1000, help="Most similar rows of --data for each input.")] = 5,
    weights: Weights = "",
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of CSV.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Print the similarity of every pair of inputs, or each input's most similar rows of --data.

    With --data alone, print how well a threshold of similarity separates pairs of one class from pairs of two.
    """
    from fedhead.data import load_samples
    from fedhead.data.inputs import find_inputs
    from fedhead.errors import UserError
    from fedhead.similarity import embed_inputs

    if not paths and not data:
        raise UserError("Give two inputs or more, or --data with rows to search.")
    loaded = load_model(model, weights, device)
    loaded.require_items("A comparison of inputs")
    by = _similarity(model, loaded)
    columns = getattr(loaded.backbone.preprocessing, "columns", ())
    inputs = find_inputs(paths, loaded.backbone.kind, columns) if paths else []
    if data:
        samples = load_samples(data)
        lines = _searched(loaded, by, inputs, samples, top) if inputs else [_verified(loaded, by, samples)]
        _print(lines, as_json)
        return
    if not 2 <= len(inputs) <= MOST_INPUTS:
        raise UserError(
            f"Found {counted(len(inputs), 'input')}; pairs are printed for 2 to {MOST_INPUTS}. Use --data to search "
            "among more."
        )
    cosines = embed_inputs(loaded, by, inputs)
    cosines = (cosines @ cosines.T).clamp(-1, 1)
    _print(
        [
            {"first": one.name, "second": other.name, "similarity": float(cosines[i, j])}
            for (i, one), (j, other) in itertools.combinations(enumerate(inputs), 2)
        ],
        as_json,
    )


def _similarity(path: Path, model: "TransferModel") -> "Similarity":
    """Return the similarity by a model's test for foreign inputs, or by its run's sums.

    Raises:
        UserError: if it has neither.
    """
    from fedhead.errors import UserError
    from fedhead.server.runs.finished import opened
    from fedhead.server.runs.membership import total
    from fedhead.similarity import Similarity

    if model.task.divides_items:
        raise UserError(f"A model of the task {model.task.name!r} does not compare whole inputs, only parts of them.")
    if model.foreign is not None:
        return Similarity.from_distances(model.foreign.distances)
    advice = "Start the run with foreign = true (--foreign) to keep the statistics that similarities need in its model."
    folder = path if path.is_dir() else path.parent
    if not (folder / "run.toml").is_file():
        raise UserError(f"{path} has no sums of its sites' rows, so inputs cannot be compared. {advice}")
    try:
        with opened(folder) as run:
            stats = total(run.sums.pools(len(run.classes)))
            mapped = run.model.mapping is not None or stats.num_features != model.backbone.num_features
    except UserError as problem:
        raise UserError(f"{problem} {advice}") from None
    if mapped:
        raise UserError(f"The sums of {folder} are of mapped features, so inputs cannot be compared. {advice}")
    return Similarity.from_statistics(stats)


def _searched(model: "TransferModel", by: "Similarity", inputs: list[Any], samples: "Samples", top: int) -> list[Row]:
    from fedhead.similarity import embed_inputs, most_similar

    features, rows = _features(model, samples)
    matches = most_similar(embed_inputs(model, by, inputs), by, features, rows, top)
    classed = samples.targets is None and not samples.multi_label
    return [
        {
            "query": one.name,
            "rank": rank,
            "row": samples.name(match.row),
            "label": samples.classes[samples.labels[match.row]] if classed else "",
            "similarity": match.similarity,
        }
        for one, found in zip(inputs, matches, strict=True)
        for rank, match in enumerate(found, 1)
    ]


def _verified(model: "TransferModel", by: "Similarity", samples: "Samples") -> Row:
    import torch

    from fedhead.data import require_labels
    from fedhead.similarity import embedded, verify

    require_labels(samples, multi_label=False)
    features, rows = _features(model, samples)
    embeddings = torch.cat(list(embedded(by, features, rows)))
    return asdict(verify(embeddings, torch.from_numpy(samples.labels)[rows]))


def _features(model: "TransferModel", samples: "Samples") -> tuple[Any, Any]:
    """Return the features `[n, d]` of data, and the numbers of its readable rows."""
    import torch

    from fedhead.features.store import FeatureStore

    with progress_of("Features") as progress:
        store = FeatureStore.open(
            model.backbone,
            samples,
            progress=progress,
        )
    return store.features, torch.from_numpy(store.readable())


def _print(lines: list[Row], as_json: bool) -> None:
    if as_json:
        for line in lines:
            typer.echo(json.dumps(line))
        return
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(lines[0])
    for line in lines:
        table.writerow(f"{value:.4f}" if isinstance(value, float) else value for value in line.values())
