"""Segmentation sums: pixels by true and predicted class, with the second moments by item that intervals need."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, added, check_form

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNIT = 65_536
"""Pixels in a unit of the moments, which keeps them small beside the range of secure sums."""

_LARGEST = 1e15


@dataclass(frozen=True, eq=False)
class SegmentationSums:
    """Sums over items of one head's predicted classes of pixels; they add across sites.

    Attributes:
        rows: the number of items.
        present: `[C]`, int64, items that contain each class.
        confusion: `[C, C]`, int64, pixels by true and by predicted class.
        moments: `[2 C, 2 C]`, the sum over items of the outer product of each class's intersection and union.
        loss_sum: the sum over items of the mean cross entropy of places, in nats.
    """

    rows: int
    present: IntArray
    confusion: IntArray
    moments: FloatArray
    loss_sum: float

    @classmethod
    def zeros(cls, classes: int) -> Self:
        """Return the sums over no items."""
        confusion = np.zeros((classes, classes), np.int64)
        return cls(0, np.zeros(classes, np.int64), confusion, np.zeros((2 * classes, 2 * classes)), 0.0)

    @classmethod
    def of_item(cls, confusion: IntArray, loss: float) -> Self:
        """Return the sums over one item."""
        parts = np.concatenate(overlaps(confusion)) / UNIT
        present = (confusion.sum(1) > 0).astype(np.int64)
        return cls(1, present, confusion.astype(np.int64), np.outer(parts, parts), loss)

    def __add__(self, other: Self) -> Self:
        if self.confusion.shape != other.confusion.shape:
            raise ValueError("Cannot add pixels of different classes.")
        return added(self, other)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire."""
        return {
            "rows": np.array([self.rows], np.uint32),
            "present": self.present.astype(np.uint32),
            "confusion": self.confusion,
            "moments": self.moments,
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
            arrays["present"].astype(np.int64),
            np.array(arrays["confusion"], np.int64),
            np.array(arrays["moments"]),
            float(arrays["loss_sum"][0]),
        )
        if (sums.present > sums.rows).any():
            raise ValueError("'present' counts more items than there are")
        if (sums.confusion < 0).any() or (sums.confusion > _LARGEST).any():
            raise ValueError("'confusion' is out of range")
        if (sums.confusion.sum(1)[sums.present == 0] > 0).any():
            raise ValueError("'confusion' has pixels of a class that no item contains")
        if (sums.moments < -1e-6).any() or sums.loss_sum < 0:
            raise ValueError("'moments' or 'loss_sum' is out of range")
        return sums


def overlaps(confusion: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return each class's intersection and union `[C]` in pixels."""
    both = np.diagonal(confusion).astype(np.float64)
    return both, confusion.sum(0) + confusion.sum(1) - both
