import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.backbones import load_backbone
from fedhead.data import load_samples
from fedhead.server.screening import (
    LEAST_SITES,
    SumsScreen,
    impossible_grams,
    outlying_losses,
    outlying_sums,
    outlying_updates,
)
from fedhead.simulations.partition import divide
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import METRICS
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.targets import CLASSES as CLASSES_KIND
from fedhead.sums.targets import LABELS, VALUES

FEATURES, CLASSES = 6, 3


def rows_of(generator: torch.Generator, rows: int, scale: float, shift: float) -> torch.Tensor:
    return scale * (torch.randn(rows, FEATURES, generator=generator).relu() + shift)


def statistics(seed: int, rows: int = 30, scale: float = 1.0, shift: float = 0.0) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    return FeatureStatistics.from_features(rows_of(generator, rows, scale, shift), labels, CLASSES)


def judged(sums: list[FeatureStatistics | FeatureMoments], held_bytes: int = 2**30) -> tuple[list[str], dict[str, str]]:
    """Return the sites whose sums can be used, in order, and the others with the reason."""
    screen: SumsScreen[FeatureStatistics | FeatureMoments] = SumsScreen(held_bytes)
    used = [site for number, one in enumerate(sums) for site, _ in screen.take(str(number), one)]
    return used + [site for site, _ in screen.release()], screen.dropped


# Honest sites.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([20, 200, 20_000]), st.floats(-1.0, 1.0), st.sampled_from([0.0, 1.0, 30.0])),
        min_size=1,
        max_size=12,
    )
)
def test_honest_sites_of_any_size_scanner_and_unit_are_used(sites: list[tuple[int, float, float]]) -> None:
    """Scales differ up to a hundredfold, shifts are up to 30 times the scale, rows differ a thousandfold."""
    sums = [statistics(seed, rows, 10**scale, shift) for seed, (rows, scale, shift) in enumerate(sites)]
    used, dropped = judged(list(sums))
    assert (used, dropped) == ([str(number) for number in range(len(sites))], {})
    nothing = FeatureMoments.empty(torch.zeros(FEATURES))
    moments = [
        nothing.updated(rows_of(torch.Generator().manual_seed(seed), rows, 10**scale, shift))
        for seed, (rows, scale, shift) in enumerate(sites)
    ]
    assert judged(list(moments))[1] == {}


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, np.ndarray]:
    """The features `[1797, d]` of the digits, from the bundled network, and their classes."""
    samples = load_samples("digits")
    backbone = load_backbone("bundled:glyphnet")
    return backbone.features_of([samples.read(row) for row in range(len(samples.labels))]), np.asarray(samples.labels)


@pytest.mark.parametrize(
    ("how", "sites"),
    [("dirichlet:0.05", 20), ("shards:1", 10), ("quantity:0.1", 30), ("iid", 100), ("dirichlet:0.05", 100)],
)
@pytest.mark.parametrize("seed", range(3))
def test_skewed_digits_are_used(digits: tuple[torch.Tensor, np.ndarray], how: str, sites: int, seed: int) -> None:
    features, labels = digits
    sums = [
        FeatureStatistics.from_features(features[rows], torch.from_numpy(labels[rows]), 10)
        for rows in divide(how, labels, sites, seed).values()
    ]
    used, dropped = judged(list(sums))
    assert dropped == {}
    assert len(used) == sites


def test_sites_without_rows_or_variation_are_used_and_count_for_nothing() -> None:
    empty, blank = FeatureStatistics.empty(FEATURES, CLASSES), statistics(1, scale=0.0)
    assert judged([empty, empty, empty, statistics(0)])[1] == {}
    assert judged([blank, blank, blank, statistics(0)])[1] == {}
    assert judged([statistics(0), statistics(1), blank, empty])[1] == {}


# Liars.


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize("held_bytes", [2**30, 1])
def test_sums_of_scaled_features_are_left_out(at: int, held_bytes: int) -> None:
    """With `held_bytes` of 1, sums are judged as soon as there are three."""
    sums = [statistics(seed, scale=1e6 if seed == at else 1.0) for seed in range(10)]
    used, dropped = judged(list(sums), held_bytes)
    assert used == [str(number) for number in range(10) if number != at]
    assert dropped.keys() == {str(at)}
    assert "check their units" in dropped[str(at)]


def test_fewer_than_half_of_the_sites_cannot_hide_each_other() -> None:
    sums = [statistics(seed, scale=1e6 if seed < 4 else 1.0) for seed in range(9)]
    assert judged(list(sums))[1].keys() == set("0123")


