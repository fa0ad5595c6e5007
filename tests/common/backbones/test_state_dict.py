import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.backbones.state_dict import align, read_weights
from fedhead.errors import UserError

NAME = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(torchvision.models.squeezenet1_1(weights=None).state_dict())


@pytest.fixture(scope="module")
def digest(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of(state, tmp_path_factory.mktemp("w"))


def digest_of(saved: Any, folder: Path) -> str:
    torch.save(saved, folder / "w.pth")
    return load_backbone(NAME, weights=str(folder / "w.pth")).weights_digest


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


CLASSIFIERS: dict[str, Any] = {
    "none": {},
    "of ten classes": {"classifier.1.weight": torch.zeros(10, 512, 1, 1), "classifier.1.bias": torch.zeros(10)},
    "of two layers": {"classifier.1.0.weight": torch.zeros(10, 512), "classifier.1.3.bias": torch.zeros(10)},
}


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_removed_classifier_is_ignored(state: dict[str, Tensor], digest: str, classifier: str, tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    assert digest_of({**body, **CLASSIFIERS[classifier]}, tmp_path) == digest


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "encoder_q.", "module.encoder_q.", "backbone.", "_orig_mod.", "net.module.", "any.thing.0."],
)
@pytest.mark.parametrize("nested", ["", "state_dict", "model_state_dict", "model"])
def test_prefix_is_removed_and_logged(
    state: dict[str, Tensor], digest: str, prefix: str, nested: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved: dict[str, Any] = prefixed(prefix, state)
    if nested:
        saved = {nested: saved, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": 0.1}}
    assert digest_of(saved, tmp_path) == digest
    assert f"the prefix '{f'{nested}.' if nested else ''}{prefix}' of its names is removed" in caplog.text


CHECKPOINTS: dict[str, Any] = {
    "MoCo": lambda s: {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": {
            **prefixed("module.encoder_q.", s),
            **prefixed("module.encoder_k.", other(s)),
            "module.queue": torch.zeros(4, 9),
        },
    },
    "DINO": lambda s: {
        "student": prefixed("module.backbone.", other(s)),
        "teacher": {**prefixed("backbone.", s), "head.mlp.0.weight": torch.zeros(3, 3)},
        "args": argparse.Namespace(arch="vit", lr=0.1),
    },
    "Lightning": lambda s: {
        "epoch": 1,
        "pytorch-lightning_version": "2.4",
        "hyper_parameters": {"lr": 0.1, "classes": ["a", "b"]},
        "state_dict": {**prefixed("model.backbone.", s), "model.head.weight": torch.zeros(2, 512)},
        "optimizer_states": [{"state": {}}],
    },
    "weights and their average": lambda s: {"model": s, "model_ema": other(s)},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_checkpoints_of_frameworks_are_read(
    state: dict[str, Tensor], digest: str, checkpoint: str, tmp_path: Path
) -> None:
    assert digest_of(CHECKPOINTS[checkpoint](state), tmp_path) == digest


def test_ambiguous_networks_are_rejected(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contain several copies of the network: 'left\.', 'right\.'"):
        digest_of({**prefixed("left.", state), **prefixed("right.", other(state))}, tmp_path)


def test_hint_for_a_prefix_that_nearly_fits(state: dict[str, Tensor], tmp_path: Path) -> None:
    broken = prefixed("body.", state)
    del broken["body.features.0.bias"]
    with pytest.raises(UserError, match=r"Without the prefix 'body\.', 51 of 52 names would fit \(missing: feat"):
        digest_of(broken, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_error_names_non_finite_weights(state: dict[str, Tensor], value: float, tmp_path: Path) -> None:
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["features.3.squeeze.weight"][0, 0] = value
    with pytest.raises(UserError, match=r"not all finite numbers: NaN or infinity in features\.3\.squeeze"):
        digest_of(broken, tmp_path)


@given(st.data())
def test_fitting_weights_are_unchanged(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.from_regex(r"[ab](\.[ab0]){0,3}", fullmatch=True), min_size=1, unique=True))
    needed = {name: torch.full((2,), float(row)) for row, name in enumerate(names)}
    prefix = data.draw(st.sampled_from(["", "a.", "m.", "b.b."]))
    extra = {f"z.{name}": tensor[:1] for name, tensor in needed.items()}
    given_weights = {**prefixed(prefix, needed), **extra}
    aligned = align(given_weights, needed, "w")
    if set(needed) <= set(given_weights) and all(given_weights[name].shape == needed[name].shape for name in needed):
        assert aligned == given_weights
    for name, tensor in needed.items():
        assert aligned[name].shape == tensor.shape


def test_plain_weights_log_nothing(state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        digest_of(state, tmp_path)
    assert caplog.text == ""
    assert read_weights(str(tmp_path / "w.pth")).keys() == state.keys()
