"""Calibration from sums over held-out rows: a temperature, and prediction sets with a stated coverage.

One half of the sites' held-out rows selects a temperature. The other half evaluates it and determines the size of
prediction sets. A site sends sums over its rows of a half; they add across sites, and no row leaves.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.evaluation import LARGEST_LOSS, EvaluationSums
from fedhead.sums.sums import Arrays, check_form
from fedhead.sums.targets import CLASSES, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TEMPERATURES: FloatArray = np.geomspace(0.01, 100, 41)
"""Candidate temperatures `[K]`; a parabola through the least loss and its neighbours interpolates the best one."""

REACH = 15.0
STEP = 0.05
BINS = int(2 * REACH / STEP)
"""Number of bins for the true class's log-odds, from -15 to 15; they widen a set by at most 5 % of the odds at its
edge."""

_CHUNK_VALUES = 2**21


@dataclass(frozen=True, eq=False)
class TemperatureSums:
    """Losses summed over rows at candidate temperatures, to select the best one (Guo et al., ICML 2017).

    Attributes:
        rows: the number of rows.
        losses: `[K]`, in nats, for logits divided by each of `TEMPERATURES`: cross entropy, or for multi-label rows
            binary cross entropy averaged over classes.
    """

    rows: int = 0
    losses: FloatArray = field(default_factory=lambda: np.zeros(len(TEMPERATURES)))

    @classmethod
    def from_logits(cls, logits: "Tensor", labels: "Tensor", *, kind: TargetKind = CLASSES) -> Self:
        """Sum over rows with `logits` `[n, C]` and `labels` `[n]`, or multi-label `[n, C]` of 0 and 1."""
        losses = np.zeros(len(TEMPERATURES))
        step = max(1, _CHUNK_VALUES // logits.shape[1])
        for start in range(0, len(logits), step):
            block, truth = logits[start : start + step].double(), labels[start : start + step]
            losses += [float(losses_of(block / temperature, truth, kind).sum()) for temperature in TEMPERATURES]
        return cls(len(logits), losses)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows, self.losses + other.losses)

    def best(self) -> float:
        """Return the temperature of least loss, with a standard normal prior on its logarithm.

        Without the prior, rows that are all predicted correctly would yield full confidence. 1 without rows.
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
        """Return the arrays for the wire."""
        return {"rows": np.array([self.rows], np.int64), "losses": self.losses}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self | None = None) -> Self:
        """Undo `to_arrays`, validating everything; `like` is ignored.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """
        check_form(arrays, cls().to_arrays())
        rows, losses = int(arrays["rows"][0]), arrays["losses"]
        if rows < 0 or (losses < 0).any() or (losses > LARGEST_LOSS * rows).any():
            raise ValueError("its losses are negative or too large, or not 0 although it has no rows")
        return cls(rows, losses)


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """Effect of a temperature on rows that were not used to select it.

    Attributes:
        before: evaluation of the original logits.
        after: evaluation of the logits divided by the temperature.
        scores: `[BINS]`, rows by their own class's log-odds after scaling; all 0 for multi-label rows.
    """

    before: EvaluationSums
    after: EvaluationSums
    scores: IntArray

    @classmethod
    def zeros(cls, num_classes: int, *, kind: TargetKind = CLASSES) -> Self:
        """Return the sums over no rows."""
        nothing = EvaluationSums.zeros(num_classes, kind=kind)
        return cls(nothing, nothing, np.zeros(BINS, np.int64))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.before.rows

    @classmethod
    def from_logits(cls, logits: "Tensor", labels: "Tensor", temperature: float, *, kind: TargetKind = CLASSES) -> Self:
        """Evaluate rows with `logits` `[n, C]` and `labels` `[n]`, or multi-label `[n, C]` of 0 and 1."""
        scores = np.zeros(BINS, np.int64)
        if kind.exclusive:
            scores = np.bincount(_bins(_own_log_odds(logits.double() / temperature, labels)), minlength=BINS)
        return cls(
            EvaluationSums.from_logits(logits, labels, kind=kind),
            EvaluationSums.from_logits(logits.double() / temperature, labels, kind=kind),
            scores,
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(self.before + other.before, self.after + other.after, self.scores + other.scores)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        parts = {"before": self.before, "after": self.after}
        nested = {f"{when}.{name}": array for when, sums in parts.items() for name, array in sums.to_arrays().items()}
        return {**nested, "scores": self.scores.astype(np.uint32)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: sums of the expected classes and kind.

        Raises:
            ValueError: if a name, type or shape differs, or counts contradict each other.
        """
        parts = []
        for when in ("before.", "after."):
            own = {name.removeprefix(when): array for name, array in arrays.items() if name.startswith(when)}
            parts.append(EvaluationSums.from_arrays(own, like.before))
        rest = {name: array for name, array in arrays.items() if "." not in name}
        check_form(rest, {"scores": np.zeros(BINS, np.uint32)})
        before, after = parts
        scores = rest["scores"].astype(np.int64)
        if before.rows != after.rows or scores.sum() != (before.rows if before.exclusive else 0):
            raise ValueError("it counts different numbers of rows before and after scaling")
        return cls(before, after, scores)


@dataclass(frozen=True)
class Calibration:
    """Calibration of a model's outputs.

    Attributes:
        temperature: the divisor of logits.
        scores: `BINS` counts of held-out rows by their own class's log-odds; empty if unknown.
        residuals: for each real target, counts of held-out rows by absolute residual, in the bins of
            `fedhead.sums.regression`; empty if unknown.
        spread: for each real target, the unit of these bins.
    """

    temperature: float = 1.0
    scores: tuple[int, ...] = ()
    residuals: tuple[tuple[int, ...], ...] = ()
    spread: tuple[float, ...] = ()

    def least_probability(self, coverage: float) -> float:
        """Return the lowest probability of classes in a set that contains the true class with `coverage`.

        Split-conformal prediction (Sadinle, Lei & Wasserman, JASA 2019): the guarantee holds for rows from the
        distribution of the held-out ones, on average over all of them and not for each class or site. 0, which
        includes every class, if too few rows were held out for a smaller set.

        Args:
            coverage: between 0 and 1.

        Raises:
            ValueError: if `coverage` is not between 0 and 1, or no rows were counted.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"A coverage must be between 0 and 1, not {coverage:g}.")
        rows = sum(self.scores)
        if rows == 0:
            raise ValueError("Sets of classes need held-out rows, but none were counted.")
        needed = math.ceil((rows + 1) * coverage)
        if needed > rows:
            return 0.0
        from_the_top = np.cumsum(self.scores[::-1])
        edge = BINS - 1 - int(np.searchsorted(from_the_top, needed))
        # The lowest bin includes all scores below it, so it has no lower edge.
        return 0.0 if edge == 0 else 1 / (1 + math.exp(REACH - edge * STEP))


def losses_of(logits: "Tensor", labels: "Tensor", kind: TargetKind) -> "Tensor":
    """Return each row's loss `[n]`, as in `TemperatureSums`, of logits `[n, C]`."""
    from torch.nn import functional

    if not kind.exclusive:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)
    return functional.cross_entropy(logits, labels, reduction="none")


def _own_log_odds(logits: "Tensor", labels: "Tensor") -> "Tensor":
    own = logits.gather(1, labels[:, None])
    rivals = logits.scatter(1, labels[:, None], -math.inf)
    return own[:, 0] - rivals.logsumexp(1)


def _bins(log_odds: "Tensor") -> IntArray:
    places: IntArray = ((log_odds + REACH) / STEP).floor().clamp(0, BINS - 1).long().numpy()
    return places
