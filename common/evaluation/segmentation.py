"""Metrics of segmentation from sums: intersection over union and Dice, by class and on average."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.evaluation.metrics import Estimate, as_json
from fedhead.sums.segmentation import UNIT, SegmentationSums, overlaps

FloatArray = npt.NDArray[np.float64]

_Z = 1.959963984540054
_NO_PIXELS = "No held-out pixel is of this class."
_ONE_ITEM = "One item has no interval."


@dataclass(frozen=True)
class ClassArea:
    """Metrics of one class.

    Attributes:
        name: the name of the class.
        items: the number of items that contain it.
        share: its share of the pixels; None without pixels.
        iou: intersection over union of its true and predicted pixels.
        dice: twice the intersection over the sum of both.
    """

    name: str
    items: int
    share: float | None
    iou: Estimate
    dice: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON types."""
        return {
            "name": self.name,
            "items": self.items,
            "share": self.share,
            **as_json({"iou": self.iou, "dice": self.dice}),
        }


@dataclass(frozen=True)
class SegmentationReport:
    """Metrics of a head on the items of one site, or of all sites pooled.

    Attributes:
        rows: the number of items.
        loss: the mean cross entropy of places in nats; None without items.
        miou: the mean intersection over union over the classes that items contain.
        dice: the mean Dice coefficient, likewise.
        areas: each class's metrics.
    """

    rows: int
    loss: float | None
    miou: Estimate
    dice: Estimate
    areas: tuple[ClassArea, ...]

    @property
    def score(self) -> Estimate:
        """Mean intersection over union."""
        return self.miou

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        return {
            "rows": self.rows,
            "loss": self.loss,
            **as_json({"miou": self.miou, "dice": self.dice}),
            "areas": [one.to_dict() for one in self.areas],
        }


def segmentation_report(sums: SegmentationSums, classes: Sequence[str]) -> SegmentationReport:
    """Compute metrics with 95 % intervals from the sums of one site, or of several added.

    Ratios are of pixels summed over items. Their intervals are by the delta method on sums over independent items.
    """
    both, union = overlaps(sums.confusion)
    seen = sums.present > 0
    ious = [_ratio(sums, row) for row in _iou_weights(both, union)]
    dices = [_ratio(sums, row) for row in _dice_weights(both, union)]
    values = {"iou": np.divide(both, union, out=np.zeros_like(both), where=seen)}
    values["dice"] = 2 * values["iou"] / (1 + values["iou"])
    total = sums.confusion.sum()
    areas = tuple(
        ClassArea(
            name,
            int(sums.present[place]),
            float(sums.confusion[place].sum() / total) if total else None,
            _estimate(float(values["iou"][place]), ious[place], bool(seen[place])),
            _estimate(float(values["dice"][place]), dices[place], bool(seen[place])),
        )
        for place, name in enumerate(classes)
    )
    count = max(int(seen.sum()), 1)
    means = {
        name: _estimate(
            float(values[name][seen].sum() / count),
            _ratio(sums, weights[seen].sum(0) / count),
            bool(seen.any()),
        )
        for name, weights in (("iou", _iou_weights(both, union)), ("dice", _dice_weights(both, union)))
    }
    loss = sums.loss_sum / sums.rows if sums.rows else None
    return SegmentationReport(sums.rows, loss, means["iou"], means["dice"], areas)


def _iou_weights(both: FloatArray, union: FloatArray) -> FloatArray:
    """Return `[C, 2 C]`, the derivatives of each class's ratio by the sums of intersections and unions."""
    return _weights(both / np.maximum(union, 1), np.maximum(union, 1), 1.0)


def _dice_weights(both: FloatArray, union: FloatArray) -> FloatArray:
    """Return `[C, 2 C]`, likewise of `2 I / (I + U)`."""
    iou = both / np.maximum(union, 1)
    return _weights(iou, np.maximum(union, 1), 2 / (1 + iou) ** 2)


def _weights(iou: FloatArray, union: FloatArray, slope: "FloatArray | float") -> FloatArray:
    scale = slope / union
    return np.hstack([np.diag(scale * np.ones_like(union)), np.diag(-scale * iou)])


def _ratio(sums: SegmentationSums, weights: FloatArray) -> float:
    """Return the standard error of a ratio, whose terms of all items add up to 0; one item has an infinite one."""
    if sums.rows <= 1:
        return math.inf
    variance = float(weights @ sums.moments @ weights) * UNIT**2
    return math.sqrt(max(variance, 0.0) * sums.rows / (sums.rows - 1))


def _estimate(value: float, error: float, known: bool) -> Estimate:
    if not known:
        return Estimate.undefined(_NO_PIXELS)
    if not math.isfinite(error):
        return Estimate(value, None, None, _ONE_ITEM)
    return Estimate(value, max(value - _Z * error, 0.0), min(value + _Z * error, 1.0))
