"""Kinds of targets: validation, and accumulation with the features. Light to import."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class TargetKind(ABC):
    """The kind of the `K` columns of targets, as used by feature statistics."""

    name: ClassVar[str]

    exclusive: ClassVar[bool] = False
    """Whether every row has exactly one class, so that the counts sum to the number of rows."""

    real: ClassVar[bool] = False
    """Whether targets are real numbers; else they are 0 or 1, and their sums are counts."""

    of_places: ClassVar[bool] = False
    """Whether rows are places of items, and statistics also count the items, which are what is independent."""

    @abstractmethod
    def check(self, targets: "Tensor", rows: int, columns: int) -> None:
        """Check the targets of `rows` rows.

        Raises:
            ValueError: if they are not of this kind.
        """

    @abstractmethod
    def add(self, targets: "Tensor", block: "Tensor", total: "Tensor", cross: "Tensor", squares: "Tensor") -> None:
        """Add rows in place.

        Args:
            targets: of `n` rows, validated, on the device of `block`.
            block: `[n, d]`, float64 features.
            total: `[K]`, the sum of each column.
            cross: `[K, d]`, the sum of features times each column.
            squares: `[K]`, the sum of each column's squares; empty unless targets are real.
        """


class _Classes(TargetKind):
    """Class numbers `[n]`, or `[n, m]` with further columns that only the task reads."""

    name = "classes"
    exclusive = True

    def check(self, targets: "Tensor", rows: int, columns: int) -> None:
        import torch

        targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] > 1 else targets
        if targets.shape != (rows,) or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"Labels must be [{rows}] class numbers, not {list(targets.shape)} of {targets.dtype}.")
        if rows and not 0 <= int(targets.min()) <= int(targets.max()) < columns:
            raise ValueError(
                f"Labels must be from 0 to {columns - 1}, not from {int(targets.min())} to {int(targets.max())}."
            )

    def add(self, targets: "Tensor", block: "Tensor", total: "Tensor", cross: "Tensor", squares: "Tensor") -> None:
        import torch

        targets = (targets[:, 0] if targets.ndim == 2 else targets).to(torch.int64)
        total += torch.bincount(targets, minlength=len(total))
        if block.is_cuda:  # index_add_ on CUDA adds in no fixed order
            cross.addmm_(torch.nn.functional.one_hot(targets, len(total)).to(torch.float64).T, block)
        else:
            cross.index_add_(0, targets, block)


class _Labels(TargetKind):
    """Targets `[n, K]` of 0 and 1: any number of classes per row."""

    name = "labels"

    def check(self, targets: "Tensor", rows: int, columns: int) -> None:
        if targets.shape != (rows, columns):
            raise ValueError(f"Labels must be [{rows}, {columns}], not {list(targets.shape)}.")
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise ValueError("Multi-label targets must be 0 or 1.")

    def add(self, targets: "Tensor", block: "Tensor", total: "Tensor", cross: "Tensor", squares: "Tensor") -> None:
        import torch

        targets = targets.to(torch.float64)
        total += targets.sum(0).to(torch.int64)
        cross.addmm_(targets.T, block)


class _Values(TargetKind):
    """Real targets `[n, K]`."""

    name = "values"
    real = True

    def check(self, targets: "Tensor", rows: int, columns: int) -> None:
        if targets.shape != (rows, columns) or not targets.is_floating_point():
            raise ValueError(
                f"Targets must be [{rows}, {columns}] real numbers, not {list(targets.shape)} of {targets.dtype}."
            )
        if not bool(targets.isfinite().all()):
            row, column = (~targets.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"Target {column} of row {row} is not finite.")

    def add(self, targets: "Tensor", block: "Tensor", total: "Tensor", cross: "Tensor", squares: "Tensor") -> None:
        import torch

        targets = targets.to(torch.float64)
        total += targets.sum(0)
        squares += targets.square().sum(0)
        cross.addmm_(targets.T, block)


class _Places(_Values):
    """Real targets `[n, K]` of places, such as the shares of classes in a cell of an image."""

    name = "targets of places"
    of_places = True


CLASSES: TargetKind = _Classes()
LABELS: TargetKind = _Labels()
VALUES: TargetKind = _Values()
PLACES: TargetKind = _Places()
