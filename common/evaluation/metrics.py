"""Metrics with 95 % intervals, from counts that add across sites.

Intervals treat rows as independent draws. With grouped rows (several images of a patient) they are too narrow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.evaluation import EvaluationSums

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_Z = NormalDist().inv_cdf(0.975)
_PRIOR_ROWS = 3.0
_BISECTIONS = 32

_NO_ROWS = "There are no rows."
_CLASS_EMPTY = "No row has this class."
_CLASS_ALONE = "Every row has this class."
_SEVERAL_CLASSES = "Rows may have several classes."


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval, or the reason for its absence."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @classmethod
    def undefined(cls, reason: str) -> Self:
        """Return an estimate without a value, with the reason."""
        return cls(None, None, None, reason)

    def to_list(self) -> list[float | None]:
        """Return `[value, low, high]`."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class ClassReport:
    """Metrics of a head on one class.

    Attributes:
        name: the name of the class.
        rows: the number of rows of this class.
        sensitivity: the share of this class's rows predicted as it (also called recall).
        specificity: the share of the other rows not predicted as it.
        auroc: the probability that the head scores a row of this class above another row.
    """

    name: str
    rows: int
    sensitivity: Estimate
    specificity: Estimate
    auroc: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        figures = {"sensitivity": self.sensitivity, "specificity": self.specificity, "auroc": self.auroc}
        return {"name": self.name, "rows": self.rows, **as_json(figures)}


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of a head on the rows of one site, or of all sites pooled.

    Attributes:
        rows: the number of rows.
        loss: the mean loss in nats; None without rows.
        accuracy: the share of rows predicted correctly; for multi-label rows, with all labels correct.
        balanced_accuracy: the unweighted mean sensitivity of the classes with rows; undefined for multi-label rows.
        auroc: the mean of the classes' areas under the curve.
        classes: a report for each class.
    """

    rows: int
    loss: float | None
    accuracy: Estimate
    balanced_accuracy: Estimate
    auroc: Estimate
    classes: tuple[ClassReport, ...]

    @property
    def score(self) -> Estimate:
        """Accuracy."""
        return self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: estimates as `[value, low, high]`, with a reason for each null."""
        figures = {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy, "auroc": self.auroc}
        classes = [each.to_dict() for each in self.classes]
        return {"rows": self.rows, "loss": self.loss, **as_json(figures), "classes": classes}


def report(sums: EvaluationSums, classes: Sequence[str]) -> EvaluationReport:
    """Compute metrics with intervals.

    Args:
        sums: the sums of one site, or of several added.
        classes: the names of the `C` classes.
    """
    areas, mean_area = aurocs(sums)
    own = sums.binary[:, 1].sum(1).tolist()
    columns = zip(classes, own, sensitivities(sums), specificities(sums), areas, strict=True)
    return EvaluationReport(
        rows=sums.rows,
        loss=sums.loss_sum / sums.rows if sums.rows else None,
        accuracy=accuracy(sums),
        balanced_accuracy=balanced_accuracy(sums),
        auroc=mean_area,
        classes=tuple(ClassReport(*column) for column in columns),
    )


def accuracy(sums: EvaluationSums) -> Estimate:
    """Return the share of rows predicted correctly, with Wilson's interval."""
    return _shares(np.array([sums.correct]), np.array([sums.rows]), _NO_ROWS)[0]


def sensitivities(sums: EvaluationSums) -> tuple[Estimate, ...]:
    """Return, for each class, the share of its rows predicted as it, with Wilson's interval."""
    own = sums.binary[:, 1]
    return _shares(own[:, 1], own.sum(1), _CLASS_EMPTY)


def specificities(sums: EvaluationSums) -> tuple[Estimate, ...]:
    """Return, for each class, the share of the other rows not predicted as it, with Wilson's interval."""
    others = sums.binary[:, 0]
    return _shares(others[:, 0], others.sum(1), _CLASS_ALONE if sums.rows else _NO_ROWS)


