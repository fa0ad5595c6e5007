"""Feature moments: the sums needed for standardisation without a Gram matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.sums.packing import LARGEST
from fedhead.sums.totals import HARDLY, negligible


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Sums of `x - origin` and of its squares over rows of `d` features; moments about the same origin add.

    Of items with places, each item adds the means over its places.

    Attributes:
        origin: `[d]`, float64.
        rows: the number of rows.
        total: `[d]`, float64, the sum.
        squares: `[d]`, float64, the sum of squares.
    """

    origin: Tensor
    rows: int
    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, origin: Tensor) -> Self:
        """Return the moments of no rows about `origin` `[d]`."""
        origin = origin.to(torch.float64)
        return cls(origin, 0, torch.zeros_like(origin), torch.zeros_like(origin))

    def updated(self, features: Tensor) -> Self:
        """Return the moments with the rows `[n, d]` added."""
        block = features.to(torch.float64, copy=True).sub_(self.origin)
        total = self.total + block.sum(0)
        return type(self)(self.origin, self.rows + len(block), total, self.squares + block.square_().sum(0))

    def with_item(self, places: Tensor) -> Self:
        """Return the moments with one item added, by the means over its places `[p, d]`, at least one."""
        block = places.to(torch.float64, copy=True).sub_(self.origin)
        total = self.total + block.mean(0)
        return type(self)(self.origin, self.rows + 1, total, self.squares + block.square_().mean(0))

    def __add__(self, other: Self) -> Self:
        if not torch.equal(self.origin, other.origin):
            raise ValueError("Moments about different origins cannot be added.")
        return type(self)(self.origin, self.rows + other.rows, self.total + other.total, self.squares + other.squares)

    def mean(self) -> Tensor:
        """Return `[d]`, the mean of all rows.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.origin + self.total / self.rows

    def columns(self, start: int, stop: int | None = None) -> Self:
        """Return the moments of the columns from `start` to before `stop`."""
        part = slice(start, stop)
        return type(self)(self.origin[part], self.rows, self.total[part], self.squares[part])

    def scale(self, hardly: float = HARDLY) -> Tensor:
        """Return `[d]`, the standard deviations, with 1 for features that count as constant.

        Args:
            hardly: the share of the largest variance below which a feature counts as constant; 0 for columns of
                different kinds.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        scatter = self.squares - self.total.square() / self.rows
        varies = scatter > torch.maximum(negligible(self.squares, self.rows), hardly * scatter.max())
        return torch.where(varies, scatter / self.rows, 1.0).sqrt()

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sums by name, for the wire; both sides know the origin."""
        return {
            "rows": np.array([self.rows], np.int64),
            "total": self.total.cpu().numpy(),
            "squares": self.squares.cpu().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: moments about the expected origin.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        try:
            tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        except TypeError as error:
            raise ValueError(f"its moments have an unsupported number type ({error})") from None
        expected = like.to_arrays()
        forms, wanted = (
            {name: (array.dtype, array.shape) for name, array in each.items()} for each in (arrays, expected)
        )
        if forms != wanted:
            raise ValueError("its moments have different names, types or shapes")
        rows, total, squares = int(tensors["rows"]), tensors["total"], tensors["squares"]
        if rows < 0 or not bool(((total.abs() <= LARGEST) & (squares <= LARGEST) & (squares >= 0)).all()):
            raise ValueError("its moments are not finite, too large or negative")
        if bool((total.square() > squares * rows * (1 + 1e-9)).any()) or (rows == 0 and bool(squares.any())):
            raise ValueError("its moments contradict its number of rows")
        return cls(like.origin, rows, total, squares)

    def _require_rows(self) -> None:
        if self.rows == 0:
            raise UserError("There are no rows: every site was empty or withheld its rows.")
