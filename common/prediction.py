"""Whatever a user points at, through a model: predictions as they come, and how good a model is on labelled data."""

import csv
import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhead.data import Item, Kind, Samples, UnreadableSampleError, read_image, read_text, relabel
from fedhead.data.folder import IMAGE_SUFFIXES, TEXT_SUFFIXES
from fedhead.data.samples import require_kind, require_labels
from fedhead.errors import UserError
from fedhead.extraction import arranged, batch_size_for, read_ahead
from fedhead.features import FeatureStore, Progress
from fedhead.metrics import EvaluationReport, EvaluationSums, Reliability, ScoreBins, reliability, report
from fedhead.model import TransferModel

BLOCK = 8192
"""Rows whose features are in memory at a time."""

AHEAD = 2
"""Batches that are read while one goes through the backbone."""


@dataclass(frozen=True)
class Input:
    """Something to predict: what a person would call it, and how to read it."""

    name: str
    read: Callable[[], Item]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        name: the input's.
        labels: the most probable class, or of a multi-label model those above one half; empty if unreadable.
        probabilities: `C`, in the order of the model's classes; empty if unreadable.
        candidates: the set of classes for the coverage asked for, by falling probability; else empty.
        error: why it could not be read; else empty.
    """

    name: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    candidates: tuple[str, ...] = ()
    error: str = ""


def find_inputs(paths: Sequence[str], kind: Kind) -> list[Input]:
    """Return what files, folders (with all below them), globs and CSV files name, in that order.

    Args:
        paths: a CSV file has a column `path`, relative to it, or for a model of texts perhaps `text`.
        kind: what the model takes.

    Raises:
        UserError: if one is not there, holds nothing of that kind, or is a CSV file without such a column.
    """
    found: list[Input] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _in_folder(path, kind)
        elif path.suffix.lower() == ".csv" and path.is_file():
            found += _in_csv(path, kind)
        elif path.exists():
            found.append(_file(path, str(path), kind))
        else:
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns too
            if not matches:
                raise UserError(f"There is no {path}, and nothing that it matches as a pattern.")
            found += find_inputs(matches, kind)
    return found


def predict_inputs(
    model: TransferModel, inputs: Iterable[Input], *, coverage: float | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for each input, in order, reading ahead of the backbone.

    Args:
        model: on the device that is to do the work.
        inputs: unreadable ones are told as such, and the others predicted.
        coverage: adds sets of classes that hold the true one so often.

    Raises:
        UserError: if the model has no calibration to make such sets from.
    """
    if coverage is not None:
        model.sets(torch.empty(0, len(model.classes)), coverage)
    inputs = list(inputs)
    backbone = arranged(model.backbone, len(inputs))
    rows = batch_size_for(backbone)
    head = model.head.to(backbone.device)

    def prepare(position: int) -> Tensor | UnreadableSampleError:
        try:
            return backbone.preprocessing(inputs[position].read())
        except UnreadableSampleError as error:
            return error

    prepared = read_ahead(prepare, range(len(inputs)), ahead=AHEAD * rows)
    for start in range(0, len(inputs), rows):
        names = [one.name for one in inputs[start : start + rows]]
        read = list(islice(prepared, len(names)))
        tensors = [one for one in read if not isinstance(one, UnreadableSampleError)]
        answers: Iterator[Prediction] = iter(())
        if tensors:
            with torch.inference_mode():
                features = backbone.features(backbone.preprocessing.collate(tensors))
                probabilities = model.probabilities_of(head(features)).cpu()
            answers = _predictions(model, probabilities, coverage)
        for name, one in zip(names, read, strict=True):
            if isinstance(one, UnreadableSampleError):
                yield Prediction(name, error=str(one))
            else:
                told = next(answers)
                yield Prediction(name, told.labels, told.probabilities, told.candidates)


def _predictions(model: TransferModel, probabilities: Tensor, coverage: float | None) -> Iterator[Prediction]:
    sets = model.sets(probabilities, coverage) if coverage is not None else [()] * len(probabilities)
    for row, candidates in zip(probabilities.tolist(), sets, strict=True):
        if model.multi_label:
            labels = tuple(compress(model.classes, [value > 0.5 for value in row]))
        else:
            labels = (model.classes[max(range(len(row)), key=row.__getitem__)],)
        yield Prediction("", labels, tuple(row), candidates)