def balanced_accuracy(sums: EvaluationSums) -> Estimate:
    """Return the mean sensitivity of the classes with rows, treated as independent binomial shares.

    The interval adds the squared distances from each share to its Wilson limits (Zou, Huang & Zhang, "A note on
    confidence interval estimation for a linear function of binomial proportions", Computational Statistics & Data
    Analysis 53, 2009). Unlike the delta method's, it has positive width for shares of 0 or 1.
    """
    if not sums.exclusive:
        return Estimate.undefined(_SEVERAL_CLASSES)
    counts = sums.confusion.sum(1)
    present = counts > 0
    if not present.any():
        return Estimate.undefined(_NO_ROWS)
    right, counts = sums.confusion.diagonal()[present], counts[present]
    low, high = wilson_interval(right, counts)
    shares = right / counts
    mean, number = float(shares.mean()), len(shares)
    below = math.sqrt(((shares - low) ** 2).sum()) / number
    above = math.sqrt(((high - shares) ** 2).sum()) / number
    return Estimate(mean, max(mean - below, 0.0), min(mean + above, 1.0))


def aurocs(sums: EvaluationSums) -> tuple[tuple[Estimate, ...], Estimate]:
    """Return each class's one-vs-rest area under the curve, and the mean over the classes that have one.

    Rows in one bin count as ties, a half each; `auroc_error_bound` bounds the resulting error. The limits are the
    areas that differ from the estimate by 1.96 of their own standard deviations, as in Wilson's interval and in
    method 5 of Newcombe (Statistics in Medicine 25, 2006), so that they stay within 0..1 and keep a positive width
    for an area of 1. `_AreaVariance` gives the variance.

    The limits of the mean use the mean distance of the classes' limits, reduced in proportion to the smaller standard
    deviation of the mean. Classes are treated as independent, but the contributions of a row to its own class and
    to the rest of the other classes as one. This is exact for two classes, whose areas are equal. In simulations of 2
    to 20 classes the limits covered the true mean in 93 to 99 % of cases. Multi-label classes may be dependent in any
    way, so their mean distances are not reduced.
    """
    counts = sums.scores.sum(2)
    defined = (counts > 0).all(1)
    classes: list[Estimate] = [
        Estimate.undefined(_CLASS_ALONE if own else _CLASS_EMPTY) for own in (counts[:, 1] > 0).tolist()
    ]
    if not defined.any():
        return tuple(classes), Estimate.undefined("All rows have one class." if counts.any() else _NO_ROWS)
    areas, variance = _areas(sums.scores[defined])
    low, high = _limits(areas, variance)
    for number, *figures in zip(
        np.flatnonzero(defined).tolist(), areas.tolist(), low.tolist(), high.tolist(), strict=True
    ):
        classes[number] = Estimate(*figures)
    members, rest = variance.parts(areas)
    deviations = np.sqrt(members + rest).sum()
    reduced = 1.0
    if deviations > 0 and sums.exclusive:
        reduced = min(1.0, float((math.sqrt(members.sum()) + math.sqrt(rest.sum())) / deviations))
    mean = float(areas.mean())
    below, above = float((areas - low).mean()), float((high - areas).mean())
    return tuple(classes), Estimate(mean, mean - reduced * below, mean + reduced * above)


def auroc_error_bound(sums: EvaluationSums) -> FloatArray:
    """Return `[C]`, a bound on the difference between each class's binned and exact area: half the share of ties.

    With bins that are narrow relative to the spread of scores, the actual difference is far smaller: about 0.001
    where the bound is 0.01. The bound is 0 for a class without rows and for the only class.
    """
    rest, own = sums.scores[:, 0].astype(np.float64), sums.scores[:, 1].astype(np.float64)
    pairs = rest.sum(1) * own.sum(1)
    bound: FloatArray = 0.5 * (rest * own).sum(1) / np.maximum(pairs, 1)
    return bound


