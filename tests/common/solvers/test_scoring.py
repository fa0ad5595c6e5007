import numpy
import pytest
import torch
from sklearn.covariance import OAS
from torch import Tensor

from fedhead.errors import UserError
from fedhead.solvers.scoring import h_score, log_evidence, transferability
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import LABELS, VALUES

pytestmark = pytest.mark.usefixtures("one_thread")


def random_rows(seed: int, n: int, d: int, classes: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    means = spread * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + means[labels], labels


def informative_and_noise(n: int) -> tuple[Tensor, Tensor, Tensor]:
    features, labels = random_rows(3, n, 64, 10, 0.4)
    return features, labels, torch.randn(n, 2400, generator=torch.Generator().manual_seed(4))


def logme_by_rows(features: Tensor, targets: Tensor, iterations: int = 20_000) -> float:
    """The published equations on the rows, by the features' singular values, until nothing changes."""
    f = features.numpy()
    n, d = f.shape
    u, singular, _ = numpy.linalg.svd(f, full_matrices=False)
    s = singular**2
    evidences = []
    for y in targets.double().numpy().T:
        if not y.any():
            continue
        z = u.T @ y
        # What the features cannot reach; of no more rows than features, nothing.
        beyond = ((y - u @ z) ** 2).sum() if n > d else 0.0
        alpha = beta = 1.0
        for _ in range(iterations):
            gamma = (beta * s / (alpha + beta * s)).sum()
            m = beta * singular / (alpha + beta * s) * z
            residual = ((alpha / (alpha + beta * s) * z) ** 2).sum() + beyond
            freedom = (alpha / (alpha + beta * s)).sum() + n - len(s)
            before = alpha / beta
            alpha, beta = gamma / (m @ m), freedom / residual
            if abs(alpha / beta / before - 1) < 1e-12 or not 1e-14 * s.min() < alpha / beta < 1e14 * s.max():
                break
        m = beta * singular / (alpha + beta * s) * z
        residual = ((alpha / (alpha + beta * s) * z) ** 2).sum() + beyond
        determinant = numpy.log(alpha + beta * s).sum() + (d - len(s)) * numpy.log(alpha)
        evidences.append(
            n / 2 * numpy.log(beta)
            + d / 2 * numpy.log(alpha)
            - n / 2 * numpy.log(2 * numpy.pi)
            - beta / 2 * residual
            - alpha / 2 * (m @ m)
            - determinant / 2
        )
    return float(numpy.mean(evidences) / n)


@pytest.mark.parametrize(
    ("n", "d", "classes", "spread", "offset"),
    [
        (300, 20, 3, 0.5, 0),
        (300, 20, 3, 0, 0),  # nothing to find: alpha grows without end
        (300, 64, 5, 1, 100),
        (40, 40, 4, 1, 0),
        (50, 120, 3, 0, 0),
        (50, 120, 3, 1, 0),  # fitted perfectly: beta grows without end
        (40, 150, 4, 3, 5),
        (500, 50, 10, 0.1, 1),
        (30, 1, 2, 1, 0),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_logme_equals_published_iteration(
    n: int, d: int, classes: int, spread: float, offset: float, scale: float
) -> None:
    features, labels = random_rows(0, n, d, classes, spread)
    features = scale * (features + offset)
    expected = logme_by_rows(features, torch.nn.functional.one_hot(labels, classes))
    stats = FeatureStatistics.from_features(features, labels, classes)
    assert log_evidence(stats) == pytest.approx(expected, abs=1e-9)
    about_mean = FeatureStatistics.from_features(features, labels, classes, features.mean(0))
    assert log_evidence(about_mean) == pytest.approx(expected, abs=1e-9)


def test_logme_of_multi_label_rows() -> None:
    features, labels = random_rows(1, 100, 6, 4, 1.0)
    targets = torch.stack([labels == 0, labels > 1, labels > 9], 1)
    stats = FeatureStatistics.from_features(features, targets, 3, kind=LABELS)
    scores = transferability(stats)
    assert scores == {"logme": pytest.approx(logme_by_rows(features, targets), abs=1e-9)}


@pytest.mark.parametrize(("n", "d"), [(200, 10), (50, 120)])
def test_h_score_equals_sklearn_shrunk_covariance(n: int, d: int) -> None:
    features, labels = random_rows(2, n, d, 4, 1.0)
    features *= torch.logspace(-2, 2, d, dtype=torch.float64)
    x = features.numpy()
    x = (x - x.mean(0)) / x.std(0)
    oas = OAS(assume_centered=True).fit(x)
    means = numpy.stack([x[labels.numpy() == c].mean(0) for c in range(4)])
    between = numpy.cov(means[labels.numpy()].T, bias=True)
    expected = (1 - oas.shrinkage_) * numpy.trace(numpy.linalg.solve(oas.covariance_, between))
    stats = FeatureStatistics.from_features(features, labels, 4)
    assert h_score(stats) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (1000, 3000))])
