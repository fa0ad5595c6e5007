"""Whatever a user points at, through a model: predictions as they come, and how good a model is on labelled data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fedhead.data import Samples, UnreadableSampleError
from fedhead.data.inputs import Input
from fedhead.data.inputs import find_inputs as find_inputs
from fedhead.data.samples import require_kind
from fedhead.errors import UserError
from fedhead.features.extraction import arranged, batch_size_for, read_ahead
from fedhead.features.store import FeatureStore, Progress
from fedhead.model import TransferModel, size_of
from fedhead.tasks.dense import DenseTask, ItemPlaces

BLOCK = 8192
"""Rows whose features are in memory at a time."""

AHEAD = 2
"""Batches that are read while one goes through the backbone."""


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one input.

    Attributes:
        name: the input's.
        decision: the predicted class, classes or numbers, as the model's task decides; None if unreadable.
        answers: `C`, the probabilities or values, in the order of the model's columns; empty if unreadable.
        region: the set of classes, or the intervals, for the coverage asked for; else empty.
        error: why the input could not be read; else empty.
        foreign: whether the input is unlike the rows that the model was solved on; None if the model has no test.
        decoded: the prediction of a task about places, such as a mask; else None.
    """

    name: str
    decision: Any = None
    answers: tuple[float, ...] = ()
    region: Any = ()
    error: str = ""
    foreign: bool | None = None
    decoded: Any = None


def predict_inputs(
    model: TransferModel, inputs: Iterable[Input], *, coverage: float | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for each input, in order, reading ahead of the backbone.

    Args:
        model: on the device that is to do the work.
        inputs: unreadable ones are reported, and the others predicted.
        coverage: adds sets of classes, or intervals, that hold the truth with this probability.

    Raises:
        UserError: if the model has no calibration to make them from.
    """
    if coverage is not None:
        model.sets(torch.empty(0, len(model.classes)), coverage)
    inputs = list(inputs)
    if model.task.divides_items:
        yield from map(partial(_divided, model), inputs)
        return
    backbone = arranged(model.backbone, len(inputs))
    rows = batch_size_for(backbone)
    head = model.head.to(backbone.device)

    def prepare(position: int) -> tuple[Tensor, tuple[int, int]] | UnreadableSampleError:
        try:
            item = inputs[position].read()
            return backbone.preprocessing(item), size_of(item)
        except UnreadableSampleError as error:
            return error
        except UserError as error:
            return UnreadableSampleError(str(error))

    prepared = read_ahead(prepare, range(len(inputs)), ahead=AHEAD * rows)
    for start in range(0, len(inputs), rows):
        names = [one.name for one in inputs[start : start + rows]]
        read = list(islice(prepared, len(names)))
        found = [one for one in read if not isinstance(one, UnreadableSampleError)]
        answers: Iterator[Prediction] = iter(())
        if found:
            with torch.inference_mode():
                features = backbone.features(backbone.preprocessing.collate([tensor for tensor, _ in found]))
        if found and isinstance(model.task, DenseTask):
            with torch.inference_mode():
                decoded = model.decoded(features, [size for _, size in found])
            answers = iter([Prediction("", *model.task.summarise(one), decoded=one) for one in decoded])
        elif found:
            with torch.inference_mode():
                given = model.answers_of(head(features)).cpu()
                strange = [None] * len(given) if model.foreign is None else model.foreign.is_foreign(features)
            answers = _predictions(model, given, coverage, strange)
        for name, one in zip(names, read, strict=True):
            if isinstance(one, UnreadableSampleError):
                yield Prediction(name, error=str(one))
            else:
                yield replace(next(answers), name=name)


def _divided(model: TransferModel, one: Input) -> Prediction:
    try:
        return Prediction(one.name, model.predict_item(one.read()))
    except UserError as error:
        return Prediction(one.name, error=str(error))
    except UnreadableSampleError as error:
        return Prediction(one.name, error=str(error))


def _predictions(
    model: TransferModel, answers: Tensor, coverage: float | None, foreign: Sequence[bool | None]
) -> Iterator[Prediction]:
    regions = model.sets(answers, coverage) if coverage is not None else [()] * len(answers)
    decisions = model.task.decide(answers)
    for decision, row, region, strange in zip(decisions, answers.tolist(), regions, foreign, strict=True):
        yield Prediction("", decision, tuple(row), region, foreign=strange)


@dataclass(frozen=True)
class ModelEvaluation:
    """How good a model is on labelled data.

    Attributes:
        report: the task's figures, with intervals.
        sums: the evaluation sums behind them.
        curves: the data of a report's plots, as JSON types.
        coverage: asked of the sets of classes, or intervals; None if none were asked for.
        covered: how many rows' sets or intervals hold their target.
        mean_size: of these sets or intervals.
        skipped: why each row that could not be read was left out.
    """

    report: Any
    sums: Any
    curves: dict[str, Any]
    coverage: float | None
    covered: int
    mean_size: float
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
    targets = torch.from_numpy(model.task.encode(samples))
    places = ItemPlaces.of(model.task, model.backbone.geometry, samples)
    if coverage is not None:
        model.sets(torch.empty(0, len(model.classes)), coverage)
    store = FeatureStore.open(model.backbone, samples, strict=strict, progress=progress)
    rows = torch.from_numpy(store.readable())
    head = model.head.to("cpu")
    if places is not None:
        if coverage is not None:
            raise UserError(f"{model.task.description[0].upper()}{model.task.description[1:]} has no coverage.")
        sums = places.evaluate(head, store.features, store.readable())
        curves = model.task.curves(sums)
        return ModelEvaluation(model.task.report(sums), sums, curves, None, 0, 0.0, store.skipped)
    with torch.inference_mode():
        parts = [head(store.features[rows[start : start + BLOCK]]) for start in range(0, len(rows), BLOCK)]
    outputs, truth = torch.cat(parts).double(), targets[rows]
    sums = model.task.judged(outputs, truth, model.calibration.temperature, model.unlearned_mask)
    covered, size = 0, 0.0
    if coverage is not None:
        regions = model.sets(model.answers_of(outputs), coverage)
        covered = sum(model.task.covers(one, target) for one, target in zip(regions, truth.tolist(), strict=True))
        size = sum(map(model.task.size, regions)) / max(len(regions), 1)
    return ModelEvaluation(
        report=model.task.report(sums),
        sums=sums,
        curves=model.task.curves(sums),
        coverage=coverage,
        covered=covered,
        mean_size=size,
        skipped=store.skipped,
    )
