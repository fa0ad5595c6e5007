"""Detection sums: found boxes by class, score and overlap with a true box; they add across sites."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, added, check_form

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

OVERLAPS = np.linspace(0.5, 0.95, 10)
"""Thresholds of intersection over union above which a found box is correct; those of COCO."""

SCORE_BINS = 255
"""Bins of scores from 0 to 1, narrower towards both ends: confident detectors give most boxes a score near 1."""

_LOW, _HIGH = -7.0, 13.0
"""Log-odds of scores between which half of the bins are equal; the other half are equal in the scores themselves."""

_LARGEST = 1e12


@dataclass(frozen=True, eq=False)
class DetectionSums:
    """Counts over items of one head's boxes of `C` classes.

    Attributes:
        rows: the number of items.
        items: `[C]`, int64, items with a true box of each class.
        boxes: `[C]`, int64, true boxes.
        found: `[len(OVERLAPS), C, 2, SCORE_BINS]`, int64, wrong and correct found boxes by score.
        loss_sum: the sum over items of the mean cross entropy of their places' objectness, in nats.
    """

    rows: int
    items: IntArray
    boxes: IntArray
    found: IntArray
    loss_sum: float

    @classmethod
    def zeros(cls, classes: int) -> Self:
        """Return the sums over no items."""
        none = np.zeros(classes, np.int64)
        return cls(0, none, none, np.zeros((len(OVERLAPS), classes, 2, SCORE_BINS), np.int64), 0.0)

    def __add__(self, other: Self) -> Self:
        if self.found.shape != other.found.shape:
            raise ValueError("Cannot add boxes of different classes.")
        return added(self, other)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire."""
        return {
            "rows": np.array([self.rows], np.uint32),
            "items": self.items.astype(np.uint32),
            "boxes": self.boxes.astype(np.uint32),
            "found": self.found.astype(np.uint32),
            "loss_sum": np.array([self.loss_sum]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no items can have these sums.
        """
        check_form(arrays, like.to_arrays(), _LARGEST)
        sums = cls(
            int(arrays["rows"][0]),
            arrays["items"].astype(np.int64),
            arrays["boxes"].astype(np.int64),
            arrays["found"].astype(np.int64),
            float(arrays["loss_sum"][0]),
        )
        if (sums.items > sums.rows).any() or (sums.boxes < sums.items).any() or (sums.boxes[sums.items == 0] > 0).any():
            raise ValueError("'items' and 'boxes' contradict each other or 'rows'")
        if (sums.found[:, :, 1].sum(2) > sums.boxes).any():
            raise ValueError("'found' has more correct boxes than there are true ones")
        correct = sums.found[:, :, 1]
        if (correct[1:].sum(2) > correct[:-1].sum(2)).any() or sums.loss_sum < 0:
            raise ValueError("'found' or 'loss_sum' is out of range")
        if not sums.rows and (sums.found.any() or sums.loss_sum):
            raise ValueError("there are no items, but 'found' or 'loss_sum' is not 0")
        return sums


def detection_sums(
    corners: FloatArray,
    scores: FloatArray,
    labels: IntArray,
    true: FloatArray,
    classes: IntArray,
    ignored: BoolArray,
    num_classes: int,
    loss: float = 0.0,
) -> DetectionSums:
    """Return the sums of one item, matched as COCO's evaluation does.

    By descending score, a found box takes the free true box of its class with the largest overlap, if that reaches the
    threshold. Boxes that match only an ignored one, by the share of their own area, are not counted.

    Args:
        corners: `[k, 4]`, found boxes.
        scores: `[k]`, 0 to 1.
        labels: `[k]`, their classes.
        true: `[m, 4]`, true boxes in the same units.
        classes: `[m]`.
        ignored: `[m]`, crowds and difficult objects.
        num_classes: `C`.
        loss: of the item.
    """
    boxes = np.bincount(classes[~ignored], minlength=num_classes).astype(np.int64)
    found = np.zeros((len(OVERLAPS), num_classes, 2, SCORE_BINS), np.int64)
    for label in range(num_classes):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        own = classes == label
        correct, counted = _matched(corners[mine], true[own & ~ignored], true[own & ignored])
        bins = score_bins(scores[mine])
        for threshold in range(len(OVERLAPS)):
            chosen = counted[threshold]
            np.add.at(found[threshold, label], (correct[threshold, chosen].astype(np.int64), bins[chosen]), 1)
    return DetectionSums(1, (boxes > 0).astype(np.int64), boxes, found, loss)


def score_bins(scores: FloatArray) -> IntArray:
    """Return the bins of scores; a higher score has the same bin or a later one."""
    inside = scores.astype(np.float64).clip(1e-9, 1 - 1e-9)
    odds = np.log(inside / (1 - inside)).clip(_LOW, _HIGH)
    place = (inside + (odds - _LOW) / (_HIGH - _LOW)) / 2
    bins: IntArray = np.minimum((place * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
    return bins


def _matched(corners: FloatArray, true: FloatArray, ignored: FloatArray) -> tuple[BoolArray, BoolArray]:
    """Return `[T, k]`, whether found boxes of one class, by descending score, are correct, and whether they count."""
    correct = np.zeros((len(OVERLAPS), len(corners)), np.bool_)
    free = np.ones((len(OVERLAPS), len(true)), np.bool_)
    overlap = overlaps_of(corners, true)
    levels = np.minimum(OVERLAPS, 1 - 1e-10)
    for place in range(len(corners) if len(true) else 0):
        reached = np.where(free, overlap[place], -1.0)
        # Of equal overlaps the last is taken, as by COCO's evaluation.
        best = len(true) - 1 - reached[:, ::-1].argmax(1)
        hit = reached[np.arange(len(levels)), best] >= levels
        correct[hit, place] = True
        free[np.flatnonzero(hit), best[hit]] = False
    beside = overlaps_of(corners, ignored, of_first=True).max(1, initial=0.0)
    return correct, correct | (beside < levels[:, None])


def overlaps_of(first: FloatArray, second: FloatArray, *, of_first: bool = False) -> FloatArray:
    """Return `[k, m]`, the intersection over the union of boxes, or over the area of the first ones."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area, other = ((one[:, 2:] - one[:, :2]).prod(-1) for one in (first, second))
    union = area[:, None] + (0 if of_first else other[None] - both)
    shares: FloatArray = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shares
