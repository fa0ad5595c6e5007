import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import cholesky
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.heads import FeatureMap, LinearHead, MapForm, behind, delivered_spec, make_delivered
from fedhead.heads.feature_map import Basis, basis_for, normal_deviates, parse_lift, unit_rows
from fedhead.model import TransferModel
from fedhead.protocol.mapping import MapRequest, moments_of
from fedhead.protocol.messages import MessageError, Payload
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import origin_of

WIDTH = 40


def rows_of(seed: int, count: int, width: int = 12) -> Tensor:
    """Features of a few directions, some of them negative, in float32 as backbones give them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator) @ torch.randn(5, width, generator=generator) + 0.3


def summed(features: Tensor, labels: Tensor, mapping: FeatureMap, origin: Tensor) -> FeatureStatistics:
    return FeatureStatistics.from_features(mapping(features.double()), labels, 3, origin)


def split_sums(features: Tensor, labels: Tensor, parts: list[Tensor], lift: str, basis: Basis) -> FeatureStatistics:
    """The sums of a federation: the moments of the unit rows first if the lift has landmarks."""
    mapping = MapRequest(basis).build(features.shape[1], 7)
    assert mapping is not None
    origin = origin_of(features[:3], 7, mapping)
    stats = sum(summed(features[part], labels[part], mapping, origin) for part in parts)
    if lift == "none":
        return stats
    moments = moments_of(stats.mean(), stats.scatter() / stats.rows) if lift.startswith("landmarks") else {}
    lifted = MapRequest(basis, lift, moments).build(features.shape[1], 7)
    assert lifted is not None
    origin = origin_of(features[:3], 7, lifted)
    return sum(summed(features[part], labels[part], lifted, origin) for part in parts)


@pytest.mark.parametrize("lift", ["none", f"landmarks:{WIDTH}", f"relu:{WIDTH}"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=30, max_size=90), st.sampled_from(["unit", "root"]))
def test_sums_of_mapped_features_are_the_same_under_any_split(
    lift: str, seed: int, owners: list[int], basis: Basis
) -> None:
    features, sites = rows_of(seed, len(owners)), torch.tensor(owners)
    labels = torch.arange(len(owners)) % 3
    parts = [(sites == site).nonzero()[:, 0] for site in range(4)]
    pooled = split_sums(features, labels, [torch.arange(len(owners))], lift, basis)
    assert split_sums(features, labels, parts, lift, basis).is_close(pooled, 1e-11)


def test_landmarks_are_those_of_the_formula() -> None:
    features = rows_of(1, 60).double()
    rows = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    mean, covariance = rows.mean(0), np.cov(rows.T, bias=True)
    spread = np.trace(covariance)
    factor = cholesky(covariance + 1e-6 * spread / 12 * np.eye(12), lower=True)
    landmarks = mean + normal_deviates("landmarks", 5, WIDTH, 12).numpy() @ factor.T
    landmarks /= np.linalg.norm(landmarks, axis=1, keepdims=True)
    made = FeatureMap.landmarks("unit", torch.from_numpy(mean), torch.from_numpy(covariance), WIDTH, 5)
    np.testing.assert_allclose(made(features).numpy(), np.exp((rows @ landmarks.T - 1) / spread), rtol=1e-6)


def test_rows_have_unit_length_and_rows_of_zeros_remain() -> None:
    features = rows_of(2, 20)
    features[3] = 0
    for basis in ("unit", "root"):
        lengths = unit_rows(features, basis).norm(dim=1)
        assert lengths[3] == 0
        torch.testing.assert_close(lengths[lengths > 0], torch.ones(19))
    torch.testing.assert_close(unit_rows(torch.tensor([[-4.0, 9.0]]), "root"), torch.tensor([[-2.0, 3.0]]) / 13**0.5)
    assert basis_for(features.abs()) == "root"
    assert basis_for(features) == "unit"


def test_deviates_are_normal_and_differ_by_seed() -> None:
    drawn = normal_deviates("relu", 3, 200, 300)
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    # Pinned, because every machine must draw the same ones.
    assert (drawn[0, :3] * 2**20).long().tolist() == (normal_deviates("relu", 3, 1, 3)[0] * 2**20).long().tolist()
    assert not torch.equal(drawn, normal_deviates("relu", 4, 200, 300))


@pytest.mark.parametrize("form", ["unit", "root", f"unit+landmarks:{WIDTH}", f"root+relu:{WIDTH}"])
def test_a_mapped_head_is_saved_with_its_map(form: str, tmp_path: Path) -> None:
    backbone = load_backbone("bundled:glyphnet")
    features = backbone.probe()
    parsed = MapForm.parse(form)
    mapping = FeatureMap(parsed, backbone.num_features)
    if parsed.lift == "relu":
        mapping = FeatureMap.relu(parsed.basis, backbone.num_features, WIDTH, 1)
    elif parsed.lift:
        rows = unit_rows(rows_of(0, 400, backbone.num_features).double(), parsed.basis)
        moments = rows.mean(0), torch.cov(rows.T, correction=0)
        mapping = FeatureMap.landmarks(parsed.basis, *moments, WIDTH, 1)
    inner = LinearHead.from_weights(torch.randn(3, mapping.width), torch.randn(3))
    head = behind(mapping, inner)
    torch.testing.assert_close(head(features), inner(mapping(features.double()).float()), rtol=1e-4, atol=1e-4)
    spec = delivered_spec(head, "linear")
    assert spec == f"{form}/linear"
    model = TransferModel(backbone, head, "abc", spec)
    model.save(tmp_path / "model.safetensors")
    loaded = TransferModel.load(tmp_path / "model.safetensors", backbone)
    assert torch.equal(loaded.head(features), head(features))


UNKNOWN = ["landmarks", "landmarks:0", "landmarks:5000", "relu:x", "fourier:9", "", "none:3"]
ZEROS_AND_DIGITS = ["relu:06", "relu:000009999", "relu:1000000001", "relu:\u0663", "relu:8\n"]


@pytest.mark.parametrize("text", [*UNKNOWN, *ZEROS_AND_DIGITS])
def test_unknown_lifts_are_rejected(text: str) -> None:
    with pytest.raises(UserError):
        parse_lift(text)
    with pytest.raises(UserError, match="lift"):
        RunConfig(lift=text)


@pytest.mark.parametrize("spec", ["whole/linear", "none+relu:9/linear", "unit+relu:99999/linear", "unit/oval"])
def test_unknown_maps_of_a_model_are_rejected(spec: str) -> None:
    with pytest.raises(UserError):
        make_delivered(spec, 4, 2)


def request(values: dict[str, object], mean: list[float], covariance: list[float]) -> Payload:
    arrays = {"mean": np.array(mean), "covariance": np.array(covariance)}
    return Payload(json.loads(json.dumps(values)), arrays if mean else {})


@pytest.mark.parametrize(
    ("values", "mean", "covariance"),
    [
        ({"basis": "none", "lift": "relu:8"}, [], []),
        ({"basis": "unit", "lift": "relu:100000"}, [], []),
        ({"basis": "unit", "lift": 3}, [], []),
        ({"basis": "odd"}, [], []),
        ({"basis": "unit", "code": "x"}, [], []),
        ({"basis": "unit"}, [0.1, 0.1], [0.5, 0, 0.48]),
        ({"basis": "unit", "lift": "landmarks:8"}, [], []),
        ({"basis": "unit", "lift": "landmarks:8"}, [0.1], [0.5]),
        ({"basis": "unit", "lift": "landmarks:8"}, [0.1, float("nan")], [0.5, 0, 0.48]),
        ({"basis": "unit", "lift": "landmarks:8"}, [1e200, 0.1], [0.5, 0, 0.48]),
        # A kernel so narrow that each landmark is about the rows beside it.
        ({"basis": "unit", "lift": "landmarks:8"}, [0.9999999, 0.0], [1e-8, 0, 1e-8]),
        ({"basis": "unit", "lift": "landmarks:8"}, [0.1, 0.1], [0.49, 0.9, 0.49]),
        ({"basis": "unit", "lift": "landmarks:8"}, [0.1, 0.1], [-0.5, 0.0, 1.4]),
    ],
)
def test_a_site_rejects_maps_that_no_rows_can_ask_for(
    values: dict[str, object], mean: list[float], covariance: list[float]
) -> None:
    with pytest.raises(MessageError, match=r"no map of features|unit length|arrays|instead|finite"):
        MapRequest.from_payload(request(values, mean, covariance), 2).build(2, 0)
