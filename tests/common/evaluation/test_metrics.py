import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax
from scipy.stats import binomtest, norm
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, recall_score, roc_auc_score

import fedhead.evaluation.metrics
import fedhead.sums.evaluation
from fedhead.evaluation.metrics import (
    ClassReport,
    Estimate,
    EvaluationReport,
    auroc_error_bound,
    aurocs,
    balanced_accuracy,
    reliability,
    report,
    roc_points,
    wilson_interval,
)
from fedhead.sums.evaluation import CONFIDENCE_BINS, EvaluationSums, sums_by_site
from fedhead.sums.score_bins import SCORE_BINS, ScoreBins
from fedhead.sums.targets import LABELS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def random_rows(seed: int, n: int, classes: int, signal: float = 1.5) -> tuple[FloatArray, IntArray]:
    """Draw labels of falling frequency, and logits that know something of them."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=0.7 ** np.arange(classes) / (0.7 ** np.arange(classes)).sum())
    return rng.normal(size=(n, classes)) + signal * np.eye(classes)[labels], labels


def one_against_rest(logits: FloatArray, number: int) -> FloatArray:
    return logits[:, number] - logsumexp(np.delete(logits, number, axis=1), axis=1)


def exact_areas(logits: FloatArray, labels: IntArray) -> FloatArray:
    classes = range(logits.shape[1])
    return np.array([roc_auc_score(labels == number, one_against_rest(logits, number)) for number in classes])


def value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def same_counts(first: EvaluationSums, second: EvaluationSums) -> bool:
    return (
        np.array_equal(first.confusion, second.confusion)
        and np.array_equal(first.scores, second.scores)
        and np.array_equal(first.reliability, second.reliability)
        and np.allclose(first.confidence, second.confidence, rtol=1e-12)
        and np.isclose(first.loss_sum, second.loss_sum, rtol=1e-12)
    )


def sums_of_scores(own: FloatArray, rest: FloatArray) -> EvaluationSums:
    """Count two classes whose scores are given: of class 1 against class 0."""
    log_odds = np.concatenate([own, rest])
    labels = np.repeat([1, 0], [len(own), len(rest)])
    return EvaluationSums.from_logits(
        np.stack([np.zeros_like(log_odds), log_odds], 1), labels, ScoreBins(np.zeros(2), np.ones(2))
    )


@pytest.mark.parametrize(("seed", "n", "classes"), [(0, 200, 2), (1, 2000, 3), (2, 3000, 10)])
def test_metrics_equal_scikit_learn(seed: int, n: int, classes: int) -> None:
    logits, labels = random_rows(seed, n, classes)
    predicted = logits.argmax(1)
    sums = EvaluationSums.from_logits(logits, labels)
    figures = report(sums, names(classes))
    assert figures.rows == n
    assert figures.loss == pytest.approx(log_loss(labels, softmax(logits, axis=1)))
    assert value(figures.accuracy) == pytest.approx(accuracy_score(labels, predicted))
    assert value(figures.balanced_accuracy) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert [value(each.sensitivity) for each in figures.classes] == pytest.approx(
        recall_score(labels, predicted, average=None).tolist()
    )
    for number, each in enumerate(figures.classes):
        assert each.rows == (labels == number).sum()
        assert value(each.specificity) == pytest.approx(recall_score(labels != number, predicted != number))
    exact = exact_areas(logits, labels)
    areas = np.array([value(each.auroc) for each in figures.classes])
    assert np.abs(areas - exact).max() < 0.002
    assert (np.abs(areas - exact) <= auroc_error_bound(sums)).all()
    # scikit-learn's average, of probabilities, has no multi-class form for two classes.
    if classes > 2:
        average = roc_auc_score(labels, softmax(logits, axis=1), multi_class="ovr", average="macro")
        assert value(figures.auroc) == pytest.approx(average, abs=0.001)


@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_areas_of_under_and_overconfident_heads(scale: float, classes: int) -> None:
    logits, labels = random_rows(3, 4000, classes)
    logits = logits * scale
    areas, _ = aurocs(EvaluationSums.from_logits(logits, labels))
    assert [value(each) for each in areas] == pytest.approx(exact_areas(logits, labels).tolist(), abs=0.004)


def test_ranking_of_probabilities_that_round_to_one() -> None:
    sums = sums_of_scores(np.linspace(60, 900, 20), np.linspace(50, 59, 20))
    assert value(aurocs(sums)[0][1]) == 1
    assert value(aurocs(sums)[0][0]) == 1


def least_squares_logits(seed: int, n: int, share: float) -> tuple[FloatArray, IntArray]:
    """Logits of a regression on class indicators: for a rare class they hardly differ, and their softmax less."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(np.int64)
    rows = np.column_stack([rng.normal(size=(n, 5)) + 0.4 * labels[:, None], np.ones(n)])
    weights = np.linalg.lstsq(rows, np.eye(2)[labels], rcond=None)[0]
    return rows @ weights, labels