def test_wide_noise_does_not_raise_h_score(n: int) -> None:
    features, labels, noise = informative_and_noise(n)
    informative = h_score(FeatureStatistics.from_features(features, labels, 10))
    useless = h_score(FeatureStatistics.from_features(noise, labels, 10))
    assert 0 <= useless < informative - 0.5
    assert informative <= 9


@pytest.mark.slow
def test_wide_noise_does_not_raise_logme() -> None:
    features, labels, noise = informative_and_noise(1000)
    informative = log_evidence(FeatureStatistics.from_features(features, labels, 10))
    assert informative > log_evidence(FeatureStatistics.from_features(noise, labels, 10)) + 0.05


def test_better_features_score_higher() -> None:
    scores = []
    for spread in (0.1, 0.3, 1.0):
        features, labels = random_rows(5, 500, 30, 5, spread)
        scores.append(transferability(FeatureStatistics.from_features(features, labels, 5)))
    for name in ("logme", "h_score"):
        values = [score[name] for score in scores]
        assert values == sorted(values)


def test_classes_without_rows_change_nothing() -> None:
    features, labels = random_rows(6, 100, 5, 3, 1.0)
    stats = FeatureStatistics.from_features(features, labels, 3)
    assert transferability(stats.copy().add_class()) == pytest.approx(transferability(stats))


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_constant_features_have_a_finite_score(value: float) -> None:
    stats = FeatureStatistics.from_features(torch.full((6, 2), value), torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    scores = transferability(stats)
    assert numpy.isfinite(scores["logme"])
    assert scores["h_score"] == 0


def test_a_perfect_feature_has_a_finite_score() -> None:
    labels = torch.tensor([0, 1] * 200)
    scores = transferability(FeatureStatistics.from_features(torch.stack([labels, 1 - labels], 1), labels, 2))
    assert numpy.isfinite(scores["logme"])
    assert scores["h_score"] == pytest.approx(1, abs=0.1)


def test_one_row_of_each_class() -> None:
    features, labels = random_rows(7, 4, 3, 4, 1.0)
    scores = transferability(FeatureStatistics.from_features(features, labels, 4))
    assert all(numpy.isfinite(list(scores.values())))


@pytest.mark.parametrize("labels", [[], [0, 0]])
def test_fewer_than_two_classes_are_rejected(labels: list[int]) -> None:
    stats = FeatureStatistics.from_features(torch.ones(len(labels), 2), torch.tensor(labels, dtype=torch.long), 2)
    with pytest.raises(UserError, match="at least two classes"):
        transferability(stats)


def test_logme_of_real_targets_is_independent_of_units() -> None:
    features, _ = random_rows(3, 80, 6, 4, 1.0)
    targets = features[:, :2] + torch.randn(80, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = [
        transferability(FeatureStatistics.from_features(features, 50 * targets * unit + 7, 2, kind=VALUES))
        for unit in (1.0, 1e-3)
    ]
    standardised = (targets - targets.mean(0)) / targets.std(0, correction=0)
    assert scores[0] == {"logme": pytest.approx(logme_by_rows(features, standardised), abs=1e-9)}
    assert scores[1] == {"logme": pytest.approx(scores[0]["logme"], abs=1e-9)}
    with pytest.raises(UserError, match="a target that varies"):
        transferability(FeatureStatistics.from_features(features, torch.ones(80, 1), 1, kind=VALUES))
