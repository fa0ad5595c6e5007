"""Probabilities that come true, and sets that hold the true class as often as stated, from sums over held-out rows.

One half of the sites' held-out rows chooses a temperature, the other half says what that brought and how large sets of
classes must be. A site sends sums over its rows of a half; they add across sites, and no row leaves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.metrics import EvaluationSums

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]

TEMPERATURES: FloatArray = np.geomspace(0.01, 100, 41)
"""`[K]`, those that sites try; the best lies between them, by a parabola through the least loss and its neighbours."""

REACH = 15.0
STEP = 0.05
BINS = int(2 * REACH / STEP)
"""Bins of the true class's log-odds, from -15 to 15: a set is too large by at most 5 % of the odds at its edge."""

_CHUNK_VALUES = 2**21


@dataclass(frozen=True, eq=False)
class TemperatureSums:
    """What tells the best temperature of a head (Guo et al., ICML 2017): the loss under each, summed over rows.

    Attributes:
        rows: how many.
        losses: `[K]`, in nats, of logits divided by each of `TEMPERATURES`: cross entropy, or of multi-label rows the
            binary one, the mean over classes.
    """

    rows: int = 0
    losses: FloatArray = field(default_factory=lambda: np.zeros(len(TEMPERATURES)))

    @classmethod
    def from_logits(cls, logits: "Tensor", labels: "Tensor") -> Self:
        """Return the sums over rows with `logits` `[n, C]` and `labels` `[n]`, or multi-label `[n, C]` of 0 and 1."""
        losses = np.zeros(len(TEMPERATURES))
        step = max(1, _CHUNK_VALUES // logits.shape[1])
        for start in range(0, len(logits), step):
            block, truth = logits[start : start + step].double(), labels[start : start + step]
            losses += [float(_losses(block / temperature, truth).sum()) for temperature in TEMPERATURES]
        return cls(len(logits), losses)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows, self.losses + other.losses)

    def best(self) -> float:
        """Return the temperature of least loss, were its logarithm drawn from a standard normal distribution.

        Rows that are all predicted rightly would otherwise be sure of everything. 1 without rows.
        """
        logarithms = np.log(TEMPERATURES)
        losses = self.losses + logarithms**2 / 2
        least = int(losses.argmin())
        if least in (0, len(TEMPERATURES) - 1):
            return float(TEMPERATURES[least])
        before, at, after = losses[least - 1 : least + 2]
        bend = before - 2 * at + after
        shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
        return math.exp(logarithms[least] + shift * (logarithms[1] - logarithms[0]))

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what travels."""
        return {"rows": np.array([self.rows], np.int64), "losses": self.losses}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Read what `to_arrays` returned.

        Raises:
            ValueError: if it is anything else, or nothing that a site can have summed.
        """
        _check(arrays, {"rows": (np.int64, (1,)), "losses": (np.float64, (len(TEMPERATURES),))})
        rows, losses = int(arrays["rows"][0]), arrays["losses"]
        if rows < 0 or (losses < 0).any() or (rows == 0 and losses.any()):
            raise ValueError("its losses are negative, or of no rows")
        return cls(rows, losses)


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """What a temperature brings, on rows that did not choose it.

    Attributes:
        before: evaluation of the logits as they are.
        after: evaluation of the logits divided by the temperature.
        scores: `[BINS]`, rows by the log-odds that they then give to their own class; all 0 of multi-label rows.
    """

    before: EvaluationSums
    after: EvaluationSums
    scores: IntArray

    @property
    def rows(self) -> int:
        """How many."""
        return self.before.rows

    @classmethod
    def from_logits(cls, logits: "Tensor", labels: "Tensor", temperature: float) -> Self:
        """Return the sums over rows with `logits` `[n, C]` and `labels` `[n]`, or multi-label `[n, C]` of 0 and 1."""
        scores = np.zeros(BINS, np.int64)
        if labels.ndim == 1:
            scores = np.bincount(_bins(_own_log_odds(logits.double() / temperature, labels)), minlength=BINS)
        return cls(
            EvaluationSums.from_logits(logits, labels),
            EvaluationSums.from_logits(logits.double() / temperature, labels),
            scores,
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(self.before + other.before, self.after + other.after, self.scores + other.scores)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what travels."""
        parts = {"before": self.before, "after": self.after}
        nested = {f"{when}.{name}": array for when, sums in parts.items() for name, array in sums.to_arrays().items()}
        return {**nested, "scores": self.scores.astype(np.uint32)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, num_classes: int, *, multi_label: bool = False) -> Self:
        """Read what `to_arrays` returned.

        Raises:
            ValueError: if it is anything else, or counts contradict each other.
        """
        parts = []
        for when in ("before.", "after."):
            own = {name.removeprefix(when): array for name, array in arrays.items() if name.startswith(when)}
            parts.append(EvaluationSums.from_arrays(own, num_classes, multi_label=multi_label))
        rest = {name: array for name, array in arrays.items() if "." not in name}
        _check(rest, {"scores": (np.uint32, (BINS,))})
        before, after = parts
        scores = rest["scores"].astype(np.int64)
        if before.rows != after.rows or scores.sum() != (0 if multi_label else before.rows):
            raise ValueError("it counts other rows before than after")
        return cls(before, after, scores)


@dataclass(frozen=True)
class Calibration:
    """What a model does to logits so that its probabilities come true.

    Attributes:
        temperature: divides logits.
        scores: `BINS` counts: how many held-out rows gave their own class a log-odds in each bin; empty if unknown.
    """

    temperature: float = 1.0
    scores: tuple[int, ...] = ()

    def least_probability(self, coverage: float) -> float:
        """Return the probability from which classes belong to a set that holds the true class with `coverage`.

        Split-conformal prediction (Sadinle, Lei & Wasserman, JASA 2019): the guarantee is for rows drawn like the
        held-out ones, on average over all of them and not for each class or site. 0, and so every class, where too few
        rows were held out to promise anything smaller.

        Args:
            coverage: between 0 and 1.

        Raises:
            ValueError: if `coverage` is not between 0 and 1, or no rows were counted.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"A coverage lies between 0 and 1, unlike {coverage:g}.")
        rows = sum(self.scores)
        if rows == 0:
            raise ValueError("No held-out rows were counted from which sets of classes could be made.")
        needed = math.ceil((rows + 1) * coverage)
        if needed > rows:
            return 0.0
        from_the_top = np.cumsum(self.scores[::-1])
        edge = BINS - 1 - int(np.searchsorted(from_the_top, needed))
        # The lowest bin takes all scores below it, so it has no lower edge.
        return 0.0 if edge == 0 else 1 / (1 + math.exp(REACH - edge * STEP))


def _losses(logits: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn import functional

    if labels.ndim == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)
    return functional.cross_entropy(logits, labels, reduction="none")


def _own_log_odds(logits: "Tensor", labels: "Tensor") -> "Tensor":
    own = logits.gather(1, labels[:, None])
    rivals = logits.scatter(1, labels[:, None], -math.inf)
    return own[:, 0] - rivals.logsumexp(1)


def _bins(log_odds: "Tensor") -> IntArray:
    places: IntArray = ((log_odds + REACH) / STEP).floor().clamp(0, BINS - 1).long().numpy()
    return places


def _check(arrays: Arrays, expected: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
    if arrays.keys() != expected.keys():
        raise ValueError(f"it holds the arrays {sorted(arrays)} instead of {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name!r} is not finite {np.dtype(dtype)}{list(shape)}")