def test_bins_from_moments_fit_logits_with_little_variance() -> None:
    logits, labels = least_squares_logits(4, 20000, 0.01)
    exact = exact_areas(logits, labels)
    bins = ScoreBins.from_moments(logits.mean(0), np.cov(logits.T))
    plain, fitted = EvaluationSums.from_logits(logits, labels), EvaluationSums.from_logits(logits, labels, bins)
    assert abs(value(aurocs(plain)[1]) - exact.mean()) > 0.02
    assert abs(value(aurocs(fitted)[1]) - exact.mean()) < 0.002
    assert auroc_error_bound(fitted).max() < 0.01 < 0.1 < auroc_error_bound(plain).min()


def test_moments_of_scores_from_moments_of_logits() -> None:
    rng = np.random.default_rng(5)
    mean, root = rng.normal(size=4), 0.01 * rng.normal(size=(4, 4))
    bins = ScoreBins.from_moments(mean, root @ root.T)
    logits = mean + rng.normal(size=(20000, 4)) @ root.T
    scores = np.stack([one_against_rest(logits, number) for number in range(4)], 1) + np.log(3)
    assert bins.centre == pytest.approx(scores.mean(0), abs=1e-3)
    assert bins.spread == pytest.approx(scores.std(0), rel=0.02)


def test_bins_from_moments_of_degenerate_heads() -> None:
    indifferent = ScoreBins.from_moments(np.zeros(3), np.zeros((3, 3)))
    assert indifferent.centre == pytest.approx(np.zeros(3))
    assert (indifferent.spread == ScoreBins.default(3).spread).all()
    absent = ScoreBins.from_moments(np.array([0.0, 0.0, -1e6]), np.diag([1.0, 1.0, 0.0]))
    assert np.isfinite(absent.centre).all()


