from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources, load_backbone
from fedhead.backbones.state_dict import read_weights
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.errors import FedheadError, UserError


def image(height: int = 30, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("spec", ["bundled:glyphnet", "bundled:pixels", "torchvision:squeezenet1_1"])
def test_frozen_backbone_is_reproducible_without_gradient(spec: str) -> None:
    backbone = load_backbone(spec, weights="random")
    batch = torch.stack([backbone.preprocessing(image())] * 3)
    digest = backbone.weights_digest
    first = backbone.features(batch)
    assert torch.equal(first, backbone.features(batch))
    assert first.shape == (3, backbone.num_features)
    assert not first.requires_grad
    assert not backbone.module.training
    assert load_backbone(spec, weights="random").to(torch.device("cpu")).weights_digest == digest


def test_batch_norm_buffers_are_constant() -> None:
    backbone = load_backbone("torchvision:resnet18", weights="random")
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    backbone.features(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in backbone.module.state_dict().items())


def test_saved_backbone_round_trips(tmp_path: Path) -> None:
    backbone = load_backbone("torchvision:squeezenet1_1", weights="random", layer="features.9.cat", seed=3)
    backbone.save(tmp_path / "b.safetensors")
    loaded = Backbone.load(tmp_path / "b.safetensors")
    assert (loaded.digest, loaded.layer) == (backbone.digest, "features.9.cat")
    assert torch.equal(loaded.probe(), backbone.probe())


def test_saving_a_backbone_without_weights(tmp_path: Path) -> None:
    backbone = load_backbone("bundled:pixels")
    backbone.save(tmp_path / "b.safetensors")
    assert Backbone.load(tmp_path / "b.safetensors").digest == backbone.digest
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="x"):
        load_backbone("bundled:pixels", weights=str(tmp_path / "b.safetensors"))


def test_error_for_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedhead.backbones.backbone.save_file", fail)
    with pytest.raises(FedheadError, match="disk is full"):
        load_backbone("bundled:glyphnet").save(tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_modified_saved_backbone_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    load_backbone("bundled:glyphnet").save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="another backbone"):
        Backbone.load(path)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="cannot be read"):
        Backbone.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a backbone"):
        Backbone.load(path)


def test_digests_cover_weights_layer_and_preprocessing() -> None:
    def made(seed: int = 0, mean: float = 0.5, layer: str = "penultimate") -> Backbone:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        return Backbone("x:y", module, ImagePreprocessing(3, (2, 2), None, (mean,) * 3, (1.0,) * 3), layer=layer)

    reference = made()
    assert made().digest == reference.digest
    assert made(seed=1).weights_digest != reference.weights_digest
    for other in (made(seed=1), made(mean=0.4), made(layer="other")):
        assert other.digest != reference.digest
    assert made(mean=0.4).weights_digest == reference.weights_digest


def test_grey_images_become_three_equal_channels() -> None:
    preprocessing = ImagePreprocessing(3, (4, 4), None, (0.0,) * 3, (1.0,) * 3)
    grey = preprocessing(Image.new("L", (9, 5), 51))
    assert torch.allclose(grey, torch.full((3, 4, 4), 0.2))


@pytest.mark.parametrize("save", ["safetensors", "state dict", "nested", "model", "parallel"])
def test_weights_file_without_classifier(tmp_path: Path, save: str) -> None:
    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    expected = {name: value for name, value in state.items() if name.startswith("features.")}
    if save == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(expected, path)
    else:
        path = tmp_path / "w.pth"
        saved = {
            "state dict": state,
            "nested": {"epoch": 3, "state_dict": state},
            "model": {"model": state, "optimizer": {"lr": 0.1}},
            "parallel": {f"module.{name}": value for name, value in state.items()},
        }
        torch.save(saved[save], path)
    backbone = load_backbone("torchvision:squeezenet1_1", weights=str(path))
    assert backbone.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.tensors().items())


