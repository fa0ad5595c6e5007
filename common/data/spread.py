"""The spread of numbers: least, median and greatest."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedhead.data.items import FloatArray


@dataclass(frozen=True)
class Spread:
    """The minimum, median and maximum of integers."""

    least: int
    median: int
    greatest: int

    @classmethod
    def of(cls, values: Iterable[int]) -> "Spread":
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])

    def __str__(self) -> str:
        if self.least == self.greatest:
            return str(self.least)
        return f"{self.least} to {self.greatest} (half up to {self.median})"


@dataclass(frozen=True)
class RealSpread:
    """The minimum, median, maximum and mean of real numbers."""

    least: float
    median: float
    greatest: float
    mean: float

    @classmethod
    def of(cls, values: FloatArray) -> "RealSpread":
        return cls(float(values.min()), float(np.median(values)), float(values.max()), float(values.mean()))

    def __str__(self) -> str:
        if self.least == self.greatest:
            return f"{self.least:.3g}"
        return f"{self.least:.3g} to {self.greatest:.3g} (mean {self.mean:.3g}, half up to {self.median:.3g})"
