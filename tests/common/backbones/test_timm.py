"""Models of timm's, against timm's own models and transforms."""

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.timm import preprocessing_of
from fedhead.errors import FedheadError, UserError

timm = pytest.importorskip("timm")


def image(height: int = 60, width: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """Return timm's own model without its classifier, and the batch that timm makes of `image()`."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model, transform(image()).unsqueeze(0)


@pytest.mark.parametrize(
    "name",
    [
        *("legacy_xception", "test_vit", "test_resnet", "test_efficientnet", "test_nfnet"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("xception41", "swin_tiny_patch4_window7_224")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "deit_tiny_distilled_patch16_224")),
    ],
)
def test_features_equal_timms_pipeline(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="random", seed=7)
    model, batch = reference(name, seed=7)
    features = backbone.features_of([image()])
    with torch.inference_mode():
        torch.testing.assert_close(features, model(batch), atol=1e-5, rtol=1e-5)
    assert torch.equal(features, backbone.features_of([image()]))
    assert backbone.num_features == model.num_features or name.startswith("test_eff")
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


def test_preprocessing_of_every_pretrained_model() -> None:
    configs: dict[str, dict[str, Any]] = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
        configs.setdefault(repr(sorted(config.items())), config)
    refused = 0
    for config in configs.values():
        try:
            own = preprocessing_of(config, "timm:x")
        except UserError as error:
            assert "border" in str(error)
            refused += 1
            continue
        if max(own.size) <= 260:
            transform = timm.data.create_transform(**config, is_training=False)
            for size in ((60, 50), (33, 71)):
                torch.testing.assert_close(own(image(*size)), transform(image(*size)), atol=1e-5, rtol=0)
    assert refused < 4
    assert len(configs) > 50


@pytest.mark.parametrize(
    ("name", "layer"), [("test_resnet", "layer2"), ("test_resnet", "layer3.0.conv1"), ("test_vit", "blocks.2")]
)
def test_layer_stops_the_model_and_limits_weights(tmp_path: Path, name: str, layer: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="random", layer=layer, seed=2)
    model, batch = reference(name, seed=2)
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.inference_mode():
        model(batch)
    expected = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0].mean(1)
    torch.testing.assert_close(backbone.features_of([image()]), expected, atol=1e-5, rtol=1e-5)
    assert 0 < backbone.num_parameters < sum(tensor.numel() for tensor in model.state_dict().values())
    assert backbone.tensors().keys() < model.state_dict().keys()
    backbone.save(tmp_path / "b.safetensors")
    assert torch.equal(Backbone.load(tmp_path / "b.safetensors").probe(), backbone.probe())


def test_all_weights_of_a_layer_are_sent() -> None:
    """With the weights that are not shipped spoilt, the features stay."""
    backbone = load_backbone("timm:test_vit", weights="random", layer="blocks.1.attn", seed=2)
    before = backbone.probe()
    state = backbone.module.module.state_dict()  # type: ignore[union-attr, operator]
    spoilt = {name: tensor for name, tensor in state.items() if name not in backbone.tensors()}
    assert {"blocks.1.mlp.fc1.weight", "blocks.2.norm1.weight"} < spoilt.keys()
    for tensor in spoilt.values():
        tensor.fill_(torch.nan)
    assert torch.equal(backbone.probe(), before)
    assert "cls_token" in backbone.tensors()


@pytest.mark.parametrize("pooling", ["cls", "max", "flatten"])
def test_poolings_of_a_sequence(pooling: str) -> None:
    backbone = load_backbone("timm:test_vit", weights="random", layer=f"blocks.2:{pooling}")
    tokens = (backbone.preprocessing.size[0] // 16) ** 2 + 1
    assert backbone.num_features == (64 * tokens if pooling == "flatten" else 64)


def test_timm_files_with_and_without_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=5)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    fine_tuned = load_backbone("timm:test_resnet", weights=str(path))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fine_tuned.tensors().items())
    fine_tuned.save(path)
    assert load_backbone("timm:test_resnet", weights=str(path)).digest == fine_tuned.digest


def test_original_files_use_timms_conversion(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_convnext")
    state = model.state_dict()
    original = {}
    for name, tensor in state.items():
        for new, old in (
            ("stem.", "downsample_layers.0."),
            (".conv_dw.", ".dwconv."),
            (".mlp.fc1.", ".pwconv1."),
            (".mlp.fc2.", ".pwconv2."),
            ("head.fc.", "head."),
            ("head.norm.", "norm."),
        ):
            name = name.replace(new, old)
        parts = name.split(".")
        if parts[0] == "stages" and parts[2] == "blocks":
            name = ".".join([*parts[:2], *parts[3:]])
        elif parts[0] == "stages" and parts[2] == "downsample":
            name = ".".join(["downsample_layers", *parts[1:2], *parts[3:]])
        original[name] = tensor
    torch.save({"model": original}, tmp_path / "w.pth")
    backbone = load_backbone("timm:test_convnext", weights=str(tmp_path / "w.pth"))
    assert all(torch.equal(value, state[key].reshape(value.shape)) for key, value in backbone.tensors().items())


def test_error_names_keys_of_another_model(tmp_path: Path) -> None:
    load_backbone("timm:test_vit", weights="random").save(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not those of timm:test_resnet; missing: bn1.*unknown: blocks\.0"):
        load_backbone("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("spec", "layer", "words"),
    [
        ("timm:xcepton", "penultimate", "Did you mean 'xception"),
        ("timm:xception41.tf_in2k", "penultimate", "Did you mean 'xception41.tf_in1k'"),
        ("timm:test_resnet", "layer9", "Did you mean 'layer"),
        ("timm:test_vit", "blocks.1.attn.q_norm.x", "has no layer"),
    ],
)
def test_what_does_not_exist_is_a_sentence(spec: str, layer: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(spec, weights="random", layer=layer)


def test_error_names_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'fedhead\[timm\]'"):
        load_backbone("timm:xception41")


# Where weights come from.


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have an empty hub cache and torch cache, and no way to any network."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("the network was touched")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_no_network_access_with_hub_cache(caches: Path, form: str) -> None:
    torch.manual_seed(3)
    state = timm.create_model("test_resnet").state_dict()
    repository = (
        caches / "hub" / f"models--{timm.models.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    )
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    if form.endswith("safetensors"):
        save_file(state, snapshot / form)
    else:
        torch.save(state, snapshot / form)
    backbone = load_backbone("timm:test_resnet")
    assert backbone.trained
    assert all(torch.equal(value, state[key]) for key, value in backbone.tensors().items())


def test_no_network_access_with_torch_cache(caches: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("legacy_seresnet18").state_dict()
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / timm.models.get_pretrained_cfg("legacy_seresnet18").url.rpartition("/")[2])
    backbone = load_backbone("timm:legacy_seresnet18")
    assert all(torch.equal(value, state[key]) for key, value in backbone.tensors().items())


@pytest.mark.parametrize("name", ["test_resnet", "legacy_seresnet18"])
def test_missing_weights_error_lists_three_alternatives(caches: Path, name: str) -> None:
    with pytest.raises(FedheadError) as caught:
        load_backbone(f"timm:{name}")
    assert caught.value.exit_status == 1
    for words in ("--weights FILE", f"fedhead backbones fetch timm:{name}", str(caches), "coordinator"):
        assert words in str(caught.value)


@pytest.mark.usefixtures("caches")
def test_error_for_model_without_weights() -> None:
    without = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(UserError, match=f"timm has no weights of timm:{without}"):
        load_backbone(f"timm:{without}")
