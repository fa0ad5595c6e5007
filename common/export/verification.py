"""The comparison of an export with its model, on samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhead.errors import FedheadError
from fedhead.export.classifier import Outputs, by_image, classifier_of, sample_inputs
from fedhead.model import TransferModel

TOLERANCE = 1e-4

BATCH_SIZES = (1, 2, 5)
"""Batch sizes for verifying an export; tracing uses another size."""


@torch.no_grad()
def require_same(model: TransferModel, run: Callable[..., Outputs], file_format: str) -> float:
    """Return the largest difference between the model and its export on samples.

    Raises:
        FedheadError: if it is above `TOLERANCE`, or the export does not run.
    """
    classifier, largest, answers = classifier_of(model), 0.0, model.task.answer_name
    for rows in BATCH_SIZES:
        inputs = sample_inputs(model.backbone, rows)
        expected = classifier(*inputs)
        try:
            given = run(*inputs)
        # A runtime may raise any error for a program that it cannot run.
        except Exception as error:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} does not run on {rows} samples "
                f"({first_line(error)}); nothing was written."
            ) from error
        difference = apart(given, expected) if by_image(model.backbone) else _difference(given, expected)
        if not difference <= TOLERANCE:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} differs from the model: its {answers} differ by "
                f"{difference:.2g} on {rows} samples, and the limit is {TOLERANCE:g}. Nothing was written."
            )
        largest = max(largest, difference)
    return largest


def apart(given: Outputs, expected: Outputs) -> float:
    """Return the largest distance of a place's answers `[n, P, ...]` from the nearest place's in the same image.

    Proposals with nearly equal scores may come in any order.
    """
    assert isinstance(given, Tensor) and isinstance(expected, Tensor)
    if given.shape != expected.shape:
        return float("inf")
    distance = torch.cdist(given.flatten(2), expected.flatten(2), p=torch.inf)
    largest = float(torch.maximum(distance.amin(1), distance.amin(2)).max()) / max(1.0, float(expected.abs().max()))
    return largest if largest == largest else float("inf")


def _difference(given: Outputs, expected: Outputs) -> float:
    """Return the largest difference, relative to the largest expected value above 1; infinite for other shapes."""
    if not isinstance(expected, Tensor):
        return max(map(_difference, given, expected)) if len(given) == len(expected) else float("inf")
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return float("inf")
    difference = float((given - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return difference if difference == difference else float("inf")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].rstrip(".:") + ".") if lines else f"{type(error).__name__}."
