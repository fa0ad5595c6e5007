"""Metrics of detection from sums: average precision, by class and on average."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.metrics import Estimate, as_json
from fedhead.sums.detection import DetectionSums

FloatArray = npt.NDArray[np.float64]

_Z = 1.959963984540054
_LEVELS = np.linspace(0, 1, 101)
"""Recalls at which the precision is averaged; those of COCO."""

_NO_BOXES = "No item has a box of this class."
_ONE_ITEM = "One item has no interval."


@dataclass(frozen=True)
class ClassBoxes:
    """Metrics of one class.

    Attributes:
        name: the name of the class.
        items: the number of items with a box of it.
        boxes: the number of its boxes.
        ap50: its average precision at an intersection over union of 0.5.
        ap: its average precision, averaged over intersections over union from 0.5 to 0.95.
    """

    name: str
    items: int
    boxes: int
    ap50: Estimate
    ap: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON types."""
        return {
            "name": self.name,
            "items": self.items,
            "boxes": self.boxes,
            **as_json({"ap50": self.ap50, "ap": self.ap}),
        }


@dataclass(frozen=True)
class DetectionReport:
    """Metrics of a head on the items of one site, or of all sites pooled.

    Attributes:
        rows: the number of items.
        loss: the mean cross entropy of objectness in nats; None without items.
        ap50: the mean over classes with boxes of the average precision at an intersection over union of 0.5.
        ap: likewise, averaged over intersections over union from 0.5 to 0.95.
        boxes: each class's metrics.
    """

    rows: int
    loss: float | None
    ap50: Estimate
    ap: Estimate
    boxes: tuple[ClassBoxes, ...]

    @property
    def score(self) -> Estimate:
        """Mean average precision at an intersection over union of 0.5."""
        return self.ap50

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        return {
            "rows": self.rows,
            "loss": self.loss,
            **as_json({"ap50": self.ap50, "ap": self.ap}),
            "boxes": [one.to_dict() for one in self.boxes],
        }


def average_precisions(sums: DetectionSums) -> FloatArray:
    """Return `[T, C]`, the average precision by threshold and class; NaN for classes without boxes.

    As in COCO's evaluation, precision at a recall is the largest at this recall or above, averaged over 101 recalls.
    Boxes whose scores share a bin are taken together, which changes the average over classes by a few thousandths.
    """
    counts = sums.found[..., ::-1].cumsum(-1)
    wrong, correct = counts[:, :, 0], counts[:, :, 1]
    recall = correct / np.maximum(sums.boxes[:, None], 1)
    precision = correct / np.maximum(wrong + correct, 1)
    envelope = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
    result = np.full(recall.shape[:2], np.nan)
    for label in np.flatnonzero(sums.boxes):
        for threshold in range(len(recall)):
            place = np.searchsorted(recall[threshold, label], _LEVELS, side="left")
            reached = place < recall.shape[2]
            levels = np.where(reached, envelope[threshold, label][np.minimum(place, recall.shape[2] - 1)], 0.0)
            result[threshold, label] = levels.mean()
    return result


def detection_report(sums: DetectionSums, classes: Sequence[str]) -> DetectionReport:
    """Compute average precisions with 95 % intervals from the sums of one site, or of several added.

    The interval of a class is that of Boyd, Eng and Page (ECML PKDD 2013), symmetric on the logit scale, for as many
    independent trials as items have the class: boxes of one item are alike. That of the mean has the mean width,
    as if the classes' errors were equal.
    """
    table = average_precisions(sums)
    at_half, averaged = table[0], table.mean(0)
    own = tuple(
        ClassBoxes(
            name,
            int(sums.items[place]),
            int(sums.boxes[place]),
            _estimate(float(at_half[place]), int(sums.items[place])),
            _estimate(float(averaged[place]), int(sums.items[place])),
        )
        for place, name in enumerate(classes)
    )
    loss = sums.loss_sum / sums.rows if sums.rows else None
    means = _mean([one.ap50 for one in own]), _mean([one.ap for one in own])
    return DetectionReport(sums.rows, loss, *means, own)


def _estimate(value: float, items: int) -> Estimate:
    if not items or math.isnan(value):
        return Estimate.undefined(_NO_BOXES)
    if items == 1:
        return Estimate(value, None, None, _ONE_ITEM)
    # At 0 and 1 the logit is infinite; half a trial is added to either side.
    centre = (value * items + 0.5) / (items + 1)
    logit, error = math.log(centre / (1 - centre)), _Z / math.sqrt(items * centre * (1 - centre))
    low, high = (1 / (1 + math.exp(-(logit + sign * error))) for sign in (-1, 1))
    return Estimate(value, min(low, value), max(high, value))


def _mean(parts: Sequence[Estimate]) -> Estimate:
    values = [one.value for one in parts if one.value is not None]
    if not values:
        return Estimate.undefined(_NO_BOXES)
    ends = [(one.low, one.high) for one in parts if one.low is not None and one.high is not None]
    value = float(np.mean(values))
    if len(ends) < len(values):
        return Estimate(value, None, None, _ONE_ITEM)
    low, high = np.array(ends, np.float64).mean(0).tolist()
    return Estimate(value, low, high)
