"""Losses of several heads on the same rows, from sums: their temperatures, and the error of every difference."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.calibration import TEMPERATURES, TemperatureSums, losses_of
from fedhead.sums.sums import Arrays, check_form
from fedhead.sums.targets import CLASSES, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]

MOST_LOSS = 50.0
"""Bar on the loss of a row, in nats, so that no row, and no liar beyond its number of rows, decides a comparison."""

_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class RivalSums:
    """Losses of `H` heads, summed over the same rows.

    Attributes:
        rows: the number of rows.
        curves: `[H, K]`, losses for logits divided by each of `TEMPERATURES`.
        losses: `[H]`, losses at the heads' own temperatures.
        products: `[H, H]`, sums of products of two heads' losses at their own temperatures.
        right: `[H]`, int64, the score: rows that each head predicts correctly.
    """

    rows: int
    curves: FloatArray
    losses: FloatArray
    products: FloatArray
    right: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, heads: int) -> Self:
        """Return the sums over no rows."""
        curves, products = np.zeros((heads, len(TEMPERATURES))), np.zeros((heads, heads))
        return cls(0, curves, np.zeros(heads), products, np.zeros(heads, np.int64))

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
                losses_of(one.double() / value, targets, kind).clamp(max=MOST_LOSS).numpy()
                for one, value in zip(logits, temperatures.tolist(), strict=True)
            ]
        )
        return cls(at.shape[1], np.array(curves), at.sum(1), at @ at.T, np.array(right, np.int64))

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.rows + other.rows,
            self.curves + other.curves,
            self.losses + other.losses,
            self.products + other.products,
            self.right + other.right,
        )

    def temperatures(self) -> FloatArray:
        """Return `[H]`, the temperature of least loss of each head; see `TemperatureSums.best`."""
        return np.array([TemperatureSums(self.rows, curve).best() for curve in self.curves])

    def gain(self, head: int, over: int) -> tuple[float, float]:
        """Return how much less a head's mean loss is than another's, and the standard error of this difference.

        The rows are paired: `sum (a - b)^2` follows from `products`.
        """
        if self.rows < 2:
            return 0.0, math.inf
        mean = (self.losses[over] - self.losses[head]) / self.rows
        squares = self.products[over, over] - 2 * self.products[over, head] + self.products[head, head]
        variance = max(squares / self.rows - mean**2, 0.0)
        return float(mean), math.sqrt(variance / (self.rows - 1))

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {
            "rows": np.array([self.rows], np.int64),
            "curves": self.curves,
            "losses": self.losses,
            "products": self.products,
            "right": self.right,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays())
        rows, right = int(arrays["rows"][0]), arrays["right"]
        if rows < 0 or (right < 0).any() or (right > rows).any():
            raise ValueError("it counts an impossible number of rows")
        for name, bar in (("curves", MOST_LOSS), ("losses", MOST_LOSS), ("products", MOST_LOSS**2)):
            if (arrays[name] < 0).any() or (arrays[name] > bar * rows * (1 + _SLACK) + _SLACK).any():
                raise ValueError(f"{name!r} is negative or too large for its number of rows")
        losses, products = arrays["losses"], arrays["products"]
        squares = products.diagonal()
        # Cauchy-Schwarz, of the losses with ones and with each other; slack for rounding in fixed point.
        slack = _SLACK * (1 + rows)
        if (losses**2 > rows * squares + slack * (1 + losses)).any():
            raise ValueError("'losses' and 'products' contradict each other")
        if (products**2 > np.outer(squares, squares) + slack * (1 + products)).any():
            raise ValueError("'products' contradict each other")
        return cls(rows, arrays["curves"], losses, products, right.astype(np.int64))
