from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.backbones import load_backbone
from fedhead.client.agreement import Agreement, keep
from fedhead.client.handlers import answer
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.features.store import FeatureStore
from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import Manifest, MessageError, Payload, StatisticsRequest
from fedhead.simulations import RunResult, simulate
from fedhead.simulations.sites import SharedData, SimulatedSite
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.packing import narrowed, widened
from fedhead.tasks import make_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return FeatureStore.open(load_backbone("bundled:glyphnet"), load_samples("digits")).features


@pytest.mark.parametrize("lift", ["none", "relu:256"])
def test_float32_sums_take_half_the_bytes_and_change_no_prediction(
    lift: str, features: torch.Tensor, tmp_path: Path
) -> None:
    def run(wire: str) -> RunResult:
        config = RunConfig(rounds=0, lift=lift, wire=wire, simulation={"sites": 5, "partition": "iid"})
        return simulate(config, out=tmp_path / wire)

    exact, rounded = run("float64"), run("float32")
    assert rounded.bytes_up < 0.56 * exact.bytes_up
    with torch.inference_mode():
        wanted, got = exact.model.head(features), rounded.model.head(features)
    assert not torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(got.argmax(1), wanted.argmax(1))
    assert rounded.accuracy_by_site == exact.accuracy_by_site


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_rounded_sums_are_still_possible_ones(rows: int, width: int, mean: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    values = mean + scale * torch.randn(rows, width, generator=generator)
    stats = FeatureStatistics.from_features(values, torch.arange(rows) % 2, 2)
    arrays = narrowed(stats.to_arrays())
    assert {array.dtype for array in arrays.values()} >= {np.dtype(np.float32), np.dtype(np.float64)}
    back = FeatureStatistics.from_arrays(widened(arrays), stats)
    assert back.is_close(stats, 1e-6)


def test_sums_of_another_number_type_and_too_large_ones_are_refused() -> None:
    stats = FeatureStatistics.from_features(torch.randn(8, 3), torch.arange(8) % 2, 2)
    with pytest.raises(ValueError, match="float64 instead of float32"):
        widened(stats.to_arrays())
    with pytest.raises(ValueError, match="too large for float32"):
        narrowed({**stats.to_arrays(), "total": np.full(3, 1e39)})


@pytest.mark.parametrize("privacy", [{"secure_sum": True}, {"epsilon": 1.0}])
def test_masks_and_noise_keep_float64(privacy: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="plain sums"):
        RunConfig(wire="float32", privacy=privacy)


@pytest.mark.parametrize("terms", [{}, {"secure_sum": True}])
def test_a_site_refuses_float32_under_secure_summation(terms: dict[str, Any], features: torch.Tensor) -> None:
    samples, backbone = load_samples("digits"), load_backbone("bundled:glyphnet")
    shared = SharedData(
        backbone,
        FeatureStore.open(backbone, samples),
        samples.labels,
        Guard.off(),
        make_task("classification", samples.classes),
    )
    config = RunConfig(classes=samples.classes)
    manifest = Manifest.of("run", config, backbone, samples.classes).model_copy(update=terms)
    context = Context(1, 2, {}, RecordDict(), {})
    keep(Agreement(manifest, backbone.probe(), None), context)
    asked = StatisticsRequest(wire="float32").payload()
    assert asked.values["wire"] == "float32"
    assert "wire" not in StatisticsRequest().payload().values

    def reply() -> Payload:
        ((_, made),) = answer(STATISTICS, [SimulatedSite("a", np.arange(50), shared)], asked, context)
        return made

    if terms:
        with pytest.raises(MessageError, match="neither masked nor noisy"):
            reply()
    else:
        assert reply().arrays["gram"].dtype == np.float32
