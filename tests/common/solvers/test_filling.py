import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge

from fedhead.backbones import load_backbone
from fedhead.backbones.identity import flags_of, identity_for, identity_spec
from fedhead.data import Columns, TableRow, samples_from_numbers
from fedhead.errors import UserError
from fedhead.solvers.closed_form import solve_head, solve_ridge
from fedhead.solvers.filling import Filling
from fedhead.solvers.starting import PooledSolutions
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import VALUES


def rows(seed: int, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    table = generator.normal(50, 10, (count, 4))
    targets = table @ generator.normal(size=(4, 2)) + generator.normal(size=(count, 2))
    table[generator.random((count, 4)) < 0.2] = np.nan
    table[:, 3] = np.nan_to_num(table[:, 3], nan=50)
    return table, targets


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sites=st.integers(1, 6), penalty=st.sampled_from([0.1, 10.0]))
def test_one_exchange_equals_mean_imputation_on_pooled_rows(seed: int, sites: int, penalty: float) -> None:
    table, targets = rows(seed)
    samples = samples_from_numbers(table, targets=targets)
    spec = identity_for("identity", samples)
    assert spec == "identity:x0?,x1?,x2?,x3"
    features = load_backbone(spec).features_of([samples.read(row) for row in range(len(samples))]).double()
    owners = np.random.default_rng(seed).integers(0, sites, len(table))
    origin = torch.full((features.shape[1],), 3.0)
    total = sum(
        FeatureStatistics.from_features(
            features[owners == one], torch.from_numpy(targets[owners == one]), 2, origin, kind=VALUES
        )
        for one in range(sites)
    )
    assert isinstance(total, FeatureStatistics)
    filling = Filling.of(total, flags_of(spec))
    head = solve_ridge(filling.filled(total), penalty)
    given_rows = np.where(np.isnan(table), np.nan, table.astype(np.float32)).astype(np.float64)
    imputed = SimpleImputer(add_indicator=True).fit_transform(given_rows)
    expected = Ridge(alpha=penalty).fit(imputed, targets)
    weight, bias = head.affine()
    found = features @ filling.unfilled(weight).T + bias
    np.testing.assert_allclose(found.detach(), expected.predict(imputed), rtol=1e-8, atol=1e-8)


def test_heads_of_unfilled_features_are_filled_first() -> None:
    table, targets = rows(1)
    samples = samples_from_numbers(table, targets=targets)
    spec = identity_for("identity", samples)
    features = load_backbone(spec).features_of([samples.read(row) for row in range(len(samples))])
    stats = FeatureStatistics.from_features(features, torch.from_numpy(targets), 2, kind=VALUES)
    filling = Filling.of(stats, flags_of(spec))
    filled = features.double().clone()
    filled[:, :3] += filling.means * filled[:, 4:]
    direct = FeatureStatistics.from_features(
        filled, torch.from_numpy(targets), 2, filling.filled(stats).origin, kind=VALUES
    )
    assert filling.filled(stats).is_close(direct)
    weight, bias = PooledSolutions(stats, flags=flags_of(spec)).affine("ridge")
    plain, offset = solve_head(direct, "ridge").affine()
    torch.testing.assert_close(features.double() @ weight.T + bias, filled @ plain.T + offset)


def test_a_column_without_any_numbers_keeps_weight_zero() -> None:
    features = torch.tensor([[0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 4.0, 1.0], [0.0, 3.0, 1.0]])
    stats = FeatureStatistics.from_features(features, torch.tensor([0, 0, 1, 1]), 2)
    weight, _ = PooledSolutions(stats, flags=((0, 2),)).affine("lda")
    assert weight[:, [0, 2]].abs().max() == 0
    assert weight[:, 1].abs().max() > 0


def test_flags_follow_the_numbers() -> None:
    spec = identity_spec(("a", "b?", "c"), ("a", "c"))
    assert spec == "identity:a?,b%3F,c?"
    backbone = load_backbone(spec)
    assert (backbone.num_features, backbone.spec, flags_of(spec)) == (5, spec, ((0, 3), (2, 4)))
    columns = Columns(("a", "b?", "c"))
    made = backbone.features_of(
        [TableRow(columns, np.array([np.nan, 2, 3.0])), TableRow(columns, np.array([1, 2, 3.0]))]
    )
    assert made.tolist() == [[0, 2, 3, 1, 0], [1, 2, 3, 0, 0]]
    with pytest.raises(UserError, match=r"no value in the column 'b\?'.*mark the column .* 'identity:b%3F\?'"):
        backbone.features_of([TableRow(columns, np.array([1, np.nan, 3.0]))])
    assert flags_of("torchvision:resnet18") == ()
