import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import ImageOps
from scipy.stats import binomtest
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.data import KeyArray, held_out, load_samples
from fedhead.errors import UserError
from fedhead.evaluation.class_diagnosis import diagnose
from fedhead.evaluation.comparison import HEADS, compare, heads_to_compare, joint_counts
from fedhead.evaluation.diagnosis import SiteDiagnosis
from fedhead.evaluation.shift import MIN_CLASS_ROWS, MIN_DISTANCE, shift, shifts
from fedhead.features.store import FeatureStore
from fedhead.heads import LinearHead
from fedhead.simulations.partition import divide
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import LABELS

SITES = 10
UNLIKE = ("images look different", "classes look exchanged", "labels look wrong")
CLASSES = tuple(map(str, range(10)))


class Digits(NamedTuple):
    features: Tensor
    inverted: Tensor
    labels: Tensor
    keys: KeyArray


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Digits:
    samples = load_samples("digits")
    inverted = replace(
        samples, read=lambda row: ImageOps.invert(samples.read(row)), fingerprint=f"{samples.fingerprint} inverted"
    )
    backbone = load_backbone("bundled:glyphnet")
    store = FeatureStore.open(backbone, samples)
    return Digits(
        store.features, FeatureStore.open(backbone, inverted).features, torch.from_numpy(samples.labels), store.keys
    )


Spoil = Callable[[Digits, Tensor, int], tuple[Tensor, Tensor]]
"""From some rows and a seed to the features and labels of all rows, those ones spoilt."""


