from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers.closed_form import (
    negligible_eigenvalue,
    positive_spectrum,
    shrink_correlation,
    solve_head,
    solve_positive,
    solve_prototypes,
    solvers,
)
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import LABELS

METHODS = ["lda", "ridge", "nearest-mean"]


def random_rows(
    seed: int, n: int, d: int, classes: int, spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Correlated rows, the first `classes` of them one of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    means = spread * torch.randn(classes, d, generator=generator, dtype=dtype)
    mixing = torch.randn(d, d, generator=generator, dtype=dtype) / d**0.5 + torch.eye(d, dtype=dtype)
    return torch.randn(n, d, generator=generator, dtype=dtype) @ mixing + means[labels], labels


def problem(seed: int, n: int = 60, d: int = 5, classes: int = 3) -> FeatureStatistics:
    return FeatureStatistics.from_features(*random_rows(seed, n, d, classes), classes)


def one_hot(labels: Tensor, classes: int) -> numpy.ndarray:
    return torch.nn.functional.one_hot(labels, classes).double().numpy()


def about_first(logits: Tensor) -> Tensor:
    """Log-odds against the first class: what logits say, without what all classes share."""
    return logits - logits[:, :1]


def lda_by_rows(features: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, float]:
    """LDA's logits of its own rows, from the rows and a dense inverse, and the shrinkage."""
    x, y = features.double().numpy(), labels.numpy()
    means = numpy.stack([x[y == c].mean(0) for c in range(len(priors))])
    centred = x - means[y]
    deviation = centred.std(0)
    oas = OAS(assume_centered=True).fit(centred / deviation)
    covariance = oas.covariance_ * numpy.outer(deviation, deviation)
    weight = numpy.linalg.solve(covariance, means.T)
    bias = -0.5 * numpy.einsum("cd,dc->c", means, weight) + priors.log().numpy()
    return torch.from_numpy(x @ weight + bias), float(oas.shrinkage_)


@pytest.mark.parametrize(("n", "d", "classes"), [(200, 6, 3), (40, 39, 4), (30, 100, 5), (500, 2, 2), (60, 1, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lda_equals_sklearns_oas_and_a_dense_solve(seed: int, n: int, d: int, classes: int) -> None:
    features, labels = random_rows(seed, n, d, classes)
    stats = FeatureStatistics.from_features(features, labels, classes)
    logits, shrinkage = lda_by_rows(features, labels, torch.bincount(labels).double() / n)
    if d > 1:  # of one feature sklearn has shrinkage 0, which comes to the same
        assert shrink_correlation(stats.within_scatter(), stats).shrinkage == pytest.approx(shrinkage, rel=1e-10)
    torch.testing.assert_close(
        about_first(solve_head(stats, "lda")(features)), about_first(logits), rtol=1e-9, atol=1e-9
    )


def test_lda_with_large_means_and_small_deviations() -> None:
    features, labels = random_rows(2, 300, 8, 3)
    far = 100 + 0.01 * features
    logits, _ = lda_by_rows(far - 100, labels, torch.bincount(labels).double() / 300)
    stats = FeatureStatistics.from_features(far, labels, 3, torch.full((8,), 100.0))
    torch.testing.assert_close(about_first(solve_head(stats, "lda")(far)), about_first(logits), rtol=1e-8, atol=1e-8)
    about_zero = FeatureStatistics.from_features(far, labels, 3)
    torch.testing.assert_close(
        about_first(solve_head(about_zero, "lda")(far)), about_first(logits), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("priors", ["uniform", [1.0, 2.0, 7.0], torch.tensor([0.1, 0.2, 0.7])])
def test_lda_takes_priors(priors: str | list[float] | Tensor) -> None:
    features, labels = random_rows(3, 100, 4, 3)
    stats = FeatureStatistics.from_features(features, labels, 3)
    chances = torch.ones(3) if isinstance(priors, str) else torch.as_tensor(priors)
    logits, _ = lda_by_rows(features, labels, chances.double())
    torch.testing.assert_close(
        about_first(solve_head(stats, "lda", priors=priors)(features)), about_first(logits), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("priors", ["equal", [1.0, 2.0], [1.0, 2.0, 0.0], [1.0, -2.0, 1.0], [1, 2, float("nan")]])
def test_lda_rejects_invalid_priors(priors: object) -> None:
    with pytest.raises(UserError, match="priors must be"):
        solve_head(problem(4), "lda", priors=priors)


def test_priors_of_classes_without_rows_do_not_matter() -> None:
    stats = problem(5).add_class()
    first = solve_head(stats, "lda", priors=[1, 2, 3, 0])
    second = solve_head(stats, "lda", priors=[1, 2, 3, 9])
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "d", "spread"), [(300, 20, 1.0), (100, 200, 1.0), (1000, 20, 1.0), (200, 50, 0.8)])
def test_lda_predicts_as_sklearns_shrunk_lda(seed: int, n: int, d: int, spread: float) -> None:
    features, labels = random_rows(seed, n + 1000, d, 5, spread)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features[:n], labels[:n])
    head = solve_head(FeatureStatistics.from_features(features[:n], labels[:n], 5))
    for rows in (features[:n], features[n:]):
        agreement = (head(rows).argmax(1).numpy() == reference.predict(rows.numpy())).mean()
        assert agreement >= 0.97


def test_lda_matches_sklearn_on_overlapping_classes() -> None:
    advantage = []
    for seed in range(6):
        features, labels = random_rows(seed, 2300, 20, 5, spread=0.6)
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features[:300], labels[:300])
        head = solve_head(FeatureStatistics.from_features(features[:300], labels[:300], 5))
        right = (head(features[300:]).argmax(1) == labels[300:]).double().mean()
        advantage.append(float(right) - reference.score(features[300:], labels[300:]))
    assert min(advantage) > 0


def test_lda_logits_are_calibrated() -> None:
    features, labels = random_rows(6, 40_000, 10, 4, spread=0.5)
    head = solve_head(FeatureStatistics.from_features(features[:20_000], labels[:20_000], 4))
    chances = head(features[20_000:]).softmax(1).detach()
    right = torch.nn.functional.one_hot(labels[20_000:], 4).double()
    for low in numpy.arange(0, 1, 0.1):
        inside = (chances >= low) & (chances < low + 0.1)
        error = (right[inside].mean() - chances[inside].mean()).abs()
        assert float(error) < 4 * 0.5 / int(inside.sum()) ** 0.5 + 0.005


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("n", "d"), [(100, 7), (30, 60)])
def test_ridge_equals_sklearns(penalty: float, n: int, d: int) -> None:
    features, labels = random_rows(7, n, d, 4)
    head = solve_head(FeatureStatistics.from_features(features, labels, 4), "ridge", penalty=penalty)
    reference = Ridge(alpha=penalty, solver="svd").fit(features.numpy(), one_hot(labels, 4))
    numpy.testing.assert_allclose(head.weight.detach(), reference.coef_, rtol=1e-9, atol=1e-10)
    numpy.testing.assert_allclose(head.bias.detach(), reference.intercept_, rtol=1e-9, atol=1e-10)


def test_ridge_on_multi_label_rows_equals_sklearns_classifier() -> None:
    features, labels = random_rows(8, 100, 6, 4)
    targets = (features @ torch.randn(6, 3, dtype=torch.float64) > 0.5) | (labels == 0)[:, None]
    stats = FeatureStatistics.from_features(features, targets, 3, kind=LABELS)
    head = solve_head(stats, "ridge", penalty=2.0)
    reference = RidgeClassifier(alpha=2.0).fit(features.numpy(), targets.long().numpy())
    numpy.testing.assert_allclose(head.weight.detach(), reference.coef_, rtol=1e-9, atol=1e-10)
    numpy.testing.assert_allclose(head.bias.detach(), reference.intercept_, rtol=1e-9, atol=1e-10)
    assert numpy.array_equal(head(features) > 0, reference.predict(features.numpy()) == 1)


def test_ridge_without_penalty_is_least_squares_of_least_norm() -> None:
    features, labels = random_rows(9, 50, 4, 3)
    doubled = torch.cat([features, features, torch.ones(50, 1)], 1)
    head = solve_head(FeatureStatistics.from_features(doubled, labels, 3), "ridge", penalty=0)
    centred = (doubled - doubled.mean(0)).numpy()
    weight = numpy.linalg.lstsq(centred, one_hot(labels, 3), rcond=1e-10)[0].T
    numpy.testing.assert_allclose(head.weight.detach(), weight, rtol=1e-8, atol=1e-10)


def test_ridge_with_tiny_penalty_stays_finite() -> None:
    features, labels = random_rows(10, 50, 4, 3)
    doubled = torch.cat([features, features], 1)
    stats = FeatureStatistics.from_features(doubled, labels, 3)
    tiny = solve_head(stats, "ridge", penalty=1e-200)
    none = solve_head(stats, "ridge", penalty=0)
    torch.testing.assert_close(tiny.weight, none.weight)


def gcv_by_rows(features: Tensor, targets: numpy.ndarray, penalty: float) -> float:
    """The score as published, from the hat matrix of all rows."""
    x = features.numpy() - features.numpy().mean(0)
    n = len(x)
    hat = x @ numpy.linalg.solve(x.T @ x + penalty * numpy.eye(x.shape[1]), x.T) + 1 / n
    left = numpy.eye(n) - hat
    return float(n * ((left @ targets) ** 2).sum() / numpy.trace(left) ** 2)


@pytest.mark.parametrize(("n", "d", "spread"), [(80, 10, 1.0), (80, 10, 0.1), (40, 60, 1.0), (80, 30, 0.3)])
def test_ridge_chooses_the_penalty_of_the_least_gcv_score(n: int, d: int, spread: float) -> None:
    features, labels = random_rows(11, n, d, 4, spread)
    stats = FeatureStatistics.from_features(features, labels, 4)
    values, _ = positive_spectrum(stats.scatter(), negligible_eigenvalue(stats))
    grid = numpy.logspace(-8, 2, 101) * float(values.max())
    tried = [penalty for penalty in grid if penalty > 1e-6]  # the hat matrix itself fails below
    best = min(tried, key=lambda penalty: gcv_by_rows(features, one_hot(labels, 4), penalty))
    assert tried[0] < best
    chosen = solve_head(stats, "ridge")
    expected = solve_head(stats, "ridge", penalty=best)
    torch.testing.assert_close(chosen.weight, expected.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(chosen.bias, expected.bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_ridge_rejects_invalid_penalties(penalty: float) -> None:
    with pytest.raises(UserError, match="0 or more"):
        solve_head(problem(12), "ridge", penalty=penalty)


def test_ridge_logits_sum_to_one() -> None:
    features, labels = random_rows(13, 100, 5, 3)
    head = solve_head(FeatureStatistics.from_features(features, labels, 3), "ridge")
    torch.testing.assert_close(head(features).sum(1), torch.ones(100, dtype=torch.float64))


def test_nearest_mean_is_nearest_mean() -> None:
    features, labels = random_rows(14, 200, 6, 4, spread=0.5)
    head = solve_head(FeatureStatistics.from_features(features, labels, 4), "nearest-mean")
    reference = NearestCentroid().fit(features.numpy(), labels.numpy())
    assert numpy.array_equal(head(features).argmax(1), reference.predict(features.numpy()))
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    variance = ((features - means[labels]) ** 2).mean()
    distances = torch.cdist(features, means) ** 2
    torch.testing.assert_close(about_first(head(features)), about_first(-0.5 * distances / variance))


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_rows_is_never_predicted(method: str) -> None:
    features, labels = random_rows(15, 60, 4, 3)
    with_gap = labels + (labels > 0)  # no rows of class 1
    stats = FeatureStatistics.from_features(features, with_gap, 5)
    head = solve_head(stats, method)
    before = solve_head(FeatureStatistics.from_features(features, labels, 3), method)
    present = torch.tensor([0, 2, 3])
    torch.testing.assert_close(head(features)[:, present], before(features))
    generator = torch.Generator().manual_seed(0)
    for far in (0.0, 1.0, 1e3, 1e6):
        rows = features.mean(0) + far * torch.randn(500, 4, generator=generator, dtype=torch.float64)
        assert set(head(rows).argmax(1).tolist()) <= {0, 2, 3}
        if method != "ridge":
            assert float(head(rows).detach().softmax(1)[:, [1, 4]].max()) < 1e-13


@pytest.mark.parametrize("method", ["lda", "nearest-mean"])
def test_a_class_without_rows_survives_folding_and_can_be_trained(method: str) -> None:
    features, labels = random_rows(16, 60, 4, 3)
    labels_seen = labels * 2  # no rows of classes 1 and 3
    stats = FeatureStatistics.from_features(features, labels_seen, 5)
    head = solve_head(stats, method).float()
    rows = features.float()
    logits = head(rows).detach()
    # As rounds do: make it a head for standardised features, train, and fold back.
    head.fold(-stats.mean().float() / stats.scale().float(), 1 / stats.scale().float())
    standardised = (rows - stats.mean().float()) / stats.scale().float()
    torch.testing.assert_close(head(standardised), logits, rtol=1e-4, atol=1e-3)
    rows_of_new_class = standardised + 8
    optimiser = torch.optim.SGD(head.parameters(), lr=0.3)
    for _ in range(60):
        inputs = torch.cat([standardised, rows_of_new_class])
        targets = torch.cat([labels_seen, torch.full((60,), 1)])
        loss = torch.nn.functional.cross_entropy(head(inputs), targets)
        assert bool(loss.isfinite())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((head(rows_of_new_class).argmax(1) == 1).float().mean()) > 0.95
    assert int((head(standardised).argmax(1) == 3).sum()) == 0


def assert_finite(head: LinearHead) -> None:
    assert bool(head.weight.float().isfinite().all())
    assert bool(head.bias.float().isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_constant_features_have_zero_weight(method: str) -> None:
    features, labels = random_rows(17, 60, 4, 3)
    features[:, 1] = 100.1
    features[:, 2] = 0
    head = solve_head(FeatureStatistics.from_features(features, labels, 3), method)
    assert_finite(head)
    assert float(head.weight[:, 1:3].detach().abs().max()) < 1e-9
    others = [0, 3]
    without = solve_head(FeatureStatistics.from_features(features[:, others], labels, 3), method)
    assert torch.equal(head(features).argmax(1), without(features[:, others]).argmax(1))
    if method == "lda":
        assert float(head.weight[:, 1:3].detach().abs().max()) == 0
        torch.testing.assert_close(head(features), without(features[:, others]))


@pytest.mark.parametrize("method", METHODS)
def test_all_features_constant(method: str) -> None:
    stats = FeatureStatistics.from_features(torch.full((4, 2), 7.3), torch.tensor([0, 0, 0, 1]), 2)
    head = solve_head(stats, method)
    assert_finite(head)
    assert float(head.weight.detach().abs().max()) == 0
    if method == "lda":
        torch.testing.assert_close(head.bias.softmax(0), torch.tensor([0.75, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [1, 3, 50])
def test_one_row_of_each_class_is_its_own_best_guess(method: str, d: int) -> None:
    features = torch.randn(4, d, generator=torch.Generator().manual_seed(18), dtype=torch.float64) * 3
    labels = torch.arange(4)
    head = solve_head(FeatureStatistics.from_features(features, labels, 4), method)
    assert_finite(head)
    if method != "ridge" or d > 1:  # a regression on one feature cannot set four classes apart
        assert torch.equal(head(features).argmax(1), labels)


@pytest.mark.parametrize("method", METHODS)
def test_more_features_than_rows_and_singular_scatter(method: str) -> None:
    features, labels = random_rows(19, 30, 3, 3)
    wide = torch.cat([features, features, features.sum(1, keepdim=True)] * 20, 1)
    head = solve_head(FeatureStatistics.from_features(wide, labels, 3), method)
    assert_finite(head)
    assert float((head(wide).argmax(1) == labels).double().mean()) > 0.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [[], [1], [1, 1, 1]])
def test_fewer_than_two_classes_are_rejected(method: str, labels: list[int]) -> None:
    stats = FeatureStatistics.from_features(torch.randn(len(labels), 3), torch.tensor(labels, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="at least two classes"):
        solve_head(stats, method)
    with pytest.raises(ValueError, match="at least two classes"):
        solve_prototypes(stats)


def test_multi_label_rows() -> None:
    features = torch.randn(6, 3)
    targets = torch.tensor([[1, 0, 1]] * 3 + [[1, 0, 0]] * 3)
    stats = FeatureStatistics.from_features(features, targets, 3, kind=LABELS)
    for method in ("lda", "nearest-mean"):
        with pytest.raises(UserError, match="use 'ridge'"):
            solve_head(stats, method)
    head = solve_head(stats, "ridge", penalty=1.0)
    assert bool((head(features.double())[:, 0] > 0).all())  # all rows have it
    assert bool((head(features.double())[:, 1] < 0).all())  # none has
    constant = FeatureStatistics.from_features(features, targets[:, :2], 2, kind=LABELS)
    with pytest.raises(UserError, match="some but not all of the 6 rows"):
        solve_head(constant, "ridge")
    one_class = FeatureStatistics.from_features(features, targets[:, 2:], 1, kind=LABELS)
    assert_finite(solve_head(one_class, "ridge"))


def test_solvers_are_chosen_by_name() -> None:
    assert {"hazards", "lda", "lda-gcv", "nearest-mean", "ridge"} <= set(solvers)
    with pytest.raises(UserError, match="Did you mean 'ridge'"):
        solve_head(problem(20), "rigde")
    with pytest.raises(UserError, match="'lda' takes 'priors', not 'penalty'"):
        solve_head(problem(20), "lda", penalty=1.0)
    with pytest.raises(UserError, match="'nearest-mean' takes no parameters, not 'x'"):
        solve_head(problem(20), "nearest-mean", x=1)


@pytest.mark.parametrize("method", METHODS)
def test_solving_does_not_modify_statistics(method: str) -> None:
    stats = problem(21)
    before = stats.copy().to_tensors()
    head = solve_head(stats, method)
    assert head.weight.dtype == torch.float64
    assert all(torch.equal(tensor, before[name]) for name, tensor in stats.to_tensors().items())


def test_an_indefinite_matrix_is_raised_to_its_least_eigenvalue() -> None:
    vectors = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    matrix = vectors @ torch.tensor([1.0, 0.5, -1e-9], dtype=torch.float64).diag() @ vectors.T
    expected = vectors @ torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64).diag() @ vectors.T
    torch.testing.assert_close(solve_positive(matrix, torch.eye(3, dtype=torch.float64), 0.1), expected)


def test_prototypes_are_unit_class_means_about_the_mean() -> None:
    features, labels = random_rows(22, 60, 8, 3)
    features[:, 3] = 5.5
    stats = FeatureStatistics.from_features(features, labels, 3).add_class()
    prototypes = solve_prototypes(stats)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)]) - features.mean(0)
    torch.testing.assert_close(prototypes[:3], torch.nn.functional.normalize(means, dim=1))
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(4, dtype=torch.float64))
    standardised = solve_prototypes(stats, stats.scale())
    torch.testing.assert_close(standardised[:3], torch.nn.functional.normalize(means / stats.scale(), dim=1))
    constant = FeatureStatistics.from_features(torch.full((5, 8), 0.1), torch.tensor([0, 0, 1, 1, 1]), 2)
    torch.testing.assert_close(solve_prototypes(constant).norm(dim=1), torch.ones(2, dtype=torch.float64))


RECIPES = [("lda", {}), ("ridge", {"penalty": 1e-2}), ("ridge", {}), ("nearest-mean", {})]
BOUND = 1e6


def condition(stats: FeatureStatistics, method: str) -> float:
    """The condition number of what the method inverts, where not singular, and of centring the features."""
    if method == "ridge":
        matrix, smallest, left = stats.scatter(), negligible_eigenvalue(stats), stats.scatter().diagonal()
    else:
        left = stats.within_scatter().diagonal()
        matrix, smallest = shrink_correlation(stats.within_scatter(), stats).matrix, 0.0
    values, _ = positive_spectrum(matrix, smallest)
    return max(float(values.max() / values.min()), float((stats.gram().diagonal() / left).max()))


def assert_same_head(first: FeatureStatistics, second: FeatureStatistics, rows: Tensor, recipe) -> None:
    """To 1e-8 of the largest logit, for condition numbers up to a million."""
    method, parameters = recipe
    assume(condition(second, method) <= BOUND)
    expected = solve_head(second, method, **parameters)(rows).detach()
    difference = (solve_head(first, method, **parameters)(rows) - expected).detach().abs().max()
    assert float(difference) <= 1e-8 * max(float(expected.abs().max()), 1.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(6, 60),
    d=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    recipe=st.sampled_from(RECIPES),
)
def test_head_is_independent_of_sites_and_their_order(seed: int, n: int, d: int, cuts: list[int], recipe) -> None:
    features, labels = random_rows(seed, n, d, 3)
    generator = torch.Generator().manual_seed(seed)
    features *= 10 ** (2 * torch.rand(d, generator=generator) - 1)
    features += 30 * features.std(0) * torch.rand(d, generator=generator)
    pooled = FeatureStatistics.from_features(features, labels, 3)
    order = torch.randperm(n, generator=generator)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    sites = [order[start:stop] for start, stop in pairwise(edges)]
    parts = [FeatureStatistics.from_features(features[site], labels[site], 3) for site in sites]
    assert_same_head(sum(parts), pooled, features, recipe)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), leaving=st.integers(0, 200), d=st.integers(1, 8), recipe=st.sampled_from(RECIPES))