@dataclass(frozen=True)
class Reliability:
    """Agreement between predicted probabilities and outcomes.

    Attributes:
        rows: `K`, the number of predictions in each of `CONFIDENCE_BINS` equal bins of probability from 0 to 1.
        confidence: `K`, the mean probability in each bin; None for an empty bin.
        frequency: `K`, the share of correct predictions in each bin, with Wilson's interval.
        error: the expected calibration error: the mean distance, over all predictions, between confidence and
            frequency in their bin (Naeini, Cooper & Hauskrecht, AAAI 2015; Guo et al., ICML 2017). None without rows.
            Biased upwards for few rows.
    """

    rows: tuple[int, ...]
    confidence: tuple[float | None, ...]
    frequency: tuple[Estimate, ...]
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the reliability as JSON types."""
        frequency = [estimate.to_list() for estimate in self.frequency]
        return {"error": self.error, "rows": self.rows, "confidence": self.confidence, "frequency": frequency}


def reliability(sums: EvaluationSums) -> Reliability:
    """Compare predicted probabilities with outcomes."""
    counts, right = sums.reliability.sum(0), sums.reliability[1]
    total = int(counts.sum())
    pairs = zip(sums.confidence.tolist(), counts.tolist(), strict=True)
    return Reliability(
        rows=tuple(counts.tolist()),
        confidence=tuple(given / count if count else None for given, count in pairs),
        frequency=_shares(right, counts, _NO_ROWS),
        error=float(np.abs(sums.confidence - right).sum() / total) if total else None,
    )


def roc_points(sums: EvaluationSums) -> tuple[FloatArray | None, ...]:
    """Return the corners `[P, 2]` of each class's ROC curve: false and true positive rates, from 0 to 1.

    Collinear points are omitted. None for a class without rows and for the only class.
    """
    # Cumulative counts from the highest score down: positives as the threshold falls.
    counts = np.cumsum(sums.scores[:, :, ::-1], axis=2)
    return tuple(_corners(rest, own) if rest[-1] and own[-1] else None for rest, own in counts)


def _corners(rest: IntArray, own: IntArray) -> FloatArray:
    path = np.unique(np.vstack([[0, 0], np.stack([rest, own], 1)]), axis=0)
    steps = np.diff(path, axis=0)
    turns = steps[:-1, 0] * steps[1:, 1] != steps[:-1, 1] * steps[1:, 0]
    kept = path[np.concatenate([[True], turns, [True]])]
    corners: FloatArray = kept / np.array([rest[-1], own[-1]])
    return corners


def wilson_interval(successes: IntArray, trials: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the lower and upper 95 % limits of binomial shares (Wilson, JASA 22, 1927).

    Args:
        successes: `[...]`, at most `trials`.
        trials: `[...]`, 1 or more.
    """
    shares, excess = successes / trials, _Z**2 / trials
    centre = (shares + excess / 2) / (1 + excess)
    reach = np.sqrt(excess * (shares * (1 - shares) + excess / 4)) / (1 + excess)
    low = np.where(successes == 0, 0.0, centre - reach)
    high = np.where(successes == trials, 1.0, centre + reach)
    return low, high


