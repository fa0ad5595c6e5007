"""No row, and no group, moves any release of a private run further than its noise is made for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client.agreement import Agreement
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.private_sums import private_sums
from fedhead.client.release.guard import Guard
from fedhead.client.site_data import Holding, hold
from fedhead.config import RunConfig
from fedhead.privacy.sensitivity import unit_rows
from fedhead.privacy.stages import BIAS_FEATURE, CLIP, LOSS_LIMIT, TEMPERATURES, Stage, forms
from fedhead.protocol.messages import Manifest
from fedhead.protocol.private import PrivacyTerms, PrivateRequest
from fedhead.tasks import make_task

CLASSES, FEATURES = ("a", "b", "c"), 4
STAGES: tuple[Stage, ...] = ("centre", "lda", "nearest-mean", "gradient", "calibration", "evaluation")


def agreed(unit: str) -> Agreement:
    terms = PrivacyTerms(epsilon=1, delta=1e-5, unit=unit, noise="own", evaluate=0.2)  # type: ignore[arg-type]
    manifest = Manifest(
        run="r",
        backbone="b",
        layer="l",
        backbone_digest="0" * 64,
        weights_digest="0" * 64,
        num_features=FEATURES,
        classes=CLASSES,
        head="unit",
        holdout=0.2,
        seed=0,
        local=RunConfig().local,
        privacy=terms,
    )
    return Agreement(manifest, torch.full((2, FEATURES), 0.25), None)


def holding(features: torch.Tensor, labels: torch.Tensor, keys: np.ndarray[Any, Any], keep: Any) -> Holding:
    task = make_task("classification", CLASSES)
    rows = np.flatnonzero(keep)
    # The same rows train and are held out: each stage reads its own part.
    data = LabelledFeatures(features, labels, loss=task.loss)
    parts = [
        hold("s", rows, np.full(len(rows), out), data, labels.numpy(), keys, task, Guard.off()) for out in (False, True)
    ]
    return Holding(data, parts[0].train, parts[1].held_out, parts[1].held_out, parts[0].guarded, keys, keys, task)


def drawn(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of any size, some without length about the origin, and labels."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(rows, FEATURES)) * rng.choice([0, 1e-6, 1, 1e5], size=(rows, 1)))
    features[rng.random(rows) < 0.1] = 0.25
    return features.float(), torch.from_numpy(rng.integers(0, 3, rows))


def request_for(stage: Stage, seed: int) -> PrivateRequest:
    rng = np.random.default_rng(seed)
    shapes = {"shift": (FEATURES,), "weight": (3, FEATURES), "bias": (3,)}
    scale = float(rng.choice([0.3, 10, 1e5]))
    names = {"centre": (), "lda": ("shift",), "nearest-mean": ("shift",)}.get(stage, tuple(shapes))
    arrays = {name: (rng.normal(size=shapes[name]) * scale).astype(np.float32) for name in names}
    return PrivateRequest(stage, 0.5, arrays)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from(STAGES), st.sampled_from(["row", "group"]))
def test_no_unit_moves_a_release_beyond_its_sensitivity(seed: int, stage: Stage, unit: str) -> None:
    features, labels = drawn(seed, 12)
    keys = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5] if unit == "group" else range(12), dtype=np.uint64)
    request = request_for(stage, seed)
    whole = private_sums([holding(features, labels, keys, keys >= 0)], agreed(unit), request)
    for gone in np.unique(keys):
        less = private_sums([holding(features, labels, keys, keys != gone)], agreed(unit), request)
        for name, (_, _, sensitivity) in forms(stage, 3, FEATURES).items():
            assert np.linalg.norm(whole[name] - less[name]) <= sensitivity * (1 + 1e-9), (stage, name)


def test_sums_are_those_of_unit_rows_about_the_shift() -> None:
    features, labels = drawn(3, 50)
    keys = np.arange(50, dtype=np.uint64)
    request = request_for("lda", 1)
    sums = private_sums([holding(features, labels, keys, keys >= 0)], agreed("row"), request)
    rows = features.double().numpy() - 0.25
    for centre in (0, np.float64(request.arrays["shift"])):
        rows = rows - centre
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(lengths > 0, lengths, 1)
    assert sums["counts"].tolist() == np.bincount(labels, minlength=3).tolist()
    np.testing.assert_allclose(sums["sums"][1], rows[labels.numpy() == 1].sum(0), atol=1e-12)
    # svec keeps inner products: the trace of the squared Gram matrix is its squared norm.
    gram = rows.T @ rows
    assert np.sum(sums["gram"] ** 2) == pytest.approx(np.sum(gram**2))


def test_any_split_over_sites_gives_the_same_sums() -> None:
    features, labels = drawn(5, 40)
    keys = np.arange(40, dtype=np.uint64)
    for stage in STAGES:
        request = request_for(stage, 2)
        parts = [holding(features, labels, keys, keys % 3 == part) for part in range(3)]
        whole = private_sums([holding(features, labels, keys, keys >= 0)], agreed("row"), request)
        together = private_sums(parts, agreed("row"), request)
        for name in whole:
            np.testing.assert_allclose(together[name], whole[name], atol=1e-9)


def test_calibration_compares_confidence_with_right_predictions() -> None:
    features, labels = drawn(11, 50)
    keys = np.arange(50, dtype=np.uint64)
    request = request_for("calibration", 7)
    sums = private_sums([holding(features, labels, keys, keys >= 0)], agreed("row"), request)
    rows = unit_rows(unit_rows(features.double() - 0.25) - torch.from_numpy(request.arrays["shift"]).double())
    logits = rows @ torch.from_numpy(request.arrays["weight"]).double().T + torch.from_numpy(request.arrays["bias"])
    right = float((logits.argmax(1) == labels).sum())
    for temperature, found in zip(TEMPERATURES, sums["excess"], strict=True):
        assert found == pytest.approx(float((logits / temperature).softmax(1).amax(1).sum()) - right)


def test_evaluation_counts_outcomes_losses_and_confidence() -> None:
    features, labels = drawn(7, 60)
    keys = np.arange(60, dtype=np.uint64)
    sums = private_sums([holding(features, labels, keys, keys >= 0)], agreed("row"), request_for("evaluation", 4))
    assert sums["outcomes"].sum() == 60
    assert sums["confusion"].trace() == sums["outcomes"][1]
    assert sums["reliability"].sum(1).tolist() == sums["outcomes"].tolist()
    assert 0 < sums["loss"][0] <= 60 * LOSS_LIMIT


def test_gradients_are_those_of_each_row_with_a_limited_norm() -> None:
    features, labels = drawn(13, 40)
    keys = np.arange(40, dtype=np.uint64)
    request = request_for("gradient", 6)
    sums = private_sums([holding(features, labels, keys, keys >= 0)], agreed("row"), request)
    shift, weight, bias = (torch.from_numpy(request.arrays[name]).double() for name in ("shift", "weight", "bias"))
    rows = unit_rows(unit_rows(features.double() - 0.25) - shift)
    total, limited = torch.zeros(3, FEATURES + 1, dtype=torch.float64), 0
    for row, label in zip(rows, labels, strict=True):
        head = [part.clone().requires_grad_() for part in (weight, bias)]
        loss = torch.nn.functional.cross_entropy((row @ head[0].T + head[1])[None], label[None])
        by_weight, by_bias = torch.autograd.grad(loss, head)
        own = torch.cat([by_weight, BIAS_FEATURE * by_bias[:, None]], dim=1)
        limited += float(own.norm()) > CLIP
        total += own / max(1.0, float(own.norm()) / CLIP)
    np.testing.assert_allclose(sums["gradient"], total.numpy(), atol=1e-9)
    assert 0 < limited < 40
