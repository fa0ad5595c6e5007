"""Every classification model of torchvision's, against torchvision's own forward pass and transforms."""

import socket
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.backbone import default_maps
from fedhead.backbones.torchvision import preprocessing_of
from fedhead.errors import FedheadError, UserError
from fedhead.features.extraction import arranged

MODELS = torchvision.models.list_models(module=torchvision.models)
FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"),
    *("squeezenet1_0", "swin_t", "vgg16", "vit_b_16"),
)
CHEAP = 0.45
"""In 1e9 multiplications per image: what is run for real unless slow tests are asked for."""


def image(height: int = 40, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def operations(name: str) -> float:
    return float(get_model_weights(name).DEFAULT.meta["_ops"])


def sized(names: list[str], limit: float) -> list[Any]:
    """Return parameters of a test, those slow that take more than CHEAP; none that take more than `limit`."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if operations(name) > CHEAP else [])
        for name in names
        if operations(name) <= limit
    ]


def classifier_input(model: nn.Module, batch: Tensor) -> Tensor:
    """Return what torchvision's own forward pass gives to the model's last linear layer or convolution."""
    seen: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model.eval()(batch)
    return seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let modules have parameters without memory, so that the largest model costs no more than the smallest."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter if parameter is None else nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(nn.Module, "register_parameter", register_meta)
    yield


def test_there_are_eighty_models() -> None:
    assert len(MODELS) >= 80
    assert set(FAMILIES) <= set(MODELS)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAMILIES else [pytest.mark.slow]) for name in MODELS]
)
def test_every_model_returns_its_classifiers_input(name: str) -> None:
    """On the meta device, where shapes are computed and values are not: vit_h_14 has 2.5 GB of weights."""
    backbone = load_backbone(f"torchvision:{name}", weights="random")
    backbone.to(torch.device("meta"))
    features = backbone.features(torch.empty(2, 3, *backbone.preprocessing.size, device="meta"))
    model = torchvision.models.get_model(name, weights=None)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    assert features.shape == (2, getattr(classifier, "in_features", getattr(classifier, "in_channels", None)))
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert not any(module.training for module in backbone.module.modules())
    assert backbone.tensors().keys() <= model.state_dict().keys()
    assert not any(key.startswith(classifier_name(model)) for key in backbone.tensors())


def classifier_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1] + "."


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", sized(MODELS, limit=5))
def test_features_equal_the_classifiers_input(name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", weights="random", seed=5)
    options = {"transform_input": True, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(5)
    model = torchvision.models.get_model(name, weights=None, **options)
    batch = get_model_weights(name).DEFAULT.transforms()(image()).unsqueeze(0)
    features = backbone.features(backbone.preprocessing.collate([backbone.preprocessing(image())]))
    torch.testing.assert_close(features, classifier_input(model, batch), atol=1e-5, rtol=1e-5)
    assert torch.equal(features, backbone.features_of([image()]))


@pytest.mark.parametrize("size", [(50, 40), (31, 77), (5, 3)])
def test_preprocessing_equals_the_weights_transforms(size: tuple[int, int]) -> None:
    entries = [entry for name in MODELS for entry in get_model_weights(name)]
    differing = {repr(entry.transforms()): entry.transforms() for entry in entries}
    assert len(differing) > 20
    for transforms in differing.values():
        torch.testing.assert_close(
            preprocessing_of(transforms)(image(*size)), transforms(image(*size)), atol=1e-5, rtol=0
        )


def test_photograph_features_equal_torchvisions_pipeline(assets: Path) -> None:
    path = assets / "squeezenet1_1-imagenet.safetensors"
    backbone = load_backbone("torchvision:squeezenet1_1", weights=str(path))
    model = torchvision.models.squeezenet1_1(weights=None)
    model.load_state_dict(load_file(path), strict=False)
    transforms = get_model_weights("squeezenet1_1").DEFAULT.transforms()
    photographs = [Image.open(file) for file in sorted((assets / "flowers" / "val" / "roses").glob("*.jpg"))[:3]]
    batch = torch.stack([transforms(photograph) for photograph in photographs])
    torch.testing.assert_close(backbone.features_of(photographs), classifier_input(model, batch), atol=1e-5, rtol=1e-5)


def test_entry_selects_weights_and_preprocessing() -> None:
    default = load_backbone("torchvision:resnet50", weights="random")
    first = load_backbone("torchvision:resnet50.IMAGENET1K_V1", weights="random")
    assert default.preprocessing.describe()["resize"] == 232
    assert first.preprocessing.describe()["resize"] == 256
    assert first.weights_digest == default.weights_digest
    assert first.digest != default.digest
    with pytest.raises(UserError, match="Did you mean 'IMAGENET1K_V2' or 'IMAGENET1K_V1'"):
        load_backbone("torchvision:resnet50.IMAGENET1K_V3", weights="random")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", "Did you mean 'resnet1"),
        ("quantized_resnet18", "is quantized, which fedhead does not support; use torchvision:resnet18"),
        ("raft_large", "is a model for optical_flow, but a backbone must be a classification model or a detector"),
    ],
)
def test_errors_for_other_kinds_of_models(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(f"torchvision:{name}")


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_weights_with_and_without_auxiliary_heads_load(tmp_path: Path, name: str, auxiliary: bool) -> None:
    torch.manual_seed(3)
    model = torchvision.models.get_model(
        name, weights=None, transform_input=True, aux_logits=auxiliary, init_weights=False
    )
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(f"torchvision:{name}", weights=str(tmp_path / "w.safetensors"))
    assert not any("aux" in key.lower() for key in backbone.tensors())
    size = {"googlenet": 224, "inception_v3": 299}[name]
    batch = torch.rand(1, 3, size, size)
    assert backbone.preprocessing.size == (size, size)
    torch.testing.assert_close(backbone.features(batch), classifier_input(model, batch), atol=1e-5, rtol=1e-5)


def saved_as_before(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under the names that torchvision's own files of DenseNets and ViTs have."""
    old: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in model.state_dict().items():
        if "denselayer" in key:
            key = key.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.")
            key = key.replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.2.")
        if "mlp." in key:
            key = key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        old[key] = value
    assert old.keys() != model.state_dict().keys()
    return old


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "vit_b_32")])
def test_older_files_load_under_current_names(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    model = torchvision.models.get_model(name, weights=None)
    torch.save(saved_as_before(model), tmp_path / "w.pth")
    backbone = load_backbone(f"torchvision:{name}", weights=str(tmp_path / "w.pth"))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in backbone.tensors().items())


