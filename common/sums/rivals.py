"""Losses of several heads on the same rows, from sums: their temperatures, and the error of every difference."""

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


@dataclass(frozen=True, eq=False)
class RivalSums:
    """Losses of `H` heads, summed over the same rows.

    Attributes:
        paired: losses at the heads' own temperatures.
        curves: `[H, K]`, losses for logits divided by each of `TEMPERATURES`.
        right: `[H]`, int64, the score: rows that each head predicts correctly.
    """

    paired: PairedLosses
    curves: FloatArray
    right: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, heads: int) -> Self:
        """Return the sums over no rows."""
        return cls(PairedLosses.zeros(heads), np.zeros((heads, len(TEMPERATURES))), np.zeros(heads, np.int64))

    @classmethod
    def from_logits(
        cls,
        logits: "list[Tensor]",
        targets: "Tensor",
        right: "list[int]",
        temperatures: FloatArray,
        *,
        kind: TargetKind = CLASSES,
    ) -> Self:
        """Sum over rows.

        Args:
            logits: `[n, C]`, of each head.
            targets: `[n]` or `[n, C]`.
            right: the summed score of each head.
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
        return cls(PairedLosses.of(at), np.array(curves), np.array(right, np.int64))

    @classmethod
    def from_losses(cls, losses: FloatArray, right: "list[int]") -> Self:
        """Sum over rows whose losses `[H, n]` depend on no temperature."""
        paired = PairedLosses.of(losses)
        return cls(paired, np.repeat(paired.losses[:, None], len(TEMPERATURES), 1), np.array(right, np.int64))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.paired + other.paired, self.curves + other.curves, self.right + other.right)

    def __sub__(self, other: Self) -> Self:
        return type(self)(self.paired - other.paired, self.curves - other.curves, self.right - other.right)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.paired.rows

    @property
    def losses(self) -> FloatArray:
        """`[H]`, the sum of each head's losses at its own temperature."""
        return self.paired.losses

    def temperatures(self) -> FloatArray:
        """Return `[H]`, the temperature of least loss of each head; see `TemperatureSums.best`."""
        return np.array([TemperatureSums(self.rows, curve).best() for curve in self.curves])

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {**self.paired.to_arrays(), "curves": self.curves, "right": self.right}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays())
        paired = PairedLosses.from_arrays({name: arrays[name] for name in like.paired.to_arrays()}, like.paired)
        right = arrays["right"]
        if (right < 0).any() or (right > paired.rows).any():
            raise ValueError("it counts an impossible number of rows")
        check_losses("curves", arrays["curves"], paired.rows)
        return cls(paired, arrays["curves"], right.astype(np.int64))
