"""Losses of several heads on the same rows, from sums: the mean of every difference, and its standard error."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import Arrays, check_form

FloatArray = npt.NDArray[np.float64]

MOST_LOSS = 50.0
"""Limit on the loss of a row, so that no row, and no liar beyond its number of rows, decides a comparison."""

MOST_COUNTED = 2**50
"""Limit on the rows of a reply, so that sums of counts over thousands of sites fit into int64."""

_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class PairedLosses:
    """Losses of `H` heads, summed over the same rows.

    Attributes:
        rows: the number of rows.
        losses: `[H]`, the sum of each head's losses.
        products: `[H, H]`, sums of products of two heads' losses.
    """

    rows: int
    losses: FloatArray
    products: FloatArray

    @classmethod
    def zeros(cls, heads: int) -> Self:
        """Return the sums over no rows."""
        return cls(0, np.zeros(heads), np.zeros((heads, heads)))

    @classmethod
    def of(cls, losses: FloatArray) -> Self:
        """Sum over rows.

        Args:
            losses: `[H, n]`, at least 0; those above `MOST_LOSS` count as `MOST_LOSS`.
        """
        losses = np.minimum(losses, MOST_LOSS)
        return cls(losses.shape[1], losses.sum(1), losses @ losses.T)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows, self.losses + other.losses, self.products + other.products)

    def __sub__(self, other: Self) -> Self:
        return type(self)(self.rows - other.rows, self.losses - other.losses, self.products - other.products)

    def gain(self, head: int, over: int) -> tuple[float, float]:
        """Return the reduction of the mean loss by a head over another one, and its standard error.

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
        return {"rows": np.array([self.rows], np.int64), "losses": self.losses, "products": self.products}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, like.to_arrays())
        rows, losses, products = int(arrays["rows"][0]), arrays["losses"], arrays["products"]
        if not 0 <= rows <= MOST_COUNTED:
            raise ValueError("it counts an impossible number of rows")
        check_losses("losses", losses, rows)
        check_losses("products", products, rows, MOST_LOSS**2)
        squares = products.diagonal()
        # Cauchy-Schwarz, of the losses with ones and with each other; slack for rounding in fixed point.
        slack = _SLACK * (1 + rows)
        if (losses**2 > rows * squares + slack * (1 + losses)).any():
            raise ValueError("'losses' and 'products' contradict each other")
        if (products**2 > np.outer(squares, squares) + slack * (1 + products)).any():
            raise ValueError("'products' contradict each other")
        if (np.abs(products - products.T) > slack * (1 + products)).any():
            raise ValueError("'products' are not symmetric")
        # No loss is above the limit, and the square of a mean difference is not above the mean square: without these, a
        # liar could report a large gain of one head as certain.
        if (products > MOST_LOSS * (np.minimum.outer(losses, losses) + slack)).any():
            raise ValueError("'products' are too large for the losses")
        distances = squares[:, None] - 2 * products + squares
        if (np.subtract.outer(losses, losses) ** 2 > rows * (distances + slack * MOST_LOSS)).any():
            raise ValueError("the differences of 'losses' contradict 'products'")
        return cls(rows, losses, products)


def check_losses(name: str, values: FloatArray, rows: int, largest: float = MOST_LOSS) -> None:
    """Check that sums of losses are possible for a number of rows.

    Raises:
        ValueError: if one is negative, or above `largest` for each row.
    """
    if (values < 0).any() or (values > largest * rows * (1 + _SLACK) + _SLACK).any():
        raise ValueError(f"{name!r} is negative or too large for its number of rows")
