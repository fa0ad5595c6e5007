"""What evaluation reports, from counts that add across sites: rows never leave a site.

A site counts how one head does on its rows (`EvaluationSums`); the sums of several sites are those of their pooled
rows. `report` turns sums, of one site or pooled, into figures with 95 % intervals.

Intervals take the rows for independent draws. Where rows come in groups (several images of a patient), they are
narrower than they should be.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SCORE_BINS = 255
"""Bins `B` of a class's scores; odd, so that equal scores at the centre share one."""

CONFIDENCE_BINS = 20
"""Bins `K` of equal width, from 0 to 1, in which the probabilities that a head gives are compared with what is true."""

_HALF = SCORE_BINS // 2
# In units of the spread: scores nearer to the centre than _SOFT get bins of equal width, scores beyond _REACH the last.
_SOFT = 0.3
_REACH = 1e4
_STEP = math.asinh(_REACH / _SOFT) / _HALF
_DEFAULT_SPREAD = 0.1
_LEAST_SPREAD = 1e-9

_Z = NormalDist().inv_cdf(0.975)
_PRIOR_ROWS = 3.0
_BISECTIONS = 32
_CHUNK_VALUES = 2**22

_NO_ROWS = "There are no rows."
_CLASS_EMPTY = "No row is of this class."
_CLASS_ALONE = "Every row is of this class."
_SEVERAL_CLASSES = "Rows may have several classes."


@dataclass(frozen=True, eq=False)
class ScoreBins:
    """Where the bins lie in which a class's scores are counted; the same at every site, or counts do not add.

    A row's score for class `c` is its log-odds against the rest, `log(p_c / (1 - p_c)) + log(C - 1)` with `p` the
    softmax of its logits: 0 where the head knows nothing. A multi-label row's score is its logit. Bins are equal in
    `asinh((score - centre) / (0.3 spread))`, that is 0.026 spreads wide at the centre, 9 % of the distance from it
    further out, and reach 10,000 spreads.

    Attributes:
        centre: `[C]`, where bins are narrowest.
        spread: `[C]`, above 0: about the standard deviation of the scores.
    """

    centre: FloatArray
    spread: FloatArray

    def __post_init__(self) -> None:
        if self.centre.ndim != 1 or self.centre.shape != self.spread.shape or len(self.centre) < 2:
            raise ValueError(
                f"Bins need a centre and a spread for each of two classes or more, not {list(self.centre.shape)} and "
                f"{list(self.spread.shape)}."
            )
        if not (np.isfinite(self.centre).all() and np.isfinite(self.spread).all() and (self.spread > 0).all()):
            raise ValueError("The centres and spreads of bins must be finite, and spreads above 0.")

    @classmethod
    def default(cls, num_classes: int) -> Self:
        """Return bins for heads whose logits are log-odds, as cross entropy and discriminants make them.

        They are too coarse for logits that hardly differ, such as a ridge head's for a rare class: see `from_moments`.
        """
        return cls(np.zeros(num_classes), np.full(num_classes, _DEFAULT_SPREAD))

    @classmethod
    def from_moments(cls, mean: FloatArray, covariance: FloatArray, *, multi_label: bool = False) -> Self:
        """Return bins that fit logits of any size, from what a linear head and pooled statistics say of them.

        A head with weight `W` and bias `b` on features of mean `m` and covariance `S` has logits of mean `W m + b` and
        covariance `W S W^T`. The spread of the scores follows by linearising them there.

        Args:
            mean: `[C]`.
            covariance: `[C, C]`.
            multi_label: whether logits are scores as they are.
        """
        if multi_label:
            return cls(mean, _usable(np.sqrt(np.maximum(covariance.diagonal(), 0))))
        centre = _log_odds(mean[None])[1][0]
        # log(sum of exp over the other classes) is logit minus log-odds; the gradient is a softmax over those.
        exponents = mean - (mean - centre)[:, None]
        np.fill_diagonal(exponents, 0)
        slopes = -np.exp(exponents)
        np.fill_diagonal(slopes, 1)
        spread = np.sqrt(np.maximum(np.einsum("cd,de,ce->c", slopes, covariance, slopes), 0))
        return cls(centre + math.log(len(mean) - 1), _usable(spread))

    def index(self, log_odds: FloatArray, *, multi_label: bool = False) -> IntArray:
        """Return the bins `[n, C]`, from 0 to `SCORE_BINS - 1`, of log-odds `[n, C]`; of logits where multi-label."""
        rivals = 1 if multi_label else len(self.centre) - 1
        scores = (log_odds + (math.log(rivals) - self.centre)) / (self.spread * _SOFT)
        return np.clip(np.rint(np.arcsinh(scores) / _STEP), -_HALF, _HALF).astype(np.int64) + _HALF


