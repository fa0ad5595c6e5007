"""A sum of statistics that terms can be subtracted from again, exact to the last bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedhead.backbones.digests import digest_tensors
from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.sums.features import FeatureStatistics

_FORMAT = "fedhead.pool 1"
_ROUNDED = ("sums", "total", "upper")


def _rounded(stats: FeatureStatistics) -> tuple[str, ...]:
    """Return the names of the real-valued tensors."""
    return (*_ROUNDED, "counts", "squares") if stats.kind.real else _ROUNDED


class ExactSum:
    """A sum of statistics that allows each term to be subtracted again without a trace.

    Rounding errors are summed beside it (Knuth's two-sum), so that equal terms cancel to the last bit. In float64
    alone a site with large values leaves its rounding errors behind, and heads are made of such errors if a feature is
    constant in all other rows.

    Attributes:
        value: the sum.
        low: the rounding errors of its tensors, by name.
    """

    def __init__(self, value: FeatureStatistics, low: Mapping[str, Tensor] | None = None) -> None:
        self.value = value
        self.low = dict(low or {name: torch.zeros_like(getattr(value, name)) for name in _rounded(value)})

    def add(self, stats: FeatureStatistics) -> None:
        """Add statistics.

        Raises:
            ValueError: if sizes, kind or origin differ.
        """
        self._fold(self.value + stats, stats, 1.0)

    def subtract(self, stats: FeatureStatistics) -> None:
        """Subtract statistics.

        Raises:
            ValueError: if sizes, kind or origin differ, or they have more rows of a class.
        """
        self._fold(self.value - stats, stats, -1.0)

    def extend(self, num_classes: int) -> None:
        """Append classes without rows, up to `num_classes`.

        Raises:
            UserError: if there are more.
        """
        padded(self.value, num_classes)
        missing = self.value.num_classes - len(self.low["sums"])
        self.low["sums"] = torch.cat([self.low["sums"], self.low["sums"].new_zeros(missing, self.value.num_features)])

    def _fold(self, result: FeatureStatistics, stats: FeatureStatistics, sign: float) -> None:
        """Take the counts of `result`, and make its sums exact to rounding."""
        for name in _rounded(stats):
            high, error = _two_sum(getattr(self.value, name), sign * getattr(stats, name))
            high, self.low[name] = _two_sum(high, self.low[name] + error)
            setattr(result, name, high)
        if not result.kind.real:
            nothing = result.counts == 0
            result.sums[nothing] = self.low["sums"][nothing] = 0
        result.upper.diagonal().clamp_(min=0)
        result.squares.clamp_(min=0)
        if result.rows == 0:
            for name in _rounded(stats):
                getattr(result, name).zero_()
                self.low[name].zero_()
        self.value = result

    def _to_tensors(self) -> dict[str, Tensor]:
        low = {f"low.{name}": tensor for name, tensor in self.low.items()}
        return {**self.value.to_tensors(), **low, "low.upper": self.low["upper"][_triangle(self.value.num_features)]}

    @property
    def digest(self) -> str:
        """SHA-256 of all tensors."""
        return digest_tensors(self._to_tensors())

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        write_atomically(path, to_bytes(self._to_tensors(), {"format": _FORMAT, "sha256": self.digest}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Undo `save`, bit for bit.

        Raises:
            UserError: if the file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"There are no pooled sums at {path}.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"The pooled sums at {path} cannot be read: {error}.") from error
        if metadata.get("format") != _FORMAT or metadata.get("sha256") != digest_tensors(tensors):
            raise UserError(f"The pooled sums at {path} are damaged, or none that this version reads.")
        names = [name for name in tensors if name.startswith("low.")]
        low = {name.removeprefix("low."): tensors.pop(name) for name in names}
        try:
            value = FeatureStatistics.from_tensors(tensors)
        except ValueError as error:
            raise UserError(f"The pooled sums at {path} are damaged: {error}") from error
        upper = torch.zeros_like(value.upper)
        upper[_triangle(value.num_features)] = low["upper"]
        return cls(value, {**low, "upper": upper})


def padded(stats: FeatureStatistics, num_classes: int) -> FeatureStatistics:
    """Append classes without rows in place, up to `num_classes`.

    No class is added to the targets of places, which may be more than the outputs of a head.
    """
    if stats.kind.of_places:
        return stats
    if stats.num_classes > num_classes:
        raise UserError(f"Sums of {stats.num_classes} classes are none of this run's, which has {num_classes}.")
    while stats.num_classes < num_classes:
        stats.add_class()
    return stats


def _two_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of two tensors and its exact rounding error (Knuth, TAOCP 2, 4.2.2)."""
    total = first + second
    back = total - first
    return total, (first - (total - back)) + (second - back)


def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu_()
