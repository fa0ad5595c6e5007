"""Bins in which sites count a head's scores."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.targets import CLASSES, TargetKind

if TYPE_CHECKING:
    pass

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


SCORE_BINS = 255
"""Number of bins `B` for a class's scores; odd, so that equal scores at the centre share one."""

_HALF = SCORE_BINS // 2

# In units of the spread: bins have equal width below _SOFT from the centre; scores beyond _REACH share the last bin.
_SOFT = 0.3

_REACH = 1e4

_STEP = math.asinh(_REACH / _SOFT) / _HALF

_DEFAULT_SPREAD = 0.1

_LEAST_SPREAD = 1e-9


@dataclass(frozen=True, eq=False)
class ScoreBins:
    """Bins in which a class's scores are counted; they must be equal at all sites for counts to add.

    A row's score for class `c` is its log-odds against the rest, `log(p_c / (1 - p_c)) + log(C - 1)` with `p` the
    softmax of its logits: 0 for a head without information. The score of a multi-label row is its logit. Bins have
    equal width in `asinh((score - centre) / (0.3 spread))`: 0.026 spreads at the centre, 9 % of the distance from the
    centre further out. They reach 10,000 spreads.

    Attributes:
        centre: `[C]`, the position of the narrowest bins.
        spread: `[C]`, above 0, about the standard deviation of the scores.
    """

    centre: FloatArray
    spread: FloatArray

    def __post_init__(self) -> None:
        if self.centre.ndim != 1 or self.centre.shape != self.spread.shape or len(self.centre) < 1:
            raise ValueError(
                f"Bins need a centre and a spread for each column, not {list(self.centre.shape)} and "
                f"{list(self.spread.shape)}."
            )
        if not (np.isfinite(self.centre).all() and np.isfinite(self.spread).all() and (self.spread > 0).all()):
            raise ValueError("The centres and spreads of bins must be finite, with positive spreads.")

    @classmethod
    def default(cls, num_classes: int) -> Self:
        """Return bins for heads whose logits are log-odds, as from cross entropy and discriminant analysis.

        They are too coarse for logits with little variance, such as a ridge head's for a rare class: see
        `from_moments`.
        """
        return cls(np.zeros(num_classes), np.full(num_classes, _DEFAULT_SPREAD))

    @classmethod
    def from_moments(cls, mean: FloatArray, covariance: FloatArray, *, kind: TargetKind = CLASSES) -> Self:
        """Return bins that fit logits of any scale, from the logits' moments under a linear head.

        A head with weight `W` and bias `b` on features of mean `m` and covariance `S` has logits of mean `W m + b` and
        covariance `W S W^T`. The spread of the scores follows from linearisation at the mean.

        Args:
            mean: `[C]`.
            covariance: `[C, C]`.
            kind: of the targets; for multi-label rows the scores are the logits themselves.
        """
        if not kind.exclusive:
            return cls(mean, _usable(np.sqrt(np.maximum(covariance.diagonal(), 0))))
        centre = softmax_log_odds(mean[None])[1][0]
        # log(sum of exp over the other classes) is logit minus log-odds; its gradient is a softmax over them.
        exponents = mean - (mean - centre)[:, None]
        np.fill_diagonal(exponents, 0)
        slopes = -np.exp(exponents)
        np.fill_diagonal(slopes, 1)
        spread = np.sqrt(np.maximum(np.einsum("cd,de,ce->c", slopes, covariance, slopes), 0))
        return cls(centre + math.log(len(mean) - 1), _usable(spread))

    def index(self, log_odds: FloatArray, *, kind: TargetKind = CLASSES) -> IntArray:
        """Return the bins `[n, C]`, from 0 to `SCORE_BINS - 1`, of log-odds `[n, C]`, or of multi-label logits."""
        rivals = len(self.centre) - 1 if kind.exclusive else 1
        scores = (log_odds + (math.log(rivals) - self.centre)) / (self.spread * _SOFT)
        return np.clip(np.rint(np.arcsinh(scores) / _STEP), -_HALF, _HALF).astype(np.int64) + _HALF

    def lower_edge(self, column: int, place: int) -> float:
        """Return the lowest score in a bin of a class; minus infinity for the first bin."""
        if place == 0:
            return -math.inf
        spread = float(self.spread[column]) * _SOFT
        return float(self.centre[column]) + spread * math.sinh((place - _HALF - 0.5) * _STEP)


def _usable(spread: FloatArray) -> FloatArray:
    return np.where(spread > _LEAST_SPREAD, spread, _DEFAULT_SPREAD)


def softmax_log_odds(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return `log p` and `log(p / (1 - p))`, both `[n, C]`, of the softmax `p`; accurate even if `p` rounds to 1.

    Raises:
        ValueError: if a logit is not finite.
    """
    require_finite(logits)
    rows, top = np.arange(len(logits)), logits.argmax(1)
    shifted = logits - logits[rows, top][:, None]
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    probabilities = np.exp(log_probabilities)
    # Only the largest p can be near 1, where 1 - p cancels: sum the other probabilities instead.
    probabilities[rows, top] = 0
    log_odds = log_probabilities - np.log1p(-probabilities)
    shifted[rows, top] = -np.inf
    second = shifted.max(1)
    log_odds[rows, top] = -second - np.log(np.exp(shifted - second[:, None]).sum(1))
    return log_probabilities, log_odds


def require_finite(logits: FloatArray) -> None:
    """Check that logits are numbers.

    Raises:
        ValueError: if one is not.
    """
    if not np.isfinite(logits).all():
        raise ValueError("The head produces logits that are not finite.")
