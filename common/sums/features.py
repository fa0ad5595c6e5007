"""Feature statistics: sums that are sufficient for closed-form heads on frozen features.

The sums of targets, of targets times features, and the Gram matrix of a site's features can be added (a site joins),
subtracted (a site leaves) and extended (a new class). The heads of `fedhead.solvers` and the scores of
`fedhead.solvers.scoring` computed from them equal those on all rows pooled.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhead.errors import UserError
from fedhead.sums.packing import check_consistency, check_shares, pack, read_file, unpack, write_file
from fedhead.sums.targets import CLASSES, TargetKind
from fedhead.sums.totals import FeatureTotals

_BLOCK_VALUES = 2**23
_BLOCK_ROWS = 8192
_PANEL = 256


@dataclass(eq=False, slots=True)
class FeatureStatistics(FeatureTotals):
    """Sums over `rows` rows of `d` features `x` and `C` targets: one class, any number of classes, or real numbers.

    All sums are float64 and of `x - origin`: with feature means of 100 and deviations of 0.01, sums of `x`
    itself lose eight digits. Statistics about the same origin can be added and subtracted.

    Its attributes are those of `FeatureTotals`.
    """

    @classmethod
    def empty(
        cls,
        num_features: int,
        num_classes: int,
        origin: Tensor | None = None,
        *,
        kind: TargetKind = CLASSES,
        device: torch.device | str = "cpu",
        shares: int = 0,
    ) -> Self:
        """Return the statistics of no rows.

        Args:
            num_features: `d`, at least 1.
            num_classes: `C`, at least 1.
            origin: `[d]`; zeros by default. Ideally near the features' mean.
            kind: the kind of the targets.
            device: the device for accumulation; it must support float64.
            shares: how many of the first real targets are shares, from 0 to 1.

        Raises:
            ValueError: if a size or the origin does not fit.
        """
        if num_features < 1 or num_classes < 1:
            raise ValueError(f"Cannot count {num_features} features of {num_classes} classes.")
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(
            origin=zeros if origin is None else _checked_origin(origin, num_features).to(device),
            rows=0,
            counts=torch.zeros(num_classes, dtype=_total_dtype(kind), device=device),
            sums=torch.zeros(num_classes, num_features, dtype=torch.float64, device=device),
            total=torch.zeros_like(zeros),
            upper=torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
            kind=kind,
            squares=torch.zeros(num_classes if kind.real else 0, dtype=torch.float64, device=device),
            shares=shares,
        )

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        targets: Tensor,
        num_classes: int,
        origin: Tensor | None = None,
        *,
        kind: TargetKind = CLASSES,
    ) -> Self:
        """Return the statistics of rows, accumulated on their device if it supports float64.

        Args:
            features: `[n, d]`.
            targets: `[n]` class numbers, or `[n, C]` depending on `kind`.
            num_classes: `C`.
            origin: `[d]`; zeros by default.
            kind: the kind of the targets.

        Raises:
            ValueError: as `update` does.
        """
        if features.ndim != 2:
            raise ValueError(f"Features must be [n, d], not {list(features.shape)}.")
        device = torch.device("cpu") if features.device.type == "mps" else features.device
        stats = cls.empty(features.shape[1], num_classes, origin, kind=kind, device=device)
        stats.update(features, targets)
        return stats

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add rows in place, block by block.

        One block of rows is copied to float64 at a time, at most 64 MiB.

        Args:
            features: `[n, d]`, of any number type and on any device.
            targets: `[n]` class numbers, or `[n, C]` depending on the statistics' kind.

        Raises:
            ValueError: if a shape or a target does not fit, with nothing added; or if a feature is not finite, with
                the preceding blocks added.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"Features must be [n, {self.num_features}], not {list(features.shape)}.")
        self.kind.check(targets, len(features), self.num_classes)
        size = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // self.num_features))
        buffer = self.sums.new_empty(min(size, len(features)), self.num_features)
        for start in range(0, len(features), size):
            part = features[start : start + size].to(self.sums.device)
            block = torch.sub(part, self.origin, out=buffer[: len(part)])
            self._add_block(block, targets[start : start + size].to(self.sums.device), start)

    def _add_block(self, block: Tensor, targets: Tensor, start: int) -> None:
        total = block.sum(0)
        if not bool(total.isfinite().all()):
            row = int((~block.isfinite().all(1)).nonzero()[0]) + start
            raise ValueError(f"Row {row} has a feature that is not finite.")
        self.total += total
        self.rows += len(block)
        self.kind.add(targets, block, self.counts, self.sums, self.squares)
        for left in range(0, self.num_features, _PANEL):
            panel = slice(left, left + _PANEL)
            self.upper[panel, left:].addmm_(block[:, panel].T, block[:, left:])

    def __repr__(self) -> str:
        columns = f"{self.num_classes} {self.kind.name}"
        return f"FeatureStatistics({self.rows} rows, {self.num_features} features, {columns})"

    def copy(self) -> Self:
        """Return an independent copy."""
        return type(self)(
            self.origin.clone(),
            self.rows,
            self.counts.clone(),
            self.sums.clone(),
            self.total.clone(),
            self.upper.clone(),
            self.kind,
            self.squares.clone(),
            self.items,
            self.shares,
        )

    def __iadd__(self, other: Self) -> Self:
        self._check_same_kind(other)
        self.rows += other.rows
        self.items += other.items
        self.counts += other.counts
        self.sums += other.sums
        self.total += other.total
        self.upper += other.upper
        self.squares += other.squares
        return self

    def __add__(self, other: Self) -> Self:
        """Return the statistics of both sets of rows.

        Raises:
            ValueError: if sizes, kind or origin differ; see `about`.
        """
        result = self.copy()
        result += other
        return result

    def __radd__(self, other: int) -> Self:
        """Return a copy of `0 + self`, so that `sum` works."""
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented

    def __isub__(self, other: Self) -> Self:
        self._check_same_kind(other)
        if (
            other.rows > self.rows
            or other.items > self.items
            or (not self.kind.real and bool((other.counts > self.counts).any()))
        ):
            raise ValueError("Cannot subtract statistics of rows that were never added.")
        self.rows -= other.rows
        self.items -= other.items
        self.counts -= other.counts
        self.sums -= other.sums
        self.total -= other.total
        self.upper -= other.upper
        self.squares -= other.squares
        # The rest can only be rounding error.
        if not self.kind.real:
            self.sums[self.counts == 0] = 0
        self.upper.diagonal().clamp_(min=0)
        self.squares.clamp_(min=0)
        if self.rows == 0:
            for part in (self.counts, self.sums, self.total, self.upper, self.squares):
                part.zero_()
        return self

    def __sub__(self, other: Self) -> Self:
        """Return the statistics without the rows of `other`, as if these had never been added.

        Raises:
            ValueError: if sizes, kind or origin differ, or `other` has more rows of a class.
        """
        result = self.copy()
        result -= other
        return result

    def _check_same_kind(self, other: Self) -> None:
        if self.sums.shape != other.sums.shape or self.kind is not other.kind:
            raise ValueError(f"Cannot combine {self!r} and {other!r}.")
        if not torch.equal(self.origin, other.origin):
            raise ValueError("Cannot combine statistics about different origins; use about() on one of them.")

    def add_class(self) -> Self:
        """Append a class without rows, in place, and return these statistics.

        Raises:
            ValueError: for real targets.
        """
        if self.kind.real:
            raise ValueError("Real targets have no classes to add.")
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(1, self.num_features)])
        return self

    def about(self, origin: Tensor) -> Self:
        """Return the statistics of the same rows about another origin `[d]`.

        Raises:
            ValueError: if the origin does not fit.
        """
        result = self.copy()
        result.origin = _checked_origin(origin, self.num_features).to(self.origin.device)
        shift = result.origin - self.origin
        half = self.total - self.rows / 2 * shift
        result.upper -= torch.outer(shift, half)
        result.upper -= torch.outer(half, shift)
        result.upper.diagonal().clamp_(min=0)
        result.sums -= self.target_totals[:, None] * shift
        result.total -= self.rows * shift
        return result

    def is_close(self, other: Self, tolerance: float = 1e-9) -> bool:
        """Return whether both describe the same rows, up to rounding.

        Args:
            other: the statistics to compare with.
            tolerance: the allowed difference of the Gram matrix, relative to the features' root sums of squares `r`
                (entry `i, j` by `tolerance * r_i * r_j`), and likewise of the sums.
        """
        if self.sums.shape != other.sums.shape or self.kind is not other.kind:
            return False
        if self.rows != other.rows or self.items != other.items or not self._targets_are_close(other, tolerance):
            return False
        if not torch.equal(self.origin, other.origin):
            return False
        root = torch.maximum(self.upper.diagonal(), other.upper.diagonal()).sqrt()
        sums = tolerance * self.rows**0.5 * root
        sizes = torch.maximum(self.target_squares, other.target_squares).sqrt()[:, None] * root * tolerance
        return (
            bool(((self.upper - other.upper).triu().abs() <= tolerance * torch.outer(root, root)).all())
            and bool(((self.sums - other.sums).abs() <= (sizes if self.kind.real else sums)).all())
            and bool(((self.total - other.total).abs() <= sums).all())
        )

    def _targets_are_close(self, other: Self, tolerance: float) -> bool:
        if not self.kind.real:
            return torch.equal(self.counts, other.counts)
        root = torch.maximum(self.squares, other.squares).sqrt()
        totals = (self.counts - other.counts).abs() <= tolerance * self.rows**0.5 * root
        return bool((totals & ((self.squares - other.squares).abs() <= tolerance * root.square())).all())

    def to_tensors(self) -> dict[str, Tensor]:
        """Return tensors by name, on the CPU, for the wire; the Gram matrix is packed as `[d (d + 1) / 2]`.

        The packed Gram matrix is its upper triangle row by row.
        """
        return pack(self)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Undo `to_tensors`, validating everything.

        Raises:
            ValueError: if a name, number type or shape differs, a value is not finite, or no rows can have these
                sums (a negative count, a class without rows but with a sum, a sum larger than the sum of squares
                allows).
        """
        stats = cls(**unpack(tensors))
        check_consistency(stats)
        return stats

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return `to_tensors` as arrays."""
        return {name: tensor.numpy() for name, tensor in self.to_tensors().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: statistics of the expected size, kind and origin.

        Raises:
            ValueError: as `from_tensors` does, or if size, kind or origin differ.
        """
        try:
            tensors = {name: torch.from_numpy(numpy.array(array)) for name, array in arrays.items()}
        except TypeError as error:
            raise ValueError(f"Statistics have an unsupported number type: {error}.") from None
        stats = cls.from_tensors(tensors)
        if stats.kind is not like.kind or stats.num_classes != like.num_classes:
            raise ValueError("its statistics have different classes")
        like._check_same_kind(stats)
        check_shares(stats, like.shares)
        stats.shares = like.shares
        return stats

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically.

        Raises:
            UserError: if it cannot be written.
            FedheadError: if the disk is full.
        """
        write_file(path, self.to_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`; the statistics are equal bit for bit.

        Raises:
            UserError: if the file is missing, damaged or of another format.
        """
        tensors = read_file(path)
        try:
            return cls.from_tensors(tensors)
        except ValueError as error:
            raise UserError(f"The feature statistics at {path} are damaged: {error}") from error


def _checked_origin(origin: Tensor, num_features: int) -> Tensor:
    if origin.shape != (num_features,) or not bool(origin.isfinite().all()):
        raise ValueError(f"The origin must be {num_features} finite numbers.")
    return origin.detach().to(torch.float64).clone()


def _total_dtype(kind: TargetKind) -> torch.dtype:
    return torch.float64 if kind.real else torch.int64