def test_error_names_keys_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    load_backbone("torchvision:squeezenet1_0", weights="random").save(path)
    with pytest.raises(UserError, match=r"squeezenet1_1; missing: .*unknown: .*shape: features\.0\.weight|features\.0"):
        load_backbone("torchvision:squeezenet1_1", weights=str(path))
    with pytest.raises(UserError, match="not those of bundled:glyphnet"):
        load_backbone("bundled:glyphnet", weights=str(path))


def test_error_names_only_weights_of_another_shape(tmp_path: Path) -> None:
    tensors = load_backbone("torchvision:mnasnet0_5", weights="random").tensors()
    save_file({**tensors, "layers.0.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"mnasnet0_5; of another shape: layers\.0\.weight is \[3, 3\], not \[16, 3"
    ) as caught:
        load_backbone("torchvision:mnasnet0_5", weights=str(tmp_path / "w.safetensors"))
    assert "batches" not in str(caught.value)


def test_errors_for_files_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"contain Python objects.*whole saved model.*state_dict\(\)"):
        read_weights(str(path))
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no named tensors"):
        read_weights(str(path))
    torch.save(nn.Linear(200, 200).state_dict(), path)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match="truncated"):
        read_weights(str(path))
    save_file({"x": torch.zeros(100)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("spec", ["bundled:glyphnet", "torchvision:inception_v3", "timm:test_vit"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 40)])
def test_small_images_are_enlarged(spec: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = load_backbone(spec, weights="random")
    features = backbone.features(backbone.preprocessing.collate([backbone.preprocessing(image(*size))]))
    assert features.shape[0] == 1


def test_pickle_with_code_is_rejected(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"x": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="neither safetensors nor a plain state dict"):
        read_weights(str(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spec": "glyphnet"}, "source:name"),
        ({"spec": "bundeld:glyphnet"}, "Did you mean 'bundled'"),
        ({"spec": "bundled:glyphent"}, "Did you mean 'glyphnet'"),
        ({"spec": "bundled:glyphnet", "layer": "x"}, "only the layer 'penultimate'"),
        ({"spec": "bundled:pixels", "weights": "x"}, "no weights file 'x'"),
        ({"spec": "torchvision:resnet19"}, "Did you mean 'resnet1"),
        ({"spec": "torchvision:resnet18", "weights": "random", "layer": "layer5"}, "no layer 'layer5'. Did you mean"),
        ({"spec": "torchvision:resnet18", "weights": "/none.pth"}, "no weights file"),
    ],
)
def test_what_does_not_exist_is_a_sentence(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(**arguments)  # type: ignore[arg-type]


def test_download_error_lists_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(FedheadError, match=r"could not be downloaded.*--weights FILE") as caught:
        load_backbone("torchvision:mobilenet_v2")
    assert caught.value.exit_status == 1


def test_user_registered_source() -> None:
    @backbone_sources.register("ours")
    def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
        return Backbone(f"ours:{name}", nn.Flatten(), ImagePreprocessing(1, (4, 4), None, (0.0,), (1.0,)))

    assert load_backbone("ours:tiny").num_features == 16


def test_installed_weights_are_verified_kept_and_found(install_weights: Callable[[bytes, str], Path]) -> None:
    backbone = load_backbone("torchvision:squeezenet1_1", weights="random", seed=9)
    blob, digest = backbone.to_bytes(), backbone.weights_digest
    assert find_backbone(backbone.spec, backbone.layer, digest) is None
    for damaged in (blob[:-1] + bytes([blob[-1] ^ 1]), blob[:50]):
        with pytest.raises(FedheadError, match="weights that arrived"):
            install_weights(damaged, digest)
        assert not weights_path(digest).exists()
    install_weights(blob, digest)
    found = find_backbone(backbone.spec, backbone.layer, digest)
    assert found is not None
    assert found.digest == backbone.digest
    assert load_file(weights_path(digest)).keys() == backbone.tensors().keys()


def test_bundled_weights_are_always_available() -> None:
    glyphnet = load_backbone("bundled:glyphnet")
    assert find_backbone(glyphnet.spec, glyphnet.layer, glyphnet.weights_digest) is not None
    assert find_backbone(glyphnet.spec, glyphnet.layer, "0" * 64) is None
