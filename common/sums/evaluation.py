"""Evaluation counts of a head: they add across sites, and no row leaves a site."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.sums import added, as_float64
from fedhead.sums.targets import CLASSES, TargetKind

if TYPE_CHECKING:
    from torch import Tensor
from fedhead.sums.score_bins import SCORE_BINS, ScoreBins, require_finite, softmax_log_odds

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


CONFIDENCE_BINS = 20
"""Number of bins `K` of equal width, from 0 to 1, in which predicted probabilities are compared with outcomes."""

LARGEST_LOSS = 1e30
"""Bar on the mean loss of a site's rows; sums of larger ones could overflow."""

_CHUNK_VALUES = 2**22


@dataclass(frozen=True, eq=False)
class EvaluationSums:
    """Evaluation counts of one head over rows; they add across sites, exactly except for rounding of the loss.

    Attributes:
        confusion: `[C, C]` int64, rows by true class and predicted class (largest logit). For multi-label rows
            `[C, 2, 2]`: for each class, rows by whether they have it and whether its logit is above 0.
        loss_sum: the summed cross entropy in nats; for multi-label rows binary, averaged over classes.
        scores: `[C, 2, B]` int64: for each class, in `ScoreBins`, the scores of other rows, then of its own.
        matched: the number of multi-label rows with all labels correct, which the confusion does not determine.
        reliability: `[2, K]` int64, in `CONFIDENCE_BINS` bins: rows by the probability of their predicted class, first
            the wrong predictions, then the correct ones. Multi-label rows count once per class: by the probability of
            the class, first the rows without it, then those with it.
        confidence: `[K]`, the sum of these probabilities in each bin.
    """

    confusion: IntArray
    loss_sum: float
    scores: IntArray
    matched: int = 0
    reliability: IntArray = field(default_factory=lambda: np.zeros((2, CONFIDENCE_BINS), np.int64))
    confidence: FloatArray = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))

    @classmethod
    def zeros(cls, num_classes: int, *, kind: TargetKind = CLASSES) -> Self:
        """Return the sums over no rows."""
        scores = np.zeros((num_classes, 2, SCORE_BINS), np.int64)
        return cls(np.zeros(_confusion_shape(num_classes, kind.exclusive), np.int64), 0.0, scores)

    @classmethod
    def from_logits(
        cls,
        logits: "FloatArray | Tensor",
        labels: "IntArray | Tensor",
        bins: ScoreBins | None = None,
        *,
        kind: TargetKind = CLASSES,
    ) -> Self:
        """Count rows.

        Args:
            logits: `[n, C]`.
            labels: `[n]` integers below `C`, or `[n, C]` of 0 and 1 for multi-label rows.
            bins: the bins of scores; the default ones if not given.
            kind: of the labels.

        Raises:
            ValueError: if a shape or a label does not fit or a logit is not finite.
        """
        (sums,) = sums_by_site(logits, labels, np.zeros(len(labels), np.int64), 1, bins, kind=kind)
        return cls(sums.confusion, sums.loss_sum, sums.scores, sums.matched, sums.reliability, sums.confidence)

    @property
    def num_classes(self) -> int:
        """`C`."""
        return len(self.confusion)

    @property
    def exclusive(self) -> bool:
        """Whether every row has exactly one class; else any number of classes."""
        return self.confusion.ndim == 2

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.confusion.sum() if self.exclusive else self.confusion[0].sum())

    @property
    def correct(self) -> int:
        """The number of rows with the predicted class, or all predicted labels, correct."""
        return int(self.confusion.trace()) if self.exclusive else self.matched

    @property
    def binary(self) -> IntArray:
        """`[C, 2, 2]`: for each class, rows by whether they have it and whether it is predicted."""
        if not self.exclusive:
            return self.confusion
        right, own, taken = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        cells = [[self.rows - own - taken + right, taken - right], [own - right, right]]
        return np.moveaxis(np.array(cells), 2, 0)

    def __add__(self, other: Self) -> Self:
        if self.num_classes != other.num_classes:
            raise ValueError(f"Cannot add counts of {self.num_classes} and {other.num_classes} classes.")
        if self.exclusive != other.exclusive:
            raise ValueError("Cannot add counts of multi-label and single-label rows.")
        return added(self, other)

    def __radd__(self, other: int) -> Self:
        """Return `0 + self`, so that `sum` works."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire: counts in the narrowest unsigned integers that hold them.

        At one byte per count, 10 classes take 5.4 KB and 100 classes 61 KB; twice that once a count exceeds 255.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "confusion": _narrow(self.confusion),
            "loss_sum": np.array([self.loss_sum]),
            "scores": _narrow(self.scores),
            "reliability": _narrow(self.reliability),
            "confidence": self.confidence,
        }
        return arrays if self.exclusive else {**arrays, "matched": _narrow(np.array([self.matched]))}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: sums of the expected classes and kind.

        Raises:
            ValueError: if names, shapes or types differ, or counts contradict each other.
        """
        num_classes, exclusive = like.num_classes, like.exclusive
        shapes: dict[str, tuple[int, ...]] = {
            "confusion": _confusion_shape(num_classes, exclusive),
            "scores": (num_classes, 2, SCORE_BINS),
            "reliability": (2, CONFIDENCE_BINS),
        }
        if not exclusive:
            shapes["matched"] = (1,)
        expected = sorted(shapes.keys() | {"loss_sum", "confidence"})
        if sorted(arrays) != expected:
            raise ValueError(
                f"An evaluation has the arrays {', '.join(expected[:-1])} and {expected[-1]}, not {sorted(arrays)}."
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
            raise ValueError(f"'confidence' is not {CONFIDENCE_BINS} finite float64 values.")
        sums = cls(
            arrays["confusion"].astype(np.int64),
            float(loss[0]),
            arrays["scores"].astype(np.int64),
            0 if exclusive else int(arrays["matched"][0]),
            arrays["reliability"].astype(np.int64),
            np.array(confidence),
        )
        _require_consistent(sums)
        return sums


def _require_consistent(sums: EvaluationSums) -> None:
    """Check that some rows can have these counts.

    Raises:
        ValueError: if they contradict each other.
    """
    if (sums.binary.sum((1, 2)) != sums.rows).any():
        raise ValueError("'confusion' has different numbers of rows for different classes.")
    if not np.array_equal(sums.scores.sum(2), sums.binary.sum(2)):
        raise ValueError("'scores' and 'confusion' count different numbers of rows.")
    wrong = sums.rows - sums.binary.trace(axis1=1, axis2=2)
    if not sums.rows - wrong.sum() <= sums.correct <= sums.rows - wrong.max():
        raise ValueError("'matched' contradicts 'confusion'.")
    judged, true = sums.rows, sums.correct
    if not sums.exclusive:
        judged, true = sums.rows * sums.num_classes, int(sums.binary[:, 1].sum())
    if sums.reliability.sum() != judged or sums.reliability[1].sum() != true:
        raise ValueError("'reliability' and 'confusion' count different numbers of rows.")
    edges, counts = np.arange(CONFIDENCE_BINS) / CONFIDENCE_BINS, sums.reliability.sum(0)
    slack = 1e-9 * counts
    above = sums.confidence < counts * edges - slack
    if (above | (sums.confidence > counts * (edges + 1 / CONFIDENCE_BINS) + slack)).any():
        raise ValueError("'confidence' contradicts the probabilities counted in 'reliability'.")
    if sums.loss_sum > LARGEST_LOSS * sums.rows:
        raise ValueError("'loss_sum' is too large, or not 0 although there are no rows.")


def _confusion_shape(num_classes: int, exclusive: bool) -> tuple[int, ...]:
    return (num_classes, num_classes) if exclusive else (num_classes, 2, 2)


def sums_by_site(
    logits: "FloatArray | Tensor",
    labels: "IntArray | Tensor",
    owners: IntArray,
    num_sites: int,
    bins: ScoreBins | None = None,
    *,
    kind: TargetKind = CLASSES,
    decided: IntArray | None = None,
) -> Iterator[EvaluationSums]:
    """Count the rows of many sites at once, with a few array operations for hundreds of sites.

    Args:
        logits: `[n, C]`, of all sites' rows in any order.
        labels: `[n]` integers below `C`, or `[n, C]` of 0 and 1 for multi-label rows.
        owners: `[n]`, the site of each row.
        num_sites: `S`; `owners` are below it.
        bins: the bins of scores; the default ones if not given.
        kind: of the labels.
        decided: `[n]`, the predicted classes of single-label rows; by default those of the largest logits.

    Yields:
        The sums of sites `0` to `S - 1`, in bounded memory if they are consumed one by one.

    Raises:
        ValueError: if a shape, a label or an owner does not fit or a logit is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"Logits must be [n, C] with two or more classes, not {list(logits.shape)}.")
    rows, classes = logits.shape
    shape, limit = ((rows,), classes) if kind.exclusive else ((rows, classes), 2)
    labels = _checked_numbers("Labels", labels, shape, limit)
    owners = _checked_numbers("Owners", owners, (rows,), num_sites)
    bins = ScoreBins.default(classes) if bins is None else bins
    if len(bins.centre) != classes:
        raise ValueError(f"Bins for {len(bins.centre)} classes do not fit logits of {classes}.")
    order = np.argsort(owners, kind="stable")
    together = max(1, _CHUNK_VALUES // (classes * (classes + 2 * SCORE_BINS)))
    for first in range(0, num_sites, together):
        count = min(together, num_sites - first)
        start, stop = np.searchsorted(owners[order], [first, first + count])
        chosen = order[start:stop]
        yield from _count(logits, labels[chosen], owners[chosen] - first, chosen, count, bins, kind, decided)


def _count(
    logits: "FloatArray | Tensor",
    labels: IntArray,
    owners: IntArray,
    rows: IntArray,
    num_sites: int,
    bins: ScoreBins,
    kind: TargetKind,
    decided: IntArray | None,
) -> Iterator[EvaluationSums]:
    """Count the given rows of `logits`, as many at a time as fit the working memory."""
    classes = logits.shape[1]
    shape = _confusion_shape(classes, kind.exclusive)
    losses, matched = np.zeros(num_sites), np.zeros(num_sites, np.int64)
    confusion = np.zeros(num_sites * math.prod(shape), np.int64)
    scores = np.zeros(num_sites * classes * 2 * SCORE_BINS, np.int64)
    reliability = np.zeros(num_sites * 2 * CONFIDENCE_BINS, np.int64)
    confidence = np.zeros(num_sites * CONFIDENCE_BINS)
    step = max(1, _CHUNK_VALUES // classes)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        label, owner = labels[block], owners[block]
        counted = _count_classes if kind.exclusive else _count_labels
        own, cell, log_odds, loss = counted(as_float64(logits[rows[block]]), label)
        if decided is not None:
            cell = (label * classes + decided[rows[block]])[:, None]
        losses += np.bincount(owner, weights=loss, minlength=num_sites)
        confusion += np.bincount((owner[:, None] * math.prod(shape) + cell).ravel(), minlength=len(confusion))
        if not kind.exclusive:
            matched += np.bincount(owner[((log_odds > 0) == own).all(1)], minlength=num_sites)
        probabilities, came_true = _predicted(log_odds, own, cell)
        place = np.minimum((probabilities * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        outcomes = (owner[:, None] * 2 + came_true) * CONFIDENCE_BINS + place
        reliability += np.bincount(outcomes.ravel(), minlength=len(reliability))
        places = owner[:, None] * CONFIDENCE_BINS + place
        confidence += np.bincount(places.ravel(), weights=probabilities.ravel(), minlength=len(confidence))
        index = bins.index(log_odds, kind=kind)
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
    """Return a head's predicted probabilities and whether each prediction is correct, as in `EvaluationSums`.

    Both are `[n, 1]`, for the predicted class, or `[n, C]` for multi-label rows.
    """
    classes = log_odds.shape[1]
    if cell.shape[1] == classes:
        return _sigmoid(log_odds), own
    predicted = cell % classes
    return _sigmoid(np.take_along_axis(log_odds, predicted, 1)), np.take_along_axis(own, predicted, 1)


def _sigmoid(log_odds: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(log_odds / 2))


_Counted = tuple[IntArray, IntArray, FloatArray, FloatArray]
"""Per row: whether it has each class `[n, C]`, its confusion cells `[n, 1]` or `[n, C]`, its log-odds (multi-label:
logits) `[n, C]`, and its loss `[n]`."""


def _count_classes(logits: FloatArray, labels: IntArray) -> _Counted:
    log_probabilities, log_odds = softmax_log_odds(logits)
    losses = -np.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    classes = logits.shape[1]
    own = (labels[:, None] == np.arange(classes)).astype(np.int64)
    cell = labels * classes + logits.argmax(1)
    # Rounding can leave a probability slightly above 1.
    return own, cell[:, None], log_odds, np.maximum(losses, 0)


def _count_labels(logits: FloatArray, labels: IntArray) -> _Counted:
    require_finite(logits)
    losses = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    cell = (np.arange(logits.shape[1]) * 2 + labels) * 2 + (logits > 0)
    return labels, cell, logits, losses.mean(1)


def _narrow(counts: IntArray) -> npt.NDArray[np.unsignedinteger[Any]]:
    return counts.astype(np.min_scalar_type(int(counts.max())))


def _checked_numbers(what: str, values: "IntArray | Tensor", shape: tuple[int, ...], limit: int) -> IntArray:
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be {list(shape)} integers, not {list(array.shape)} of {array.dtype}.")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
        raise ValueError(f"{what} must be from 0 to {limit - 1}, not from {array.min()} to {array.max()}.")
    return array.astype(np.int64, copy=False)