@dataclass(frozen=True)
class ModelEvaluation:
    """How good a model is on labelled data.

    Attributes:
        report: accuracy and the rest, with intervals.
        sums: what they were made of.
        reliability: whether the calibrated probabilities come true.
        coverage: what was asked of the sets of classes; None if nothing was.
        covered: how many rows' sets hold their class.
        mean_set_size: over all rows.
        skipped: why each row that could not be read was left out.
    """

    report: EvaluationReport
    sums: EvaluationSums
    reliability: Reliability
    coverage: float | None
    covered: int
    mean_set_size: float
    skipped: dict[int, str]


def evaluate_model(
    model: TransferModel,
    samples: Samples,
    *,
    coverage: float | None = None,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> ModelEvaluation:
    """Judge a model on labelled data; features are kept, as for a run.

    Raises:
        UserError: if the data is of another kind or has a class that the model does not know.
        FedheadError: if it cannot be read.
    """
    require_kind(model.backbone.spec, model.backbone.kind, samples.kind)
    require_labels(samples, model.multi_label)
    labels = torch.from_numpy(relabel(samples, model.classes))
    if coverage is not None:
        model.sets(torch.empty(0, len(model.classes)), coverage)
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = torch.from_numpy(store.readable())
    head = model.head.to("cpu")
    with torch.inference_mode():
        parts = [head(store.features[rows[start : start + BLOCK]]) for start in range(0, len(rows), BLOCK)]
    logits, truth = torch.cat(parts).double() / model.calibration.temperature, labels[rows]
    probabilities = model.probabilities_of(logits * model.calibration.temperature)
    # A class that no one learned is never predicted: its logits lie below all others'.
    learned = torch.tensor([name not in model.unlearned for name in model.classes])
    logits = logits.where(learned, logits.min() - 50)
    sums = EvaluationSums.from_logits(logits, truth, _bins(logits, multi_label=model.multi_label))
    covered, size = 0, 0.0
    if coverage is not None:
        sets = model.sets(probabilities, coverage)
        covered = sum(model.classes[label] in names for label, names in zip(truth.tolist(), sets, strict=True))
        size = sum(map(len, sets)) / max(len(sets), 1)
    return ModelEvaluation(
        report=report(sums, model.classes),
        sums=sums,
        reliability=reliability(sums),
        coverage=coverage,
        covered=covered,
        mean_set_size=size,
        skipped=store.skipped,
    )


def _bins(logits: Tensor, *, multi_label: bool) -> ScoreBins:
    if len(logits) < 2:
        return ScoreBins.default(logits.shape[1])
    table = logits.numpy()
    return ScoreBins.from_moments(table.mean(0), np.cov(table.T), multi_label=multi_label)


def _file(path: Path, name: str, kind: Kind) -> Input:
    return Input(name, partial(read_text if kind == "text" else read_image, path))


def _in_folder(folder: Path, kind: Kind) -> list[Input]:
    suffixes = TEXT_SUFFIXES if kind == "text" else IMAGE_SUFFIXES
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no {kind}s; expected files such as 1{suffixes[-1]} ({', '.join(suffixes)}).")
    return [_file(path, str(path), kind) for path in files]


def _in_csv(path: Path, kind: Kind) -> list[Input]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or []
            wanted = ("text", "path") if kind == "text" else ("path",)
            column = next((name for name in wanted if name in columns), "")
            if not column:
                having = ", ".join(columns) or "none"
                raise UserError(f"{path} has the columns {having}; expected one called {' or '.join(wanted)}.")
            cells = [row[column] or "" for row in table]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as CSV UTF-8.") from None
    if not cells:
        raise UserError(f"{path} has no rows.")
    if column == "text":
        return [Input(f"{path}:{number}", partial(str, text)) for number, text in enumerate(cells, 2)]
    return [_file(path.parent / cell, cell, kind) for cell in cells]