def test_bins_are_monotonic_and_cover_every_score() -> None:
    bins = ScoreBins(np.array([0.0, 2.0]), np.array([0.1, 3.0]))
    scores = np.sort(np.random.default_rng(6).standard_cauchy(10000)) * 100
    index = bins.index(np.stack([scores, scores], 1))
    assert (np.diff(index, axis=0) >= 0).all()
    ends = bins.index(np.array([[-1e300, -1e300], [1e-12, 2 + 1e-12], [-1e-12, 2 - 1e-12], [1e300, 1e300]]))
    assert ends[:, 0].tolist() == ends[:, 1].tolist() == [0, SCORE_BINS // 2, SCORE_BINS // 2, SCORE_BINS - 1]


@pytest.mark.parametrize(
    ("centre", "spread", "words"),
    [
        (np.zeros(0), np.ones(0), "each column"),
        (np.zeros(2), np.ones(3), "each column"),
        (np.array([0, np.nan]), np.ones(2), "finite"),
        (np.zeros(2), np.array([1.0, 0.0]), "positive spreads"),
        (np.zeros(2), np.array([1.0, np.inf]), "finite"),
    ],
)
def test_invalid_bins_are_rejected(centre: FloatArray, spread: FloatArray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScoreBins(centre, spread)


def test_tensors_and_arrays_give_equal_counts() -> None:
    logits, labels = random_rows(7, 60, 4)
    tensor = torch.from_numpy(logits).float().bfloat16()
    expected = EvaluationSums.from_logits(tensor.double().numpy(), labels)
    assert same_counts(EvaluationSums.from_logits(tensor.requires_grad_(), torch.from_numpy(labels)), expected)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.zeros((2, 3, 4)), np.zeros(2, np.int64), "Logits must be"),
        (np.zeros((2, 1)), np.zeros(2, np.int64), "two or more classes"),
        (np.zeros((2, 3)), np.zeros(3, np.int64), "Labels must be"),
        (np.zeros((2, 3)), np.zeros(2), "integers"),
        (np.zeros((2, 3)), np.array([0, 3]), "from 0 to 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), "from 0 to 2"),
        (np.array([[0.0, np.nan]]), np.zeros(1, np.int64), "not finite"),
        (np.array([[0.0, np.inf]]), np.zeros(1, np.int64), "not finite"),
    ],
)
def test_invalid_rows_are_rejected(logits: FloatArray, labels: IntArray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationSums.from_logits(logits, labels)


def test_other_mismatches_are_rejected() -> None:
    logits, labels = random_rows(8, 5, 3)
    with pytest.raises(ValueError, match="Owners must be"):
        list(sums_by_site(logits, labels, np.full(5, 2), 2))
    with pytest.raises(ValueError, match="Bins for 4 classes"):
        EvaluationSums.from_logits(logits, labels, ScoreBins.default(4))
    with pytest.raises(ValueError, match="Cannot add"):
        EvaluationSums.zeros(3) + EvaluationSums.zeros(4)
    with pytest.raises(TypeError):
        1 + EvaluationSums.zeros(3)
    with pytest.raises(ValueError, match="zip"):
        report(EvaluationSums.zeros(3), names(2))


@pytest.mark.parametrize("room", [2**22, 5000, 1])
def test_batched_counts_equal_single_site_counts(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedhead.sums.evaluation, "_CHUNK_VALUES", room)
    logits, labels = random_rows(9, 150, 3)
    owners = np.random.default_rng(9).integers(1, 12, 150)
    bins = ScoreBins(np.array([0.1, 0.2, 0.3]), np.ones(3))
    sites = list(sums_by_site(logits, labels, owners, 14, bins))
    assert len(sites) == 14
    for number, sums in enumerate(sites):
        rows = owners == number
        assert same_counts(sums, EvaluationSums.from_logits(logits[rows], labels[rows], bins))
    assert sites[0].rows == sites[13].rows == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 60),
    classes=st.integers(2, 5),
    sites=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    drawn=st.randoms(use_true_random=False),
)
def test_report_is_independent_of_the_split(
    seed: int, n: int, classes: int, sites: int, scale: float, drawn: Any
) -> None:
    logits, labels = random_rows(seed, n, classes)
    logits = logits * scale
    owners = np.array([drawn.randrange(sites) for _ in range(n)], dtype=np.int64)
    pooled = EvaluationSums.from_logits(logits, labels)
    parts = list(sums_by_site(logits, labels, owners, sites))
    drawn.shuffle(parts)
    total = sum(parts)
    assert isinstance(total, EvaluationSums)
    assert same_counts(total, pooled)
    assert total.rows == n
    assert total.correct == (logits.argmax(1) == labels).sum()
    first, second = report(total, names(classes)).to_dict(), report(pooled, names(classes)).to_dict()
    assert first.pop("loss") == pytest.approx(second.pop("loss"))
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    for figures in [first, *first["classes"]]:
        for name, figure in figures.items():
            if isinstance(figure, list) and name != "classes":
                assert figure == [None] * 3 or 0 <= figure[0] <= 1
                assert figure == [None] * 3 or 0 <= figure[1] <= figure[0] + 1e-12 <= figure[2] + 2e-12 <= 1 + 3e-12


def test_sums_round_trip() -> None:
    logits, labels = random_rows(10, 100, 10)
    sent = EvaluationSums.from_logits(logits, labels)
    arrays = sent.to_arrays()
    assert same_counts(EvaluationSums.from_arrays(arrays, sent), sent)
    sizes = {name: array.nbytes for name, array in arrays.items()}
    assert sizes == {
        "confusion": 100,
        "scores": 10 * 2 * SCORE_BINS,
        "loss_sum": 8,
        "reliability": 40,
        "confidence": 160,
    }
    many = EvaluationSums(
        sent.confusion * 1000,
        sent.loss_sum * 1000,
        sent.scores * 1000,
        reliability=sent.reliability * 1000,
        confidence=sent.confidence * 1000,
    )
    assert {name: array.dtype.itemsize for name, array in many.to_arrays().items()} == {
        "confusion": 2,
        "loss_sum": 8,
        "scores": 2,
        "reliability": 2,
        "confidence": 8,
    }
    assert same_counts(EvaluationSums.from_arrays(many.to_arrays(), many), many)
    assert EvaluationSums.from_arrays(EvaluationSums.zeros(3).to_arrays(), EvaluationSums.zeros(3)).rows == 0