@pytest.mark.parametrize("name", ["mnasnet0_5", pytest.param("swin_v2_t", marks=pytest.mark.slow)])
def test_safetensors_with_versions_or_buffers(tmp_path: Path, name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", weights="random", seed=2)
    backbone.save(tmp_path / "b.safetensors")
    loaded = Backbone.load(tmp_path / "b.safetensors")
    assert loaded.digest == backbone.digest
    assert torch.equal(loaded.probe(), backbone.probe())


@pytest.mark.parametrize(
    ("layer", "width"),
    [("conv1", 64), ("layer3", 256), ("layer2.0", 128), ("layer4.1.bn2", 512), ("layer4.1.add", 512), ("flatten", 512)],
)
def test_layer_equals_the_module_and_limits_weights(layer: str, width: int) -> None:
    backbone = load_backbone("torchvision:resnet18", weights="random", layer=layer, seed=1)
    torch.manual_seed(1)
    model = torchvision.models.resnet18(weights=None).eval()
    batch = torch.rand(2, 3, 224, 224)
    assert backbone.num_features == width
    if layer in dict(model.named_modules()):
        seen: list[Tensor] = []
        model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        with torch.inference_mode():
            model(batch)
        torch.testing.assert_close(backbone.features(batch), seen[0].mean((2, 3)), atol=1e-5, rtol=1e-5)
    assert not any(key.startswith("fc") for key in backbone.tensors())
    if layer == "conv1":
        assert list(backbone.tensors()) == ["conv1.weight"]


def test_pooling_of_channels_last_maps() -> None:
    backbone = load_backbone("torchvision:swin_t", weights="random", layer="features.3")
    assert backbone.num_features == 192


# Where weights come from.


@pytest.fixture
def torch_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have an empty torch cache, and no way to any network."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("the network was touched")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_no_network_access_with_cached_weights(torch_home: Path) -> None:
    torch.manual_seed(4)
    model = torchvision.models.squeezenet1_1(weights=None)
    torch_home.mkdir(parents=True)
    url = get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save(model.state_dict(), torch_home / url.rpartition("/")[2])
    backbone = load_backbone("torchvision:squeezenet1_1")
    assert torch.equal(backbone.tensors()["features.0.weight"], model.state_dict()["features.0.weight"])


def test_missing_weights_error_lists_three_alternatives(torch_home: Path) -> None:
    with pytest.raises(FedheadError, match="the network was touched") as caught:
        load_backbone("torchvision:mobilenet_v2")
    assert caught.value.exit_status == 1
    for words in ("--weights FILE", "fedhead backbones fetch torchvision:mobilenet_v2", str(torch_home), "coordinator"):
        assert words in str(caught.value)


def test_error_names_truncated_cached_file(torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    path = torch_home / get_model_weights("squeezenet1_1").DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{path.name} are neither safetensors nor a plain state dict"):
        load_backbone("torchvision:squeezenet1_1")


def test_several_layers_are_joined() -> None:
    joined = load_backbone("torchvision:squeezenet1_1", weights="random", layer="features.9:max+penultimate", seed=1)
    single = [
        load_backbone("torchvision:squeezenet1_1", weights="random", layer=layer, seed=1)
        for layer in ("features.9:max", "penultimate")
    ]
    torch.testing.assert_close(joined.probe(), torch.cat([one.probe() for one in single], dim=1))
    assert joined.layer == "features.9:max+penultimate"
    # The taps share one network.
    assert joined.num_bytes == single[1].num_bytes
    assert joined.digest not in {one.digest for one in single}
    items = [Image.fromarray(np.full((40, 50, 3), level, np.uint8)) for level in (0, 90, 255)]
    torch.testing.assert_close(arranged(joined, 3).features_of(items), joined.features_of(items), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="torchvision's backbones only"):
        load_backbone("bundled:glyphnet", layer="penultimate+penultimate")


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ("maps", "features.3+features.6+features.13:map"),
        ("maps/8@416", "features.6+features.13+features.17:map@416"),
    ],
)
def test_maps_are_the_last_layers_at_each_stride(layer: str, named: str) -> None:
    """The convolution of single cells before the classifier, with its 1,280 channels, is none of them."""
    assert default_maps("torchvision:mobilenet_v2", layer) == named


@pytest.mark.parametrize("layer", ["maps/3", "maps/", "maps/8@7", "maps@x", "maps/64"])
def test_unknown_strides_and_sizes_of_maps_are_rejected(layer: str) -> None:
    with pytest.raises(UserError, match=r"The (finest stride|size)"):
        default_maps("torchvision:mobilenet_v2", layer)