def invert(digits: Digits, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    features = digits.features.clone()
    features[rows] = digits.inverted[rows]
    return features, digits.labels


def shuffle(digits: Digits, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    labels = digits.labels.clone()
    labels[rows] = labels[rows][torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return digits.features, labels


def exchange(digits: Digits, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    labels = digits.labels.clone()
    labels[rows] = (labels[rows] + 1) % 10
    return digits.features, labels


def keep(digits: Digits, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return digits.features, digits.labels


def count(heads: Mapping[str, LinearHead], features: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        outputs = [heads[name](features.to(heads[name].weight.dtype)) for name in HEADS]
    return joint_counts([one.argmax(1) for one in outputs], labels)


def diagnoses(
    digits: Digits, partition: str, seed: int, spoil: Spoil = keep, spoilt: tuple[int, ...] = ()
) -> list[SiteDiagnosis]:
    """What every site that has rows is told, in one exchange about sums and one about counts."""
    parts = {
        name: torch.from_numpy(rows) for name, rows in divide(partition, digits.labels.numpy(), SITES, seed).items()
    }
    bad = torch.cat([torch.empty(0, dtype=torch.int64), *(list(parts.values())[number] for number in spoilt)])
    features, labels = spoil(digits, bad, seed)
    out = torch.from_numpy(held_out(digits.keys, 0.2))
    sites = {
        name: FeatureStatistics.from_features(features[rows[~out[rows]]], labels[rows[~out[rows]]], 10)
        for name, rows in parts.items()
    }
    pool = sum(sites.values(), FeatureStatistics.empty(features.shape[1], 10))
    found = shifts(sites, pool)
    told = []
    for name, rows in parts.items():
        rows = rows[out[rows]]
        joint = count(heads_to_compare(sites[name], pool - sites[name]), features[rows], labels[rows])
        told.append(diagnose(name, found[name], compare(joint), sites[name].counts, CLASSES))
    return told


def share(told: list[SiteDiagnosis], recommendation: str) -> float:
    return sum(one.recommendation == recommendation for one in told) / len(told)


@pytest.mark.parametrize(
    "partition",
    ["dirichlet:0.5", *(pytest.param(one, marks=pytest.mark.slow) for one in ("dirichlet:0.05", "iid"))],
)
def test_healthy_sites_are_never_advised_to_stay_local(digits: Digits, partition: str) -> None:
    told = [one for seed in range(50) for one in diagnoses(digits, partition, seed) if one.rows]
    assert len(told) > 450
    assert share(told, "stay local") <= 0.01
    assert share(told, "join with a local head") <= 0.05
    measured = [one.shift for one in told if one.shift]
    assert len(measured) > 400
    assert min(one.p_value for one in measured) > 0.5
    assert numpy.quantile([one.distance for one in measured], 0.99) < MIN_DISTANCE / 2
    assert not any(one.look_like or one.inseparable for one in measured)


def spoilt_sites(digits: Digits, spoil: Spoil, seeds: range) -> tuple[list[SiteDiagnosis], list[SiteDiagnosis]]:
    """One site of each seed in turn, where it has rows to compare, and the healthy sites beside it."""
    bad, healthy = [], []
    for seed in seeds:
        told = diagnoses(digits, "dirichlet:0.05", seed, spoil, (seed % SITES,))
        one = told.pop(seed % SITES)
        healthy += [other for other in told if other.rows]
        if one.shift and one.shift.rows >= 20 and one.shift.contrast is not None:
            bad.append(one)
    return bad, healthy


SEEDS = pytest.mark.parametrize(
    "seeds", [range(6), pytest.param(range(100), marks=pytest.mark.slow)], ids=["few", "many"]
)


@SEEDS
@pytest.mark.parametrize(
    ("spoil", "finding"),
    [(invert, "images look different"), (shuffle, "labels look wrong"), (exchange, "classes look exchanged")],
)
def test_one_spoilt_site_among_healthy_ones(digits: Digits, spoil: Spoil, finding: str, seeds: range) -> None:
    bad, healthy = spoilt_sites(digits, spoil, seeds)
    assert len(bad) > len(seeds) / 2
    assert share(bad, "stay local") >= 0.9
    assert sum(one.finding == finding for one in bad) >= 0.9 * len(bad)
    assert share(healthy, "stay local") <= 0.02


@pytest.mark.parametrize("spoil", [invert, pytest.param(shuffle, marks=pytest.mark.slow)])
def test_several_spoilt_sites_are_all_detected(digits: Digits, spoil: Spoil) -> None:
    for seed in range(5):
        told = diagnoses(digits, "dirichlet:0.5", seed, spoil, (0, 1, 2))
        # The other two may make the shared head serve it well enough; that its images differ is said all the same.
        assert [one.finding in UNLIKE for one in told] == [True] * 3 + [False] * 7


def test_two_differing_sites_are_both_reported(digits: Digits) -> None:
    half = torch.arange(len(digits.labels)) % 2 == 0
    here = FeatureStatistics.from_features(digits.features[half], digits.labels[half], 10)
    there = FeatureStatistics.from_features(digits.inverted[~half], digits.labels[~half], 10)
    found = shifts({"here": here, "there": there}, here + there)
    assert [one and one.shifted for one in found.values()] == [True, True]


class Problem(NamedTuple):
    features: Tensor
    labels: Tensor
    inverse: Tensor  # of the covariance


def gaussian(
    seed: int, n: int, d: int, spread: float, *, classes: int = 5, skewed: int = 0, freedom: float = 0.0
) -> Problem:
    """Correlated rows, the first `skewed` mostly of two classes; of Student's t where `freedom` is given."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    shares = torch.rand(skewed, generator=generator)
    labels[:skewed] = (shares > 0.6).long() + (shares > 0.9)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if freedom:
        squares = torch.randn(n, int(freedom), generator=generator, dtype=torch.float64).square().sum(1)
        noise *= ((freedom - 2) / squares).sqrt()[:, None]
    mixing = 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 + torch.eye(d)
    means = spread * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return Problem(noise @ mixing + means[labels], labels, torch.linalg.inv(mixing.T @ mixing))


@pytest.mark.parametrize(
    ("n", "d", "spread", "rows", "freedom"),
    [
        (1000, 20, 1.0, 100, 0),
        (80, 100, 0.5, 40, 0),  # the others have fewer rows than features
        (200, 50, 0.5, 60, 5),
        *(
            pytest.param(*figures, marks=pytest.mark.slow)
            for figures in (
                (1000, 100, 0.5, 200, 0),
                (200, 100, 0.5, 60, 0),
                (1000, 100, 0.05, 100, 0),  # classes that features hardly tell apart
            )
        ),
    ],
)
def test_without_a_shift_z_is_standard_normal(n: int, d: int, spread: float, rows: int, freedom: float) -> None:
    found = []
    for seed in range(100):
        x, y, _ = gaussian(seed, n, d, spread, skewed=rows, freedom=freedom)
        parts = [FeatureStatistics.from_features(x[part], y[part], 5) for part in (slice(rows), slice(rows, None))]
        found.append(shift(*parts))
    z = numpy.array([one.z for one in found if one])
    assert len(z) > 80
    assert -0.3 < z.mean() < 0.75  # it is the more shifted of two views
    assert 0.6 < z.std() < 1.3
    assert not any(one.shifted or one.inseparable for one in found if one)


@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_distance_is_the_shift_in_units_of_the_distance_between_classes(distance: float) -> None:
    found = []
    for seed in range(50):
        x, y, inverse = gaussian(seed, 1000, 20, 1.0, skewed=100)
        means = torch.stack([x[100:][y[100:] == c].mean(0) for c in range(5)])
        apart = torch.cdist(means @ torch.linalg.cholesky(inverse), means @ torch.linalg.cholesky(inverse))
        separation = apart.square().sum() / 20
        direction = means[seed % 5] - means[(seed + 1) % 5]
        direction *= (separation / (direction @ inverse @ direction)).sqrt()
        x[:100] += distance * direction
        found.append(
            shift(
                FeatureStatistics.from_features(x[:100], y[:100], 5),
                FeatureStatistics.from_features(x[100:], y[100:], 5),
            )
        )
    measured = numpy.array([one.distance for one in found if one])
    assert numpy.median(measured) == pytest.approx(distance, rel=0.1)
    p_values = numpy.array([one.p_value for one in found if one])
    if distance == MIN_DISTANCE:  # the level of the test
        assert (p_values < 0.05).mean() <= 0.12
        assert not any(one.alike and one.shifted for one in found if one)
    else:
        assert (p_values < 1e-3).all()


def test_label_skew_is_no_shift() -> None:
    x, y, _ = gaussian(0, 600, 10, 1.0)
    site = torch.cat([(y == 0).nonzero()[:50, 0], (y == 1).nonzero()[:6, 0]])
    rest = torch.ones(600, dtype=torch.bool)
    rest[site] = False
    found = shift(
        FeatureStatistics.from_features(x[site], y[site], 5), FeatureStatistics.from_features(x[rest], y[rest], 5)
    )
    assert found is not None
    assert found.classes == (0, 1)
    assert found.alike
    assert found.contrast == pytest.approx(1, abs=0.2)


def stats_of(counts: list[int], d: int = 4, seed: int = 0, value: float | None = None) -> FeatureStatistics:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(labels), d, generator=generator, dtype=torch.float64) + 3 * torch.eye(len(counts), d)[labels]
    return FeatureStatistics.from_features(rows if value is None else rows * 0 + value, labels, len(counts))


@pytest.mark.parametrize(
    ("site", "others"),
    [
        ([0, 0, 0], [9, 9, 9]),
        ([9, 9, 9], [0, 0, 0]),
        ([9, 0, 0], [0, 9, 9]),
        ([MIN_CLASS_ROWS - 1, 0, 0], [9, 9, 9]),
        ([9, 9, 9], [9, 0, 0]),
    ],
)
def test_sites_without_comparable_rows(site: list[int], others: list[int]) -> None:
    assert shift(stats_of(site), stats_of(others)) is None


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_features_are_no_shift(value: float) -> None:
    others = stats_of([9, 9, 9])
    assert shift(stats_of([9, 9, 9], value=value), stats_of([9, 9, 9], value=value)) is None
    found = shift(stats_of([9, 9, 9], value=value), others)
    assert found is not None
    assert found.inseparable
    json.dumps(diagnose("a", found, None, others.counts, "xyz").to_dict(), allow_nan=False)


def test_sites_with_one_row_and_without_rows() -> None:
    sites = {
        "a": stats_of([30, 30, 30]),
        "b": stats_of([30, 20, 0], seed=1),
        "c": stats_of([1, 0, 0]),
        "d": stats_of([0] * 3),
    }
    found = shifts(sites, sum(sites.values(), FeatureStatistics.empty(4, 3)))
    assert [one and one.alike for one in found.values()] == [True, True, None, None]


def test_multi_label_rows_are_refused() -> None:
    stats = FeatureStatistics.from_features(torch.randn(8, 2), torch.ones(8, 3, dtype=torch.int64), 3, kind=LABELS)
    with pytest.raises(UserError, match="Multi-label sites"):
        shifts({"a": stats, "b": stats}, stats + stats)
    with pytest.raises(UserError, match="one class each"):
        heads_to_compare(stats, stats)


def test_heads_use_the_sites_own_priors() -> None:
    site, others = stats_of([30, 0, 10]), stats_of([20, 20, 20], seed=1)
    heads = heads_to_compare(site, others)
    assert tuple(heads) == HEADS
    pool = site + others
    priors = [30 + 50 / 100, 20 / 100, 10 + 30 / 100]
    for name, stats in (("own", site), ("pooled", pool), ("others", others)):
        expected = solve_head(stats, "lda", priors=priors)
        torch.testing.assert_close(heads[name].weight, expected.weight)
        torch.testing.assert_close(heads[name].bias, expected.bias)


@pytest.mark.parametrize(
    ("site", "others", "said"),
    [([0, 8, 0], [9, 9, 9], ("own", 1)), ([9, 0, 3], [0, 0, 0], ("others", 0)), ([0, 0, 0], [0, 9, 9], ("own", 1))],
)
def test_heads_of_sites_with_fewer_than_two_classes(site: list[int], others: list[int], said: tuple[str, int]) -> None:
    heads = heads_to_compare(stats_of(site), stats_of(others))
    assert all(bool(torch.isfinite(head.bias).all()) for head in heads.values())
    rows = torch.randn(20, 4, dtype=torch.float64)
    assert set(heads[said[0]](rows).argmax(1).tolist()) == {said[1]}


def test_no_heads_without_rows() -> None:
    with pytest.raises(UserError, match="no rows"):
        heads_to_compare(stats_of([0, 0]), stats_of([0, 0]))


def test_joint_counts_of_correct_predictions() -> None:
    heads = heads_to_compare(stats_of([9, 2, 0]), stats_of([3, 9, 9], seed=1))
    generator = torch.Generator().manual_seed(0)
    rows, labels = 2 * torch.randn(200, 4, generator=generator), torch.randint(3, (200,), generator=generator)
    joint = count(heads, rows, labels)
    right = [heads[name](rows.double()).argmax(1) == labels for name in HEADS]
    for own in (0, 1):
        for pooled in (0, 1):
            for others in (0, 1):
                both = (right[0] == own) & (right[1] == pooled) & (right[2] == others)
                assert joint[own, pooled, others] == both.sum()
    assert count(heads, rows[:0], labels[:0]).sum() == 0


def joint_of(own_only: int, pooled_only: int, both: int, neither: int = 0) -> list[list[list[int]]]:
    """Joint counts of heads of which the others' is as the pooled one."""
    return [[[neither, 0], [0, pooled_only]], [[own_only, 0], [0, both]]]


@pytest.mark.parametrize(("own", "pooled"), [(0, 0), (1, 0), (3, 9), (9, 3), (40, 40), (700, 600)])
def test_p_value_equals_mcnemar(own: int, pooled: int) -> None:
    found = compare(joint_of(own, pooled, 50, 7))
    assert found is not None
    expected = binomtest(own, own + pooled).pvalue if own + pooled else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.rows == own + pooled + 57
    assert found.right == {"own": own + 50, "pooled": pooled + 50, "others": pooled + 50}
    assert found.gain == found.gain_over_others


def test_gain_interval_covers_the_gain() -> None:
    covered = 0
    generator = numpy.random.default_rng(0)
    for _ in range(1000):
        neither, pooled_only, own_only, both = generator.multinomial(40, [0.1, 0.05, 0.15, 0.7])
        found = compare(joint_of(int(own_only), int(pooled_only), int(both), int(neither)))
        assert found is not None
        covered += found.gain[0] <= 0.1 <= found.gain[1]
    assert 930 <= covered <= 985


def test_joint_counts_without_rows_or_with_wrong_shape() -> None:
    assert compare(torch.zeros(2, 2, 2, dtype=torch.int64)) is None
    for wrong in (torch.zeros(2, 2, dtype=torch.int64), -torch.ones(2, 2, 2, dtype=torch.int64), torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match="Joint counts"):
            compare(wrong)


MANY = torch.tensor([60, 40])
OFFSETS = ([4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("counts", "joint", "expected", "words"),
    [
        (MANY, joint_of(12, 1, 37), "join with a local head", "needs a head of its own"),
        (MANY, joint_of(1, 12, 37), "join", "benefits from the other sites"),
        (MANY, joint_of(1, 1, 98), "join", "at most 4 points better"),
        (MANY, joint_of(1, 1, 8), "not enough rows to tell", "might still be"),
        (MANY, joint_of(0, 0, 0), "not enough rows to tell", "no held-out rows"),
        (torch.tensor([100, 0]), joint_of(12, 1, 37), "not enough rows to tell", "might still be"),
        (torch.tensor([100, 0]), joint_of(0, 1, 99), "join", "knows only one class"),
    ],
)
def test_recommendations_to_sites_without_shift(
    counts: Tensor, joint: list[list[list[int]]], expected: str, words: str
) -> None:
    found = shift(stats_of([60, 40]), stats_of([50, 50], seed=1))
    told = diagnose("a", found, compare(joint), counts, ("cat", "dog"))
    assert (told.recommendation, told.finding) == (expected, "alike")
    assert words in told.reason
    unknown = diagnose("a", None, compare(joint), counts, ("cat", "dog"))
    assert (unknown.recommendation, unknown.finding) == (expected, "unknown")
    assert "cannot be compared" in unknown.reason
    assert told.sentence.startswith(f"a: {expected}. Its rows look like the other sites'")


def moved(stats: FeatureStatistics, offset: list[float]) -> FeatureStatistics:
    """The statistics of the same rows with `offset` added to each."""
    return replace(stats.about(-torch.tensor(offset, dtype=torch.float64)), origin=stats.origin)


def test_offset_orthogonal_to_discriminant_directions() -> None:
    along, across = (shift(moved(stats_of([60, 40]), offset), stats_of([50, 50], seed=1)) for offset in OFFSETS)
    assert along is not None
    assert across is not None
    assert along.shifted
    assert not across.shifted


@pytest.mark.parametrize(
    ("joint", "expected", "words"),
    [
        ([[[0, 0], [0, 0]], [[5, 0], [25, 20]]], "stay local", "different equipment"),
        ([[[0, 0], [0, 0]], [[0, 0], [1, 99]]], "join", "does no harm"),
        ([[[0, 0], [12, 0]], [[0, 0], [38, 0]]], "join", "benefits from the other sites"),
        ([[[0, 0], [0, 0]], [[0, 0], [0, 0]]], "stay local", "no held-out rows"),
    ],
)
def test_recommendations_to_shifted_sites(joint: list[list[list[int]]], expected: str, words: str) -> None:
    found = shift(moved(stats_of([60, 40]), OFFSETS[0]), stats_of([50, 50], seed=1))
    assert found is not None
    assert found.shifted
    told = diagnose("a", found, compare(joint), MANY, ("cat", "dog"))
    assert told.recommendation == expected
    assert words in told.reason


def test_exchanged_classes_are_named() -> None:
    site = stats_of([40, 40, 40])
    swapped = replace(site, counts=site.counts.roll(1), sums=site.sums.roll(1, 0))
    told = diagnose("a", shift(swapped, stats_of([40, 40, 40], seed=1)), None, site.counts, ("cat", "dog", "emu"))
    assert told.finding == "classes look exchanged"
    assert "'cat' like 'emu', those labelled 'dog' like 'cat', those labelled 'emu' like 'dog'" in told.sentence


def test_diagnosis_as_json(digits: Digits) -> None:
    for one in diagnoses(digits, "dirichlet:0.05", 0, exchange, (0,)):
        values = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        assert values["sentence"] == one.sentence
        if one.comparison:
            assert values["comparison"]["accuracies"]["others"] == one.comparison.accuracies["others"]
