"""Every kind of sum is the same under secure summation as in a plain run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import ADAPT, DISTANCES, GRADIENT, MAP, PERSONALISE, RIVALS, STATISTICS
from fedhead.simulations import RunResult, simulate

from .test_secure_network import MaskedNetwork, config, run, simulated

ROWS, SITES = 500, 4
OFF = {"min_class_count": 0, "min_rows": 0, "sites": SITES, "partition": "iid"}


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


def digits() -> Samples:
    whole = load_samples("digits")
    return samples_from_arrays(
        [whole.read(row) for row in range(ROWS)], whole.labels[:ROWS], classes=whole.classes, spec="some digits"
    )


def attributes() -> Samples:
    whole = load_samples("digits")
    labels = whole.labels[:ROWS]
    marks = np.stack([labels % 2 == 0, labels > 4, np.isin(labels, (0, 6, 8, 9))], 1)
    return samples_from_arrays(
        [whole.read(row) for row in range(ROWS)], marks, classes=("even", "large", "looped"), spec="some attributes"
    )


def patients(folder: Path) -> str:
    data = load_diabetes()
    path = folder / "patients.csv"
    header = ",".join([*data.feature_names, "progression"])
    np.savetxt(path, np.column_stack([data.data, data.target]), "%.12g", ",", header=header, comments="")
    return f"csv:{path}?target=progression&features={','.join(data.feature_names)}"


KINDS: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "multi-label": ({"task": "multi-label", "rounds": 1}, (STATISTICS,)),
    "regression": ({"task": "regression", "backbone": "identity", "rounds": 1}, (STATISTICS,)),
    "gradients": ({"rounds": 2, "init": "zeros", "strategy": {"name": "pooled-lbfgs"}}, (GRADIENT,)),
    "landmarks": ({"rounds": 0, "lift": "landmarks:64"}, (MAP, STATISTICS)),
    "rivals": ({"rounds": 0, "lift": "auto"}, (RIVALS, STATISTICS)),
    "closed": ({"rounds": 0, "personal": "closed"}, (PERSONALISE,)),
    "ditto": ({"rounds": 0, "personal": "ditto"}, (PERSONALISE,)),
    "adapt": ({"rounds": 0, "adapt": True}, (ADAPT,)),
    "foreign": ({"rounds": 0, "foreign": True}, (DISTANCES,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_secure_runs_equal_plain_ones(kind: str, tmp_path: Path) -> None:
    settings, actions = KINDS[kind]
    data = patients(tmp_path) if kind == "regression" else attributes() if kind == "multi-label" else digits()
    plain, secure = (
        simulate(RunConfig(**settings, **more, simulation=OFF), data=data, out=tmp_path / name)
        for name, more in (
            ("plain", {"keep_sums": "total", "diagnose": False}),
            ("secure", {"privacy": {"secure_sum": True}}),
        )
    )
    same_run(plain, secure, mapped=kind in ("landmarks", "rivals"))
    assert set(actions) <= secure.outcome.traffic.to_dict()["actions"].keys()
    if kind in ("closed", "ditto"):
        assert secure.outcome.personal is not None
        assert plain.outcome.personal is not None
        assert secure.outcome.personal.pooled == plain.outcome.personal.pooled
        assert not secure.outcome.personal.sites
    assert [one.get("taken") for one in secure.outcome.choices] == [one.get("taken") for one in plain.outcome.choices]


def same_run(plain: RunResult, secure: RunResult, mapped: bool) -> None:
    for name, tensor in plain.model.head.state_dict().items():
        torch.testing.assert_close(secure.model.head.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    for one, two in zip(plain.history, secure.history, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.score == pytest.approx(one.score, rel=1e-6)
    first, second = plain.outcome.statistics, secure.outcome.statistics
    if first is not None and second is not None:
        # A map that is solved from sums passes on their last bits, magnified.
        assert second.is_close(first, 1e-6 if mapped else 1e-12)
    assert secure.accuracy == pytest.approx(plain.accuracy, rel=1e-6)


@pytest.mark.parametrize("kind", ["gradients", pytest.param("rivals", marks=pytest.mark.slow), "closed"])
def test_masked_runs_equal_simulated_ones(kind: str, tmp_path: Path) -> None:
    settings, actions = KINDS[kind]
    network = MaskedNetwork(tmp_path)
    outcome, _ = run(network, config(**settings), tmp_path / "run")
    expected = simulated(**settings)
    assert set(actions) <= {action for _, action in network.sent}
    for name, tensor in outcome.head.state_dict().items():
        torch.testing.assert_close(tensor, expected.head.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert [line.score for line in outcome.history] == [line.score for line in expected.history]
    if outcome.statistics is not None and expected.statistics is not None:
        # Features that are extracted in other batches differ in their last bits.
        assert outcome.statistics.is_close(expected.statistics, 1e-6)
    if kind == "closed":
        assert outcome.personal is not None
        assert expected.personal is not None
        assert outcome.personal.pooled == expected.personal.pooled