def _usable(spread: FloatArray) -> FloatArray:
    return np.where(spread > _LEAST_SPREAD, spread, _DEFAULT_SPREAD)


@dataclass(frozen=True, eq=False)
class EvaluationSums:
    """What is counted about one head on rows at hand: it adds across sites, exactly but for the loss's rounding.

    Attributes:
        confusion: `[C, C]` int64, rows by true class and predicted class, the one with the largest logit. Of
            multi-label rows `[C, 2, 2]`: for each class, rows by whether they have it and whether its logit is above 0.
        loss_sum: the rows' cross entropy, in nats; of multi-label rows the binary one, each the mean over classes.
        scores: `[C, 2, B]` int64: for each class, in `ScoreBins`, the scores of other rows, then of its own.
        matched: how many multi-label rows have all labels predicted rightly, which their confusion does not tell.
        reliability: `[2, K]` int64, in the bins of `CONFIDENCE_BINS`: rows by the probability of their predicted class,
            those where it was wrong, then those where it was right. Of multi-label rows, which count once for each
            class: by the probability of the class, those that lack it, then those that have it.
        confidence: `[K]`, the sums of these probabilities.
    """

    confusion: IntArray
    loss_sum: float
    scores: IntArray
    matched: int = 0
    reliability: IntArray = field(default_factory=lambda: np.zeros((2, CONFIDENCE_BINS), np.int64))
    confidence: FloatArray = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))

    @classmethod
    def zeros(cls, num_classes: int, *, multi_label: bool = False) -> Self:
        """Return the sums over no rows."""
        scores = np.zeros((num_classes, 2, SCORE_BINS), np.int64)
        return cls(np.zeros(_confusion_shape(num_classes, multi_label), np.int64), 0.0, scores)

    @classmethod
    def from_logits(
        cls, logits: "FloatArray | Tensor", labels: "IntArray | Tensor", bins: ScoreBins | None = None
    ) -> Self:
        """Return the sums over rows at hand.

        Args:
            logits: `[n, C]`.
            labels: `[n]` integers below `C`, or `[n, C]` of 0 and 1 for multi-label rows.
            bins: the default ones, unless given.

        Raises:
            ValueError: if a shape or a label does not fit, or a logit is not finite.
        """
        (sums,) = sums_by_site(logits, labels, np.zeros(len(labels), np.int64), 1, bins)
        return cls(sums.confusion, sums.loss_sum, sums.scores, sums.matched, sums.reliability, sums.confidence)

    @property
    def num_classes(self) -> int:
        """`C`."""
        return len(self.confusion)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have any number of classes."""
        return self.confusion.ndim == 3

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return int(self.confusion[0].sum() if self.multi_label else self.confusion.sum())

    @property
    def correct(self) -> int:
        """How many of them have their class predicted, or all their labels."""
        return self.matched if self.multi_label else int(self.confusion.trace())

    @property
    def binary(self) -> IntArray:
        """`[C, 2, 2]`: for each class, rows by whether they have it and whether it is predicted."""
        if self.multi_label:
            return self.confusion
        right, own, taken = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        cells = [[self.rows - own - taken + right, taken - right], [own - right, right]]
        return np.moveaxis(np.array(cells), 2, 0)

    def __add__(self, other: Self) -> Self:
        if self.num_classes != other.num_classes:
            raise ValueError(f"Cannot add counts of {self.num_classes} and {other.num_classes} classes.")
        if self.multi_label != other.multi_label:
            raise ValueError("Cannot add counts of multi-label rows and of others.")
        return type(self)(
            self.confusion + other.confusion,
            self.loss_sum + other.loss_sum,
            self.scores + other.scores,
            self.matched + other.matched,
            self.reliability + other.reliability,
            self.confidence + other.confidence,
        )

    def __radd__(self, other: int) -> Self:
        """Return `0 + self`, so that `sum` works."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what travels: counts in the narrowest unsigned integers that hold them.

        With a byte each, 10 classes take 5.4 KB and 100 classes 61 KB; twice that once a count passes 255.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "confusion": _narrow(self.confusion),
            "loss_sum": np.array([self.loss_sum]),
            "scores": _narrow(self.scores),
            "reliability": _narrow(self.reliability),
            "confidence": self.confidence,
        }
        return {**arrays, "matched": _narrow(np.array([self.matched]))} if self.multi_label else arrays

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[Any]], num_classes: int, *, multi_label: bool = False
    ) -> Self:
        """Read what `to_arrays` returned, and check that a site can have counted it.

        Raises:
            ValueError: if names, shapes or types differ, or counts contradict each other.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "confusion": _confusion_shape(num_classes, multi_label),
            "scores": (num_classes, 2, SCORE_BINS),
            "reliability": (2, CONFIDENCE_BINS),
        }
        if multi_label:
            shapes["matched"] = (1,)
        expected = sorted(shapes.keys() | {"loss_sum", "confidence"})
        if sorted(arrays) != expected:
            raise ValueError(
                f"An evaluation holds {', '.join(expected[:-1])} and {expected[-1]}, not {sorted(arrays)}."
            )
        for name, shape in shapes.items():
            array = arrays[name]
            if array.dtype not in (np.uint8, np.uint16, np.uint32) or array.shape != shape:
                raise ValueError(
                    f"{name!r} is {array.dtype}{list(array.shape)}, not unsigned integers {list(shape)} of 32 bits "
                    "or less."
                )
        loss = arrays["loss_sum"]
        if loss.dtype != np.float64 or loss.shape != (1,) or not np.isfinite(loss[0]) or loss[0] < 0:
            raise ValueError("'loss_sum' is not one finite float64 of 0 or more.")
        confidence = arrays["confidence"]
        fits = confidence.dtype == np.float64 and confidence.shape == (CONFIDENCE_BINS,)
        if not (fits and np.isfinite(confidence).all()):
            raise ValueError(f"'confidence' is not {CONFIDENCE_BINS} finite float64.")
        sums = cls(
            arrays["confusion"].astype(np.int64),
            float(loss[0]),
            arrays["scores"].astype(np.int64),
            int(arrays["matched"][0]) if multi_label else 0,
            arrays["reliability"].astype(np.int64),
            np.array(confidence),
        )
        if (sums.binary.sum((1, 2)) != sums.rows).any():
            raise ValueError("'confusion' counts other rows for one class than for another.")
        if not np.array_equal(sums.scores.sum(2), sums.binary.sum(2)):
            raise ValueError("'scores' counts other rows than 'confusion'.")
        wrong = sums.rows - sums.binary.trace(axis1=1, axis2=2)
        if not sums.rows - wrong.sum() <= sums.correct <= sums.rows - wrong.max():
            raise ValueError("'matched' contradicts 'confusion'.")
        judged, true = sums.rows, sums.correct
        if multi_label:
            judged, true = sums.rows * num_classes, int(sums.binary[:, 1].sum())
        if sums.reliability.sum() != judged or sums.reliability[1].sum() != true:
            raise ValueError("'reliability' counts other rows than 'confusion'.")
        edges, counts = np.arange(CONFIDENCE_BINS) / CONFIDENCE_BINS, sums.reliability.sum(0)
        slack = 1e-9 * counts
        above = confidence < counts * edges - slack
        if (above | (confidence > counts * (edges + 1 / CONFIDENCE_BINS) + slack)).any():
            raise ValueError("'confidence' is the sum of other probabilities than 'reliability' counts.")
        if sums.rows == 0 and sums.loss_sum:
            raise ValueError("'loss_sum' is a loss of no rows.")
        return sums


def _confusion_shape(num_classes: int, multi_label: bool) -> tuple[int, ...]:
    return (num_classes, 2, 2) if multi_label else (num_classes, num_classes)


def sums_by_site(
    logits: "FloatArray | Tensor",
    labels: "IntArray | Tensor",
    owners: IntArray,
    num_sites: int,
    bins: ScoreBins | None = None,
) -> Iterator[EvaluationSums]:
    """Count the rows of many sites at once, in a few array operations for hundreds of sites.

    Args:
        logits: `[n, C]`, of all sites' rows in any order.
        labels: `[n]` integers below `C`, or `[n, C]` of 0 and 1 for multi-label rows.
        owners: `[n]`, the site of each row.
        num_sites: `S`; `owners` are below it.
        bins: the default ones, unless given.

    Yields:
        The sums of sites `0` to `S - 1`, in bounded memory if they are used as they come.

    Raises:
        ValueError: if a shape, a label or an owner does not fit, or a logit is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"Logits must be [n, C] of two classes or more, not {list(logits.shape)}.")
    rows, classes = logits.shape
    multi_label = labels.ndim == 2
    labels = _checked_numbers(
        "Labels", labels, (rows, classes) if multi_label else (rows,), 2 if multi_label else classes
    )
    owners = _checked_numbers("Owners", owners, (rows,), num_sites)
    bins = ScoreBins.default(classes) if bins is None else bins
    if len(bins.centre) != classes:
        raise ValueError(f"Bins for {len(bins.centre)} classes cannot count logits of {classes}.")
    order = np.argsort(owners, kind="stable")
    together = max(1, _CHUNK_VALUES // (classes * (classes + 2 * SCORE_BINS)))
    for first in range(0, num_sites, together):
        count = min(together, num_sites - first)
        start, stop = np.searchsorted(owners[order], [first, first + count])
        chosen = order[start:stop]
        yield from _count(logits, labels[chosen], owners[chosen] - first, chosen, count, bins)


def _count(
    logits: "FloatArray | Tensor", labels: IntArray, owners: IntArray, rows: IntArray, num_sites: int, bins: ScoreBins
) -> Iterator[EvaluationSums]:
    """Count the given rows of `logits`, as many of them at once as fit the working memory."""
    classes, multi_label = logits.shape[1], labels.ndim == 2
    shape = _confusion_shape(classes, multi_label)
    losses, matched = np.zeros(num_sites), np.zeros(num_sites, np.int64)
    confusion = np.zeros(num_sites * math.prod(shape), np.int64)
    scores = np.zeros(num_sites * classes * 2 * SCORE_BINS, np.int64)
    reliability = np.zeros(num_sites * 2 * CONFIDENCE_BINS, np.int64)
    confidence = np.zeros(num_sites * CONFIDENCE_BINS)
    step = max(1, _CHUNK_VALUES // classes)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        label, owner = labels[block], owners[block]
        counted = _count_labels if multi_label else _count_classes
        own, cell, log_odds, loss = counted(_float64(logits[rows[block]]), label)
        losses += np.bincount(owner, weights=loss, minlength=num_sites)
        confusion += np.bincount((owner[:, None] * math.prod(shape) + cell).ravel(), minlength=len(confusion))
        if multi_label:
            matched += np.bincount(owner[((log_odds > 0) == own).all(1)], minlength=num_sites)
        probabilities, came_true = _predicted(log_odds, own, cell)
        place = np.minimum((probabilities * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        outcomes = (owner[:, None] * 2 + came_true) * CONFIDENCE_BINS + place
        reliability += np.bincount(outcomes.ravel(), minlength=len(reliability))
        places = owner[:, None] * CONFIDENCE_BINS + place
        confidence += np.bincount(places.ravel(), weights=probabilities.ravel(), minlength=len(confidence))
        index = bins.index(log_odds, multi_label=multi_label)
        cells = ((owner[:, None] * classes + np.arange(classes)) * 2 + own) * SCORE_BINS + index
        scores += np.bincount(cells.ravel(), minlength=len(scores))
    yield from map(
        EvaluationSums,
        confusion.reshape(num_sites, *shape),
        losses.tolist(),
        scores.reshape(num_sites, classes, 2, SCORE_BINS),
        matched.tolist(),
        reliability.reshape(num_sites, 2, CONFIDENCE_BINS),
        confidence.reshape(num_sites, CONFIDENCE_BINS),
    )


def _predicted(log_odds: FloatArray, own: IntArray, cell: IntArray) -> tuple[FloatArray, IntArray]:
    """Return the probabilities that a head stands for and whether each came true, as `EvaluationSums` counts them.

    Both are `[n, 1]`, of the class that is predicted, or `[n, C]` of multi-label rows.
    """
    classes = log_odds.shape[1]
    if cell.shape[1] == classes:
        return _sigmoid(log_odds), own
    predicted = cell % classes
    return _sigmoid(np.take_along_axis(log_odds, predicted, 1)), np.take_along_axis(own, predicted, 1)


def _sigmoid(log_odds: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(log_odds / 2))


_Counted = tuple[IntArray, IntArray, FloatArray, FloatArray]
"""Of each row: whether it has each class `[n, C]`, its cells of the confusion `[n, 1]` or `[n, C]`, its log-odds
(if multi-label logits) `[n, C]`, and its loss `[n]`."""


def _count_classes(logits: FloatArray, labels: IntArray) -> _Counted:
    log_probabilities, log_odds = _log_odds(logits)
    losses = -np.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    classes = logits.shape[1]
    own = (labels[:, None] == np.arange(classes)).astype(np.int64)
    cell = labels * classes + logits.argmax(1)
    # Rounding can leave a probability a hair above 1.
    return own, cell[:, None], log_odds, np.maximum(losses, 0)


def _count_labels(logits: FloatArray, labels: IntArray) -> _Counted:
    _require_finite(logits)
    losses = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    cell = (np.arange(logits.shape[1]) * 2 + labels) * 2 + (logits > 0)
    return labels, cell, logits, losses.mean(1)


def _log_odds(logits: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return `log p` and `log(p / (1 - p))`, both `[n, C]`, of the softmax `p`; accurate also where `p` rounds to 1.

    Raises:
        ValueError: if a logit is not finite.
    """
    _require_finite(logits)
    rows, top = np.arange(len(logits)), logits.argmax(1)
    shifted = logits - logits[rows, top][:, None]
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    probabilities = np.exp(log_probabilities)
    # Only the largest can be near 1, where 1 - p cancels: for it, sum the others instead.
    probabilities[rows, top] = 0
    log_odds = log_probabilities - np.log1p(-probabilities)
    shifted[rows, top] = -np.inf
    second = shifted.max(1)
    log_odds[rows, top] = -second - np.log(np.exp(shifted - second[:, None]).sum(1))
    return log_probabilities, log_odds


def _require_finite(logits: FloatArray) -> None:
    if not np.isfinite(logits).all():
        raise ValueError("The head gives logits that are not finite.")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, or the reason why there is none."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @classmethod
    def undefined(cls, reason: str) -> Self:
        """Return the estimate of what cannot be told from these rows."""
        return cls(None, None, None, reason)

    def to_list(self) -> list[float | None]:
        """Return `[value, low, high]`."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class ClassReport:
    """How a head does on one class.

    Attributes:
        name: the class's.
        rows: how many are of this class.
        sensitivity: of the rows of this class, the share predicted as it (also called recall).
        specificity: of the other rows, the share not predicted as it.
        auroc: of a row of this class and another row, the chance that the head finds the first more likely of it.
    """

    name: str
    rows: int
    sensitivity: Estimate
    specificity: Estimate
    auroc: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, estimates as `[value, low, high]`, with why some are null."""
        figures = {"sensitivity": self.sensitivity, "specificity": self.specificity, "auroc": self.auroc}
        return {"name": self.name, "rows": self.rows, **_json(figures)}


@dataclass(frozen=True)
class EvaluationReport:
    """How a head does on rows of one site, or of all sites pooled.

    Attributes:
        rows: how many there are.
        loss: their mean loss in nats; None without rows.
        accuracy: the share predicted rightly; of multi-label rows, with all labels.
        balanced_accuracy: the mean sensitivity of the classes with rows, each counting alike; not of multi-label rows.
        auroc: the mean of the classes' areas under the curve.
        classes: a report for each class.
    """

    rows: int
    loss: float | None
    accuracy: Estimate
    balanced_accuracy: Estimate
    auroc: Estimate
    classes: tuple[ClassReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, estimates as `[value, low, high]`, with why some are null."""
        figures = {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy, "auroc": self.auroc}
        classes = [each.to_dict() for each in self.classes]
        return {"rows": self.rows, "loss": self.loss, **_json(figures), "classes": classes}


def report(sums: EvaluationSums, classes: Sequence[str]) -> EvaluationReport:
    """Turn sums into figures with intervals.

    Args:
        sums: of one site, or of several, added.
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
    """Return the share of rows predicted rightly, with Wilson's interval."""
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
    """Return the mean sensitivity of the classes with rows, which are independent binomial shares.

    The interval adds the squared distances from each share to its Wilson limits (Zou, Huang & Zhang, "A note on
    confidence interval estimation for a linear function of binomial proportions", Computational Statistics & Data
    Analysis 53, 2009): unlike the delta method's it has a width where shares are 0 or 1.
    """
    if sums.multi_label:
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
    """Return the area under the curve of each class against the rest, and their mean over the classes that have one.

    Rows in one bin count as ties, a half each; `auroc_error_bound` says by how much that can be off. Limits are the
    areas that differ from the one found by 1.96 of their own standard deviations, as in Wilson's interval and in
    method 5 of Newcombe (Statistics in Medicine 25, 2006), so that they stay within 0..1 and apart for an area of 1;
    the variance is `_AreaVariance`.

    The mean's limits are the mean distances of the classes' limits, reduced as far as its standard deviation is below
    theirs: classes are taken as independent, but what rows contribute as members of their class and as rest of the
    other classes as one and the same. That is exact for two classes, whose areas are equal; in simulations of 2 to 20
    classes the limits held the true mean in 93 to 99 % of the cases. Multi-label classes may depend on each other in
    any way, so their mean distances are not reduced.
    """
    counts = sums.scores.sum(2)
    defined = (counts > 0).all(1)
    classes: list[Estimate] = [
        Estimate.undefined(_CLASS_ALONE if own else _CLASS_EMPTY) for own in (counts[:, 1] > 0).tolist()
    ]
    if not defined.any():
        return tuple(classes), Estimate.undefined("All rows are of one class." if counts.any() else _NO_ROWS)
    areas, variance = _areas(sums.scores[defined])
    low, high = _limits(areas, variance)
    for number, *figures in zip(
        np.flatnonzero(defined).tolist(), areas.tolist(), low.tolist(), high.tolist(), strict=True
    ):
        classes[number] = Estimate(*figures)
    members, rest = variance.parts(areas)
    deviations = np.sqrt(members + rest).sum()
    reduced = 1.0
    if deviations > 0 and not sums.multi_label:
        reduced = min(1.0, float((math.sqrt(members.sum()) + math.sqrt(rest.sum())) / deviations))
    mean = float(areas.mean())
    below, above = float((areas - low).mean()), float((high - areas).mean())
    return tuple(classes), Estimate(mean, mean - reduced * below, mean + reduced * above)


def auroc_error_bound(sums: EvaluationSums) -> FloatArray:
    """Return `[C]`, by how much each class's area can differ from that of the scores themselves: half its ties.

    The difference is far smaller than that as long as bins are narrow beside the spread of scores: 0.001 or so with
    bins that fit, where the bound is 0.01. 0 for a class without rows or alone.
    """
    rest, own = sums.scores[:, 0].astype(np.float64), sums.scores[:, 1].astype(np.float64)
    pairs = rest.sum(1) * own.sum(1)
    bound: FloatArray = 0.5 * (rest * own).sum(1) / np.maximum(pairs, 1)
    return bound


@dataclass(frozen=True)
class Reliability:
    """Whether the probabilities that a head gives come true.

    Attributes:
        rows: `K`, how many predictions have a probability in each of `CONFIDENCE_BINS` equal bins from 0 to 1.
        confidence: `K`, the mean probability of those; None for an empty bin.
        frequency: `K`, the share of them that came true, with Wilson's interval.
        error: the expected calibration error: the mean over all predictions of the distance between the two in their
            bin (Naeini, Cooper & Hauskrecht, AAAI 2015; Guo et al., ICML 2017). None without rows. Few rows make it
            larger than it is.
    """

    rows: tuple[int, ...]
    confidence: tuple[float | None, ...]
    frequency: tuple[Estimate, ...]
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        frequency = [estimate.to_list() for estimate in self.frequency]
        return {"error": self.error, "rows": self.rows, "confidence": self.confidence, "frequency": frequency}


def reliability(sums: EvaluationSums) -> Reliability:
    """Return how the probabilities given compare with what came true."""
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
    """Return, for each class, the corners `[P, 2]` of its ROC curve: false and true positive rates, from 0 to 1.

    Points on a line between their neighbours are left out. None for a class without rows, or alone.
    """
    # From the highest scores down: what is predicted positive as the threshold falls.
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
    """The variance of areas under the curve, as a function of the true areas `t` `[K]`.

    With `P` rows of the class and `N` others it is `t (1 - t) (1 + (N - 1) r + (P - 1) q) / (P N)`, where `r` says how
    alike the comparisons of one member row are, `q` those of one other row. Hanley & McNeil (Radiology 143, 1982)
    have `r = t / (1 + t)` and `q = (1 - t) / (2 - t)` for exponential scores; with the larger one on the side of
    fewer rows, that is cautious. DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988) measure both in the rows, which
    is right for any scores, but only with many rows, and many misplaced ones among them. So the measured ones are
    averaged with the modelled ones, by weights of `2 min(area, 1 - area)` a row and 3 rows.

    In simulations (normal scores of spread ratios 1/2, 1 and 2, exponential ones; areas of 0.5 to 0.99) the limits
    held the true area in 93 % of the cases or more with 20 rows or more on both sides; 87 % in the worst case, of 3
    rows whose scores are spread twice as wide as the others'.

    Attributes:
        own: `[K]`, `P`.
        rest: `[K]`, `N`.
        own_alike: `[K]`, `r` as measured.
        rest_alike: `[K]`, `q` as measured.
        weight: `[K]`, the weight of a row.
    """

    own: FloatArray
    rest: FloatArray
    own_alike: FloatArray
    rest_alike: FloatArray
    weight: FloatArray

    def parts(self, areas: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the variance `[..., K]` in two parts: due to which rows of the class were seen, and which others."""
        one, other = areas / (1 + areas), (1 - areas) / (2 - areas)
        more, less = np.maximum(one, other), np.minimum(one, other)
        own_fewer = self.own <= self.rest
        r = _average(self.own_alike, self.weight * (self.own - 1), np.where(own_fewer, more, less))
        q = _average(self.rest_alike, self.weight * (self.rest - 1), np.where(own_fewer, less, more))
        shared = (1 - r - q) / (2 * self.own * self.rest)
        bernoulli = areas * (1 - areas)
        return bernoulli * (r / self.own + shared), bernoulli * (q / self.rest + shared)


def _areas(scores: IntArray) -> tuple[FloatArray, _AreaVariance]:
    """Return the areas `[K]` and their variance, of counts `[K, 2, B]` with rows on both sides."""
    rest, own = scores[:, 0].astype(np.float64), scores[:, 1].astype(np.float64)
    num_rest, num_own = rest.sum(1), own.sum(1)
    # A row's placement is the share of the other side's rows that it is rightly ordered with.
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
    """Return `[K]`, in 0..1, how alike the comparisons of one row with the `opposite` rows are."""
    squares = (counts * (placements - areas[:, None]) ** 2).sum(1)
    variance = squares / np.maximum(counts.sum(1) - 1, 1)
    bernoulli = areas * (1 - areas)
    share = np.divide(variance, bernoulli, out=np.zeros_like(areas), where=bernoulli > 0)
    # A mean of n unrelated comparisons varies too, by one n-th.
    chance = 1 / np.maximum(opposite, 2)
    alike: FloatArray = np.clip((share - chance) / (1 - chance), 0, 1)
    return alike


def _average(measured: FloatArray, weight: FloatArray, modelled: FloatArray) -> FloatArray:
    return (weight * measured + _PRIOR_ROWS * modelled) / (weight + _PRIOR_ROWS)


def _limits(areas: FloatArray, variance: _AreaVariance) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and the highest true areas `[K]` that do not contradict the areas found, by bisection."""
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


def _json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    undefined = {name: figure.reason for name, figure in figures.items() if figure.value is None}
    listed = {name: figure.to_list() for name, figure in figures.items()}
    return {**listed, "undefined": undefined} if undefined else listed


def _narrow(counts: IntArray) -> npt.NDArray[np.unsignedinteger[Any]]:
    return counts.astype(np.min_scalar_type(int(counts.max())))


def _float64(values: "FloatArray | Tensor") -> FloatArray:
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().double().numpy()
    return array.astype(np.float64, copy=False)


def _checked_numbers(what: str, values: "IntArray | Tensor", shape: tuple[int, ...], limit: int) -> IntArray:
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be {list(shape)} integers, not {list(array.shape)} of {array.dtype}.")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
        raise ValueError(f"{what} must be from 0 to {limit - 1}, not from {array.min()} to {array.max()}.")
    return array.astype(np.int64, copy=False)
