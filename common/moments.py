"""Feature moments: the sums that standardising needs, where no Gram matrix is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedhead.errors import UserError

_NAMES = {"rows": (torch.int64, (1,)), "total": (torch.float64, None), "squares": (torch.float64, None)}


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Sums of `x - origin` and of its squares over rows of `d` features; moments about one origin add.

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

    def __add__(self, other: Self) -> Self:
        if not torch.equal(self.origin, other.origin):
            raise ValueError("Moments about different origins do not add.")
        return type(self)(self.origin, self.rows + other.rows, self.total + other.total, self.squares + other.squares)

    def mean(self) -> Tensor:
        """Return `[d]`, the mean of all rows.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        return self.origin + self.total / self.rows

    def scale(self) -> Tensor:
        """Return `[d]`, the standard deviations, with 1 for features that vary by no more than rounding.

        Raises:
            UserError: if there are no rows.
        """
        self._require_rows()
        scatter = self.squares - self.total.square() / self.rows
        varies = scatter > 2 * torch.finfo(torch.float64).eps * (self.rows + 16) * self.squares
        return torch.where(varies, scatter / self.rows, 1.0).sqrt()

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for the wire; both sides know the origin."""
        return {"rows": torch.tensor([self.rows]), "total": self.total.cpu(), "squares": self.squares.cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], origin: Tensor) -> Self:
        """Undo `to_tensors`, trusting nothing.

        Raises:
            ValueError: if a name, type or shape differs, or the sums cannot be those of any rows.
        """
        shapes = {name: shape or tuple(origin.shape) for name, (_, shape) in _NAMES.items()}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != {name: (dtype, shapes[name]) for name, (dtype, _) in _NAMES.items()}:
            raise ValueError("its moments have other names, types or shapes")
        rows, total, squares = int(tensors["rows"]), tensors["total"], tensors["squares"]
        if rows < 0 or not bool(torch.isfinite(total).all() and torch.isfinite(squares).all() and (squares >= 0).all()):
            raise ValueError("its moments are not finite, or negative")
        if bool((total.square() > squares * rows * (1 + 1e-9)).any()):
            raise ValueError("its moments are those of no rows")
        return cls(origin.to(torch.float64), rows, total, squares)

    def _require_rows(self) -> None:
        if self.rows == 0:
            raise UserError("There are no rows: every site was empty, or withheld what it has.")