def test_claims_of_many_rows_are_left_out() -> None:
    rows = {"a": 20, "b": 20_000, "c": 300, "d": 10**12}
    squares = dict.fromkeys(rows, np.ones(2))
    assert outlying_sums(rows, squares).keys() == {"d"}


def test_scaled_targets_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = []
    for scale in (1.0, 30.0, 1e7, 0.1):
        features, targets = torch.randn(2, 40, 2, generator=generator)
        sums.append(FeatureStatistics.from_features(features, targets * scale, 2, kind=VALUES))
    used, dropped = judged(list(sums))
    assert used == ["0", "1", "3"]
    assert "targets" in dropped["2"]


def test_two_sites_have_no_median() -> None:
    assert LEAST_SITES == 3
    assert judged([statistics(0), statistics(1, scale=1e6)])[1] == {}


# Gram matrices.


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 6, 500]), st.floats(-6, 6), st.sampled_from([0.0, 1e3, 1e5]))
def test_gram_matrices_of_rows_are_possible(seed: int, rows: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = rows_of(generator, rows, 10**scale, shift)
    features[:, 0] = features[:, 1]
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    for targets, kind in ((labels, CLASSES_KIND), (torch.ones(rows, 3), LABELS), (features[:, :3].double(), VALUES)):
        assert impossible_grams({"a": FeatureStatistics.from_features(features, targets, 3, kind=kind)}) == {}


def indefinite() -> FeatureStatistics:
    """Statistics whose every pair of features is possible, and three of them are not."""
    stats = statistics(0)
    for row, column, sign in ((0, 1, 1), (0, 2, 1), (1, 2, -1)):
        stats.upper[row, column] = 0.9 * sign * (stats.upper[row, row] * stats.upper[column, column]).sqrt()
    return stats


def contradicting() -> FeatureStatistics:
    stats = statistics(0)
    stats.sums *= 3
    return stats


@pytest.mark.parametrize("wrong", [indefinite(), contradicting()])
@pytest.mark.parametrize("others", range(3))
def test_impossible_gram_matrices_are_left_out(wrong: FeatureStatistics, others: int) -> None:
    large = wrong.copy()
    for part in (large.sums, large.total, large.upper):
        part *= 50
    used, dropped = judged([statistics(1), large, statistics(2)][: others + 1] if others else [large])
    assert dropped.keys() == ({"1"} if others else {"0"})
    assert "1" not in used or not others


# Heads and losses.


def heads(*scales: float) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return {
        str(number): {"weight": HEAD["weight"] + scale * generator.standard_normal((3, 6)).astype(np.float32)}
        for number, scale in enumerate(scales)
    }


HEAD = {"weight": np.full((3, 6), 0.1, np.float32)}
ZEROS = {"weight": np.zeros((3, 6), np.float32)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 1), min_size=1, max_size=12))
def test_honest_updates_are_used(exponents: list[float]) -> None:
    """Sites whose rows the head fits hardly change it; others change it a hundred times its size."""
    assert outlying_updates(HEAD, heads(*[10**exponent for exponent in exponents])) == {}


def test_huge_updates_are_left_out() -> None:
    replies = heads(0.01, 0.02, 1e5, 0.01)
    assert outlying_updates(HEAD, replies).keys() == {"2"}
    for few in (heads(0.01, 1e38), heads(1e38)):
        assert outlying_updates(HEAD, few).keys() == {max(few)}
    assert outlying_updates(ZEROS, heads(1.0, 1.0, 1.0)) == {}
    assert outlying_updates(HEAD, heads(0.0, 0.0, 0.0)) == {}


def test_a_whole_round_of_diverging_sites_is_told_of_the_learning_rate() -> None:
    found = outlying_updates(HEAD, heads(1e12, 1e13, 1e12))
    assert len(found) == 3
    assert all("smaller learning rate" in reason for reason in found.values())


def metrics(examples: int, train_loss: float, held_out: int, loss_sum: float) -> np.ndarray:
    values = {"examples": examples, "train_loss": train_loss, "held_out": held_out, "loss_sum": loss_sum}
    return np.array([values.get(name, 0) for name in METRICS], np.float64)


def test_losses_beyond_all_others_are_left_out() -> None:
    honest = {"a": metrics(100, 0.1, 20, 1e-9), "b": metrics(20, 80.0, 4, 900.0), "c": metrics(9, 1e6, 0, 0)}
    assert outlying_losses(honest) == {}
    assert outlying_losses(honest | {"d": metrics(9, 1.0, 9, 1e40)}).keys() == {"d"}
    assert outlying_losses({"a": honest["a"], "d": metrics(9, 1e31, 9, 1.0)}).keys() == {"d"}
