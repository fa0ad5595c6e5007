import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.server.robust_pooling import gain, without
from fedhead.simulations import simulate
from fedhead.sums.features import FeatureStatistics


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=2, max_size=30),
    st.integers(1, 10**9),
)
def test_one_lying_site_in_five_or_more_cannot_have_another_left_out(honest: list[tuple[int, int]], rows: int) -> None:
    """The honest sites lose rows or gain none; the liar claims to gain all of its rows."""
    sizes = np.array([*(size for size, _ in honest), rows], float)
    gained = np.array([*(-min(size, lost) for size, lost in honest), rows], float)
    assert not gain(gained, sizes).significant


@given(st.integers(4, 30), st.integers(10, 100), st.floats(0.1, 1))
def test_one_lying_site_cannot_protect_another(others: int, rows: int, share: float) -> None:
    sizes = np.full(others, float(rows))
    gained = np.floor(share * sizes)
    gained[0] = -rows
    assert gain(gained, sizes).significant == (gained[1] * (others - 2) >= 5)


def test_the_gain_of_equal_sites_is_their_mean_with_its_error() -> None:
    drawn = np.random.default_rng(0).normal(10, 2, 10_000)
    found = gain(drawn, np.full(len(drawn), 100.0))
    assert found.share == pytest.approx(0.1, abs=1e-3)
    # A trimmed mean of normal values is nearly as precise as the mean.
    assert found.error == pytest.approx(0.02 / 100, rel=0.1)


def test_without_a_site_means_and_covariance_are_the_others_and_priors_the_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=generator, dtype=torch.float64) + 3
    labels = torch.arange(90) % 3
    labels[:30][labels[:30] == 0] = 3
    origin = torch.full((5,), 3.0, dtype=torch.float64)
    own = FeatureStatistics.from_features(features[:30], labels[:30], 5, origin)
    rest = FeatureStatistics.from_features(features[30:], labels[30:], 5, origin)
    made = without(own + rest, own)
    assert torch.equal(made.counts, (own + rest).counts)
    known = [0, 1, 2]
    torch.testing.assert_close((made.sums / made.counts[:, None])[known], (rest.sums / rest.counts[:, None])[known])
    torch.testing.assert_close(made.sums[3], own.sums[3])
    torch.testing.assert_close(made.total, made.sums.sum(0))
    torch.testing.assert_close(made.within_scatter() / made.rows, rest.within_scatter() / rest.rows)


@pytest.mark.parametrize(("partition", "init"), [("dirichlet:0.05", "lda"), ("shards:2", "nearest-mean")])
def test_honest_sites_with_other_classes_stay(
    partition: str, init: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    simulation = {"partition": partition, "sites": 6, "min_class_count": 2, "min_rows": 2}
    config = RunConfig(init=init, rounds=0, diagnose=False, simulation=simulation)
    robust = simulate(config.changed({"pooling": "robust"}), "digits")
    summed = simulate(config, "digits")
    assert robust.outcome.refused == summed.outcome.refused
    for name, value in summed.model.head.state_dict().items():
        assert torch.equal(robust.model.head.state_dict()[name], value)


def test_robust_pooling_needs_single_sites_sums_of_one_class_each(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UserError, match="keep_sums"):
        RunConfig(pooling="robust", keep_sums="none")
    with pytest.raises(UserError, match=r"keep_sums|secure_sum"):
        RunConfig(pooling="robust", privacy={"secure_sum": True})
    with pytest.raises(UserError, match="'zeros' needs none"):
        simulate(RunConfig(pooling="robust", init="zeros"), "digits")