def test_head_after_leaving_equals_head_without_the_site(seed: int, leaving: int, d: int, recipe) -> None:
    features, labels = random_rows(seed, 240, d, 3)
    staying = 240 - leaving
    remaining = FeatureStatistics.from_features(features[:staying], labels[:staying], 3)
    left = FeatureStatistics.from_features(features[staying:], labels[staying:], 3)
    everything = FeatureStatistics.from_features(features, labels, 3)
    assert_same_head(everything - left, remaining, features, recipe)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), recipe=st.sampled_from(RECIPES))
def test_classes_added_later(seed: int, recipe) -> None:
    features, labels = random_rows(seed, 60, 4, 3)
    old = labels < 2
    first = FeatureStatistics.from_features(features[old], labels[old], 2)
    second = FeatureStatistics.from_features(features[~old], labels[~old], 3)
    pooled = FeatureStatistics.from_features(features, labels, 3)
    assert_same_head(first.add_class() + second, pooled, features, recipe)


def test_float32_noise_counts_as_constant() -> None:
    features, labels = random_rows(12, 200, 4, 3)
    generator = torch.Generator().manual_seed(1)
    noise = 1e-9 * torch.randn(200, 1, generator=generator, dtype=features.dtype)
    plain = FeatureStatistics.from_features(features, labels, 3)
    noisy = FeatureStatistics.from_features(torch.cat([features, noise], 1), labels, 3)
    head = solve_head(noisy, "lda")
    assert head.weight[:, 4].tolist() == [0, 0, 0]
    torch.testing.assert_close(head.weight[:, :4], solve_head(plain, "lda").weight)
    assert float(noisy.scale()[4]) == 1
