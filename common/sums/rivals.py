"""Losses of several heads on the same rows, from sums: their temperatures, and the error of every difference."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.calibration import TEMPERATURES, TemperatureSums, losses_of
from fedhead.sums.paired import MOST_LOSS, FloatArray, PairedLosses, check_losses
from fedhead.sums.sums import Arrays, check_form
from fedhead.sums.targets import CLASSES, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RivalSums:
    """Losses of `H` heads, summed over the same rows.

    Attributes:
        paired: losses at the heads' own temperatures.
        curves: `[H, K]`, losses for logits divided by each of `TEMPERATURES`.
        both: `[H, H]`, int64, rows that two heads predict correctly; on the diagonal, those of each.
    """

    paired: PairedLosses
    curves: FloatArray
    both: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, heads: int) -> Self:
        """Return the sums over no rows."""
        return cls(PairedLosses.zeros(heads), np.zeros((heads, len(TEMPERATURES))), np.zeros((heads, heads), np.int64))

    @classmethod
    def from_logits(
        cls,
        logits: "list[Tensor]",
        targets: "Tensor",
        right: BoolArray,
        temperatures: FloatArray,
        *,
        kind: TargetKind = CLASSES,
    ) -> Self:
        """Sum over rows.

        Args:
            logits: `[n, C]`, of each head.
            targets: `[n]` or `[n, C]`.
            right: `[H, n]`, whether each head predicts each row correctly.
            temperatures: `[H]`.
            kind: of the targets.
        """
        curves = [
            [float(losses_of(one.double() / value, targets, kind).clamp(max=MOST_LOSS).sum()) for value in TEMPERATURES]
            for one in logits
        ]
        at = np.stack(
            [
                losses_of(one.double() / value, targets, kind).numpy()
                for one, value in zip(logits, temperatures.tolist(), strict=True)
            ]
        )
        return cls(PairedLosses.of(at), np.array(curves), _together(right))

    @classmethod
    def from_losses(cls, losses: FloatArray, right: BoolArray) -> Self:
        """Sum over rows whose losses `[H, n]` depend on no temperature."""
        paired = PairedLosses.of(losses)
        return cls(paired, np.repeat(paired.losses[:, None], len(TEMPERATURES), 1), _together(right))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.paired + other.paired, self.curves + other.curves, self.both + other.both)

    def __sub__(self, other: Self) -> Self:
        return type(self)(self.paired - other.paired, self.curves - other.curves, self.both - other.both)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.paired.rows

    @property
    def right(self) -> npt.NDArray[np.int64]:
        """`[H]`, the score: rows that each head predicts correctly."""
        return self.both.diagonal()

    def more_right(self, head: int, over: int) -> tuple[float, float]:
        """Return the gain in the share of correct rows by a head over another one, and its standard error.

        The rows are paired: only those count that one head predicts correctly and the other one does not.
        """
        if self.rows < 2:
            return 0.0, math.inf
        mean = float(self.right[head] - self.right[over]) / self.rows
        apart = float(self.right[head] + self.right[over] - 2 * self.both[head, over]) / self.rows
        return mean, math.sqrt(max(apart - mean**2, 0.0) / (self.rows - 1))

    @property
    def losses(self) -> FloatArray:
        """`[H]`, the sum of each head's losses at its own temperature."""
        return self.paired.losses

    def temperatures(self) -> FloatArray:
        """Return `[H]`, the temperature of least loss of each head; see `TemperatureSums.best`."""
        return np.array([TemperatureSums(self.rows, curve).best() for curve in self.curves])

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {**self.paired.to_arrays(), "curves": self.curves, "both": self.both}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays())
        paired = PairedLosses.from_arrays({name: arrays[name] for name in like.paired.to_arrays()}, like.paired)
        both = arrays["both"].astype(np.int64)
        right = both.diagonal()
        either = np.add.outer(right, right) - both
        if (both < 0).any() or (both > np.minimum.outer(right, right)).any() or (either > paired.rows).any():
            raise ValueError("it counts an impossible number of rows")
        if (both != both.T).any():
            raise ValueError("'both' is not symmetric")
        check_losses("curves", arrays["curves"], paired.rows)
        return cls(paired, arrays["curves"], both)


def _together(right: BoolArray) -> npt.NDArray[np.int64]:
    counted = right.astype(np.float64)
    return (counted @ counted.T).astype(np.int64)