@dataclass(frozen=True, eq=False)
class _AreaVariance:
    """Variance of areas under the curve, as a function of the true areas `t` `[K]`.

    With `P` rows of the class and `N` others it is `t (1 - t) (1 + (N - 1) r + (P - 1) q) / (P N)`, where `r` is the
    correlation between comparisons of one row of the class, and `q` that of one other row. Hanley & McNeil (Radiology
    143, 1982) derive `r = t / (1 + t)` and `q = (1 - t) / (2 - t)` for exponential scores; assigning the larger one to
    the side with fewer rows is conservative. DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988) estimate both from
    the rows, which is valid for any scores but needs many rows, including many misordered ones. The two are therefore
    averaged, with weight `2 min(area, 1 - area)` per row for the estimate and 3 rows for the model.

    In simulations (normal scores with spread ratios 1/2, 1 and 2, exponential ones; areas of 0.5 to 0.99) the limits
    covered the true area in 93 % of cases or more with at least 20 rows on both sides, and in 87 % in the worst case:
    3 rows with scores spread twice as wide as the others'.

    Attributes:
        own: `[K]`, `P`.
        rest: `[K]`, `N`.
        own_alike: `[K]`, the estimate of `r`.
        rest_alike: `[K]`, the estimate of `q`.
        weight: `[K]`, the weight of a row in the estimates.
    """

    own: FloatArray
    rest: FloatArray
    own_alike: FloatArray
    rest_alike: FloatArray
    weight: FloatArray

    def parts(self, areas: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the variance `[..., K]` in two parts: due to sampling rows of the class, and the other rows."""
        one, other = areas / (1 + areas), (1 - areas) / (2 - areas)
        more, less = np.maximum(one, other), np.minimum(one, other)
        own_fewer = self.own <= self.rest
        r = _average(self.own_alike, self.weight * (self.own - 1), np.where(own_fewer, more, less))
        q = _average(self.rest_alike, self.weight * (self.rest - 1), np.where(own_fewer, less, more))
        shared = (1 - r - q) / (2 * self.own * self.rest)
        bernoulli = areas * (1 - areas)
        return bernoulli * (r / self.own + shared), bernoulli * (q / self.rest + shared)


def _areas(scores: IntArray) -> tuple[FloatArray, _AreaVariance]:
    """Return the areas `[K]` and their variance from counts `[K, 2, B]` with rows on both sides."""
    rest, own = scores[:, 0].astype(np.float64), scores[:, 1].astype(np.float64)
    num_rest, num_own = rest.sum(1), own.sum(1)
    # A row's placement is the share of the opposite rows that it is ordered correctly against.
    own_placements = (rest.cumsum(1) - rest / 2) / num_rest[:, None]
    rest_placements = 1 - (own.cumsum(1) - own / 2) / num_own[:, None]
    areas = (own * own_placements).sum(1) / num_own
    return areas, _AreaVariance(
        own=num_own,
        rest=num_rest,
        own_alike=_alikeness(own_placements, own, areas, num_rest),
        rest_alike=_alikeness(rest_placements, rest, areas, num_own),
        weight=2 * np.minimum(areas, 1 - areas),
    )


def _alikeness(placements: FloatArray, counts: FloatArray, areas: FloatArray, opposite: FloatArray) -> FloatArray:
    """Return `[K]`, in 0..1, the correlation between one row's comparisons with the `opposite` rows."""
    squares = (counts * (placements - areas[:, None]) ** 2).sum(1)
    variance = squares / np.maximum(counts.sum(1) - 1, 1)
    bernoulli = areas * (1 - areas)
    share = np.divide(variance, bernoulli, out=np.zeros_like(areas), where=bernoulli > 0)
    # The mean of n independent comparisons varies too, by 1/n of their variance.
    chance = 1 / np.maximum(opposite, 2)
    alike: FloatArray = np.clip((share - chance) / (1 - chance), 0, 1)
    return alike


def _average(measured: FloatArray, weight: FloatArray, modelled: FloatArray) -> FloatArray:
    return (weight * measured + _PRIOR_ROWS * modelled) / (weight + _PRIOR_ROWS)


def _limits(areas: FloatArray, variance: _AreaVariance) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest true areas `[K]` consistent with the estimates, by bisection."""
    inside = np.stack([areas, areas])
    outside = np.stack([np.zeros_like(areas), np.ones_like(areas)])
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        members, rest = variance.parts(middle)
        agrees = (middle - areas) ** 2 <= _Z**2 * (members + rest)
        inside, outside = np.where(agrees, middle, inside), np.where(agrees, outside, middle)
    return inside[0], inside[1]


def _shares(successes: IntArray, trials: IntArray, reason: str) -> tuple[Estimate, ...]:
    low, high = wilson_interval(successes, np.maximum(trials, 1))
    return tuple(
        Estimate(right / count, *limits) if count else Estimate.undefined(reason)
        for right, count, *limits in zip(successes.tolist(), trials.tolist(), low.tolist(), high.tolist(), strict=True)
    )


def as_json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return metrics by name as `[value, low, high]`, with the reasons for missing values under `undefined`."""
    undefined = {name: figure.reason for name, figure in figures.items() if figure.value is None}
    listed = {name: figure.to_list() for name, figure in figures.items()}
    return {**listed, "undefined": undefined} if undefined else listed