def tampered(**changes: Any) -> dict[str, Any]:
    logits, labels = random_rows(11, 30, 3)
    arrays = {**EvaluationSums.from_logits(logits, labels).to_arrays(), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (tampered(scores=None), "has the arrays confidence"),
        (tampered(more=np.zeros(1)), "has the arrays confidence"),
        (tampered(confusion=np.zeros((3, 3), np.int64)), "unsigned"),
        (tampered(confusion=np.zeros((3, 3), np.uint64)), "unsigned"),
        (tampered(confusion=np.full((3, 3), np.nan)), "unsigned"),
        (tampered(confusion=np.zeros((3, 4), np.uint8)), "unsigned"),
        (tampered(scores=np.zeros((3, 2, 7), np.uint8)), r"uint8\[3, 2, 7\]"),
        (tampered(confusion=np.ones((3, 3), np.uint8)), "different numbers of rows"),
        (tampered(scores=tampered()["scores"][:, ::-1]), "different numbers of rows"),
        (tampered(scores=tampered()["scores"][::-1]), "different numbers of rows"),
        (tampered(loss_sum=np.array([np.nan])), "loss_sum"),
        (tampered(loss_sum=np.array([np.inf])), "loss_sum"),
        (tampered(loss_sum=np.array([-1.0])), "loss_sum"),
        (tampered(loss_sum=np.zeros(2)), "loss_sum"),
        (tampered(loss_sum=np.zeros(1, np.float32)), "loss_sum"),
        (tampered(reliability=tampered()["reliability"][::-1]), "'reliability' and 'confusion'"),
        (tampered(reliability=tampered()["reliability"] + np.uint8(1)), "'reliability' and 'confusion'"),
        (tampered(confidence=tampered()["confidence"] * np.nan), "'confidence' is not 20 finite"),
        (tampered(confidence=tampered()["confidence"] + 0.1), "contradicts the probabilities"),
        ({**EvaluationSums.zeros(3).to_arrays(), "loss_sum": np.ones(1)}, "no rows"),
    ],
)
def test_impossible_counts_are_rejected(arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationSums.from_arrays(arrays, EvaluationSums.zeros(3))


def test_wilson_limits_equal_scipy() -> None:
    cases = [(0, 1), (1, 1), (0, 7), (3, 7), (7, 7), (48, 50), (1, 1000), (99999, 100000)]
    low, high = wilson_interval(*np.array(cases).T)
    for number, (successes, trials) in enumerate(cases):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        assert (low[number], high[number]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_undefined_metrics_of_a_class_without_rows() -> None:
    logits, labels = random_rows(12, 40, 3)
    labels[labels == 1] = 2
    figures = report(EvaluationSums.from_logits(logits, labels), ["flu", "measles", "none"])
    missing = figures.classes[1].to_dict()
    assert missing["sensitivity"] == missing["auroc"] == [None, None, None]
    assert missing["undefined"] == {"sensitivity": "No row has this class.", "auroc": "No row has this class."}
    assert value(figures.classes[1].specificity) > 0
    assert value(figures.balanced_accuracy) == pytest.approx(
        np.mean([value(figures.classes[number].sensitivity) for number in (0, 2)])
    )
    assert value(figures.auroc) == pytest.approx(np.mean([value(figures.classes[number].auroc) for number in (0, 2)]))


def test_undefined_metrics_of_one_class_and_of_no_rows() -> None:
    logits, _ = random_rows(13, 40, 2)
    alone = report(EvaluationSums.from_logits(logits, np.zeros(40, np.int64)), names(2))
    assert alone.classes[0].specificity == Estimate.undefined("Every row has this class.")
    assert alone.classes[0].auroc == Estimate.undefined("Every row has this class.")
    assert alone.auroc == Estimate.undefined("All rows have one class.")
    assert alone.balanced_accuracy.to_list() == pytest.approx(alone.accuracy.to_list())
    nothing = Estimate.undefined("There are no rows.")
    empty = Estimate.undefined("No row has this class.")
    assert report(EvaluationSums.zeros(2), ["a", "b"]) == EvaluationReport(
        0, None, nothing, nothing, nothing, tuple(ClassReport(name, 0, empty, nothing, empty) for name in "ab")
    )


def test_report_as_json() -> None:
    logits, labels = random_rows(14, 40, 2)
    written = report(EvaluationSums.from_logits(logits, labels), ["a", "b"]).to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert list(written) == ["rows", "loss", "accuracy", "balanced_accuracy", "auroc", "classes"]
    assert list(written["classes"][0]) == ["name", "rows", "sensitivity", "specificity", "auroc"]


def test_areas_of_two_classes_equal_their_mean() -> None:
    logits, labels = random_rows(15, 60, 2)
    (first, second), mean = aurocs(EvaluationSums.from_logits(logits, labels))
    assert first.to_list() == pytest.approx(second.to_list())
    assert first.to_list() == pytest.approx(mean.to_list())


def test_limits_of_perfect_and_useless_heads() -> None:
    perfect = aurocs(sums_of_scores(np.full(10, 5.0), np.full(30, -5.0)))[1]
    assert (perfect.value, perfect.high) == (1, 1)
    assert 0.7 < perfect.low < 0.9  # type: ignore[operator]
    inverted = aurocs(sums_of_scores(np.full(10, -5.0), np.full(30, 5.0)))[1]
    assert inverted.to_list() == pytest.approx([0, 0, 1 - perfect.low])  # type: ignore[operator]
    equal = aurocs(sums_of_scores(np.zeros(10), np.zeros(30)))[1]
    assert equal.value == 0.5
    assert holds(equal, 0.4)
    assert holds(equal, 0.6)


@pytest.mark.parametrize("area", [0.6, 0.893, 0.99])
def test_modelled_variance_equals_hanley_mcneil(area: float) -> None:
    own, rest, zeros = np.array([51.0]), np.array([58.0]), np.zeros(1)
    variance = fedhead.evaluation.metrics._AreaVariance(own, rest, zeros, zeros, weight=zeros)
    both_own, both_rest = area / (2 - area), 2 * area**2 / (1 + area)
    expected = area * (1 - area) + (own - 1) * (both_own - area**2) + (rest - 1) * (both_rest - area**2)
    assert sum(variance.parts(np.array([area]))) == pytest.approx(expected / (own * rest))
    mirrored = fedhead.evaluation.metrics._AreaVariance(rest, own, zeros, zeros, weight=zeros)
    assert sum(mirrored.parts(np.array([area]))) == pytest.approx(expected / (own * rest))


def test_variance_of_many_rows_equals_delong() -> None:
    rng = np.random.default_rng(16)
    own, rest = rng.normal(1, 2.5, 2000), rng.normal(0, 1, 3000)
    areas, variance = fedhead.evaluation.metrics._areas(sums_of_scores(own, rest).scores)
    rightly = (own[:, None] > rest).astype(np.float64)
    expected = rightly.mean(1).var(ddof=1) / len(own), rightly.mean(0).var(ddof=1) / len(rest)
    members, others = variance.parts(areas)
    assert areas[1] == pytest.approx(rightly.mean(), abs=1e-3)
    assert (members[1], others[1]) == pytest.approx(expected, rel=0.01)


REPLICATIONS = 400


@pytest.mark.parametrize(("rows", "share"), [(40, 0.9), (150, 0.5), (400, 0.97)])
def test_coverage_of_share_limits(rows: int, share: float) -> None:
    right = np.random.default_rng(17).binomial(rows, share, REPLICATIONS)
    low, high = wilson_interval(right, np.full(REPLICATIONS, rows))
    assert 0.92 <= np.mean((low <= share) & (share <= high)) <= 0.98


@pytest.mark.parametrize(
    ("counts", "shares"), [([30, 30], [0.9, 0.7]), ([200, 40, 15], [0.95, 0.8, 0.6]), ([20] * 10, [0.85] * 10)]
)
def test_coverage_of_balanced_accuracy_limits(counts: list[int], shares: list[float]) -> None:
    rng = np.random.default_rng(18)
    held = 0
    for _ in range(REPLICATIONS):
        right = rng.binomial(counts, shares)
        confusion = np.diag(right)
        confusion[:, 0] += np.array(counts) - right
        confusion[0] = [right[0], counts[0] - right[0], *[0] * (len(counts) - 2)]
        sums = EvaluationSums(confusion, 0.0, EvaluationSums.zeros(len(counts)).scores)
        held += holds(balanced_accuracy(sums), float(np.mean(shares)))
    assert 0.92 <= held / REPLICATIONS <= 0.98


@pytest.mark.parametrize(
    ("own", "rest", "area", "spread"),
    [
        (40, 80, 0.8, 2.0),
        *(
            pytest.param(*figures, marks=pytest.mark.slow)
            for figures in ((20, 200, 0.85, 1.0), (60, 60, 0.9, 1.0), (30, 120, 0.7, 0.7))
        ),
    ],
)
def test_coverage_of_area_limits(own: int, rest: int, area: float, spread: float) -> None:
    rng = np.random.default_rng(19)
    distance = norm.ppf(area) * np.hypot(spread, 1)
    scores = np.hstack(
        [rng.normal(distance, spread, (REPLICATIONS, own)), rng.normal(0, 1, (REPLICATIONS, rest))]
    ).ravel()
    labels = np.tile(np.repeat([1, 0], [own, rest]), REPLICATIONS)
    owners = np.repeat(np.arange(REPLICATIONS), own + rest)
    logits = np.stack([np.zeros_like(scores), scores], 1)
    held = [holds(aurocs(sums)[1], area) for sums in sums_by_site(logits, labels, owners, REPLICATIONS)]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize(("classes", "n", "signal"), [(3, 150, 1.0), pytest.param(5, 300, 1.5, marks=pytest.mark.slow)])
def test_coverage_of_mean_area_limits(classes: int, n: int, signal: float) -> None:
    truth = exact_areas(*random_rows(20, 60_000, classes, signal)).mean()
    sites = np.repeat(np.arange(REPLICATIONS), n)
    logits, labels = random_rows(21, REPLICATIONS * n, classes, signal)
    held = [holds(aurocs(sums)[1], truth) for sums in sums_by_site(logits, labels, sites, REPLICATIONS)]
    assert 0.93 <= np.mean(held) <= 0.99


def random_marks(seed: int, n: int, classes: int) -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(seed)
    marks = (rng.random((n, classes)) < np.linspace(0.2, 0.6, classes)).astype(np.int64)
    return rng.normal(size=(n, classes)) + 2 * marks - 1, marks


def test_multi_label_metrics_equal_sklearn_per_class() -> None:
    logits, marks = random_marks(0, 400, 4)
    sums = EvaluationSums.from_logits(logits, marks, kind=LABELS)
    figures = report(sums, names(4))
    predicted = logits > 0
    assert (sums.rows, sums.correct) == (400, int((predicted == marks).all(1).sum()))
    assert value(figures.accuracy) == pytest.approx(accuracy_score(marks, predicted))
    low, high = wilson_interval(np.array([sums.correct]), np.array([400]))
    assert (figures.accuracy.low, figures.accuracy.high) == (low[0], high[0])
    loss = torch.nn.BCEWithLogitsLoss()(torch.from_numpy(logits), torch.from_numpy(marks).double())
    assert figures.loss == pytest.approx(loss.item())
    areas = [roc_auc_score(marks[:, number], logits[:, number]) for number in range(4)]
    assert value(figures.auroc) == pytest.approx(np.mean(areas), abs=2e-3)
    for number, one in enumerate(figures.classes):
        assert one.rows == marks[:, number].sum()
        assert value(one.sensitivity) == pytest.approx(recall_score(marks[:, number], predicted[:, number]))
        assert value(one.specificity) == pytest.approx(recall_score(1 - marks[:, number], 1 - predicted[:, number]))
        assert value(one.auroc) == pytest.approx(areas[number], abs=2e-3)
    assert figures.to_dict()["undefined"] == {"balanced_accuracy": "Rows may have several classes."}


def test_mean_auroc_of_identical_classes_keeps_the_interval() -> None:
    logits, marks = random_marks(1, 200, 3)
    (one, *_), mean = aurocs(EvaluationSums.from_logits(logits[:, [0] * 5], marks[:, [0] * 5], kind=LABELS))
    assert mean.to_list() == pytest.approx(one.to_list())


def test_multi_label_counts_add_and_round_trip() -> None:
    logits, marks = random_marks(2, 150, 3)
    owners = np.random.default_rng(2).integers(1, 6, 150)
    pooled = EvaluationSums.from_logits(logits, marks, kind=LABELS)
    parts = list(sums_by_site(logits, marks, owners, 7, kind=LABELS))
    received = [EvaluationSums.from_arrays(part.to_arrays(), pooled) for part in parts]
    total = sum(received, EvaluationSums.zeros(3, kind=LABELS))
    assert same_counts(total, pooled)
    assert total.matched == pooled.matched > 0
    assert parts[0].rows == 0
    with pytest.raises(ValueError, match="multi-label and single-label rows"):
        pooled + EvaluationSums.zeros(3)


def test_bins_from_moments_fit_multi_label_logits() -> None:
    logits, _ = random_marks(3, 500, 3)
    bins = ScoreBins.from_moments(logits.mean(0), np.cov(logits.T), kind=LABELS)
    assert bins.centre == pytest.approx(logits.mean(0))
    assert bins.spread == pytest.approx(logits.std(0, ddof=1))


def tampered_marks(**changes: Any) -> dict[str, Any]:
    arrays = EvaluationSums.from_logits(*random_marks(4, 40, 3), kind=LABELS).to_arrays()
    return {**arrays, **changes}


def test_contradictory_multi_label_counts_are_rejected() -> None:
    good = tampered_marks()
    wrong = good["confusion"].copy()
    wrong[0, 0, 0] += 1
    for arrays, words in [
        (tampered_marks(matched=np.array([41], np.uint8)), "'matched' contradicts"),
        (tampered_marks(confusion=wrong), "different numbers of rows for different classes"),
        (tampered_marks(confusion=good["confusion"][:, ::-1].copy()), "'scores' and 'confusion'"),
        (
            {name: array for name, array in good.items() if name != "matched"},
            "has the arrays confidence, .*matched",
        ),
        (EvaluationSums.zeros(3).to_arrays(), "has the arrays confidence, .*matched"),
    ]:
        with pytest.raises(ValueError, match=words):
            EvaluationSums.from_arrays(arrays, EvaluationSums.zeros(3, kind=LABELS))


@pytest.mark.parametrize("marks", [np.full((5, 3), 2), np.zeros((5, 2), np.int64), np.zeros((5, 3))])
def test_multi_labels_other_than_zero_and_one_are_rejected(marks: IntArray) -> None:
    with pytest.raises(ValueError, match="Labels must be"):
        EvaluationSums.from_logits(np.zeros((5, 3)), marks, kind=LABELS)


def test_reliability_of_known_probabilities() -> None:
    logits, labels = random_rows(12, 5000, 4)
    probabilities = softmax(logits, axis=1)
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((top * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    found = reliability(EvaluationSums.from_logits(logits, labels))
    error = 0.0
    for bin_ in range(CONFIDENCE_BINS):
        inside = place == bin_
        assert found.rows[bin_] == inside.sum()
        if not inside.any():
            assert found.confidence[bin_] is None and found.frequency[bin_].value is None
            continue
        assert found.confidence[bin_] == pytest.approx(top[inside].mean())
        assert value(found.frequency[bin_]) == pytest.approx(right[inside].mean())
        error += inside.mean() * abs(top[inside].mean() - right[inside].mean())
    assert found.error == pytest.approx(error)
    assert reliability(EvaluationSums.zeros(3)).error is None


def test_multi_label_reliability_counts_every_label() -> None:
    logits, marks = random_marks(6, 400, 3)
    probabilities = expit(logits)
    found = reliability(EvaluationSums.from_logits(logits, marks, kind=LABELS))
    inside = (probabilities >= 0.5) & (probabilities < 0.55)
    assert sum(found.rows) == 1200
    assert found.rows[10] == inside.sum() > 0
    assert value(found.frequency[10]) == pytest.approx(marks[inside].mean())


@pytest.mark.parametrize("seed", range(5))
def test_area_under_roc_points_equals_auroc(seed: int) -> None:
    logits, labels = random_rows(seed, 300, 3)
    sums = EvaluationSums.from_logits(logits, labels)
    areas, _ = aurocs(sums)
    for area, points in zip(areas, roc_points(sums), strict=True):
        assert points is not None
        assert points[0].tolist() == [0, 0] and points[-1].tolist() == [1, 1]
        assert (np.diff(points, axis=0) >= 0).all()
        assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(value(area))
    assert roc_points(EvaluationSums.zeros(2)) == (None, None)
