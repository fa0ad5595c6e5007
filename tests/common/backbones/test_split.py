"""Trunk and tail together equal the whole backbone, wherever it is cut."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fedhead.backbones import Backbone, ImagePreprocessing, load_backbone
from fedhead.backbones.blocks import block_names
from fedhead.backbones.pooling import pool
from fedhead.backbones.split import blocks_of, split
from fedhead.errors import UserError
from fedhead.tuning import parse_tune

from .test_hf import TEXTS, saved_text_model, saved_vision_model

MODELS = torchvision.models.list_models(module=torchvision.models)
MOST_PARAMETERS = 90e6
LARGE_FAMILIES = ("vgg11",)
QUICK = ("squeezenet1_1", "shufflenet_v2_x0_5")


def batch_of(backbone: Backbone) -> dict[str, Tensor] | Tensor:
    items = TEXTS if backbone.kind == "text" else backbone.preprocessing.probes()
    batch = backbone.preprocessing.collate([backbone.preprocessing(item) for item in items])
    return batch if isinstance(batch, Tensor) else dict(batch)


def require_exact(backbone: Backbone, tune: str) -> None:
    trunk, tail = split(backbone, parse_tune(tune), check=False)
    batch = batch_of(backbone)
    values, mask = trunk.boundary(batch)
    whole = backbone.features(batch)
    with torch.no_grad():
        features = tail.run(tail.trainable(), values, mask)
    torch.testing.assert_close(features, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_every_torchvision_model_at_three_depths(name: str) -> None:
    parameters = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    if parameters > MOST_PARAMETERS and name not in LARGE_FAMILIES:
        pytest.skip("a smaller one of its family is tested")
    backbone = load_backbone(f"torchvision:{name}", weights="random")
    count = len(blocks_of(backbone))
    for depth in {1, min(4, count), count // 2}:
        require_exact(backbone, f"last:{depth}")


@pytest.mark.parametrize(
    "name",
    [
        *("test_vit", "test_resnet", "test_efficientnet", "test_convnext"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("swin_tiny_patch4_window7_224", "legacy_xception", "mixer_s16_224", "levit_128s", "test_nfnet")
        ),
    ],
)
def test_timms_families(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="random")
    for depth in (1, 3):
        require_exact(backbone, f"last:{depth}")


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert", "gpt2", "llama", "vit", "clip", "dinov2"])
def test_transformers_families(tmp_path: Path, name: str) -> None:
    save = saved_vision_model if name in ("vit", "clip", "dinov2") else saved_text_model
    folder = save(tmp_path, name)
    for layer in ("penultimate", "hidden:1"):
        backbone = load_backbone(f"hf:{folder}", layer=layer)
        for tune in ("last:1", "all"):
            require_exact(backbone, tune)


def test_last_blocks_mean_the_same_everywhere(tmp_path: Path) -> None:
    bert = load_backbone(f"hf:{saved_text_model(tmp_path, 'bert')}")
    assert [block.name for block in blocks_of(bert)] == ["encoder.layer.0", "encoder.layer.1"]
    squeezenet = blocks_of(load_backbone("torchvision:squeezenet1_1", weights="random"))
    assert [block.name for block in squeezenet[-4:]] == [f"features.{number}" for number in (9, 10, 11, 12)]
    assert squeezenet[-4].boundary == (256, 13, 13)
    assert sum(block.parameters for block in squeezenet) == 722_496
    vit = blocks_of(load_backbone("timm:test_vit", weights="random"))
    assert [block.name for block in vit] == ["patch_embed", *(f"blocks.{number}" for number in range(6))]
    resnet = torchvision.models.resnet18()
    assert block_names(resnet)[-3:] == ["layer4.0", "layer4.1", "fc"]


def test_gradients_equal_those_of_the_unfrozen_model(tmp_path: Path) -> None:
    for spec in ("timm:test_resnet", f"hf:{saved_text_model(tmp_path, 'bert')}"):
        backbone = load_backbone(spec, weights="random" if spec.startswith("timm") else "default")
        trunk, tail = split(backbone, parse_tune("last:1"))
        batch = batch_of(backbone)
        values, mask = trunk.boundary(batch)
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in tail.trainable().items()}
        tail.run(parameters, values, mask).square().sum().backward()
        named = dict(getattr(backbone.module, "model", backbone.module).named_parameters())
        for name in parameters:
            named[name].requires_grad_(True)
        inputs = {} if isinstance(batch, Tensor) else batch
        output = backbone.module(batch) if isinstance(batch, Tensor) else backbone.module(**inputs)
        pool(output, backbone.pooling, inputs.get("attention_mask")).square().sum().backward()
        for name, tensor in parameters.items():
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, named[name].grad, rtol=1e-4, atol=1e-5)


def test_trunk_has_its_own_key_and_leaves_the_backbone_alone() -> None:
    backbone = load_backbone("bundled:glyphnet")
    digest = backbone.digest
    one, two = (split(backbone, parse_tune(tune)) for tune in ("last:1", "last:2"))
    assert one.trunk.weights_digest == backbone.weights_digest
    assert len({digest, one.trunk.digest, two.trunk.digest}) == 3
    assert split(backbone, parse_tune("bitfit@last:2")).trunk.digest == two.trunk.digest
    with torch.no_grad():
        for parameter in one.tail.parameters():
            parameter.add_(1)
    fresh = load_backbone("bundled:glyphnet")
    assert torch.equal(backbone.probe(), fresh.probe())
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert not one.tail.train().training


def test_names_patterns_and_kinds_of_parameters() -> None:
    backbone = load_backbone("timm:test_resnet", weights="random")
    assert all(name.startswith("layer4.") for name in split(backbone, parse_tune("layer4")).tail.trainable())
    convolutions = split(backbone, parse_tune("layer[34].*conv?.weight")).tail.trainable()
    assert convolutions and all("conv" in name for name in convolutions)
    norm = split(backbone, parse_tune("norm@last:1")).tail.trainable()
    assert norm and all(".bn" in name or "downsample" in name for name in norm)
    biases = split(backbone, parse_tune("bitfit@last:2")).tail.trainable()
    assert biases and all(name.endswith(".bias") for name in biases)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.one(images)
        if maps.mean() > 0:
            maps = -maps
        return self.two(maps).mean((2, 3))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        return (self.left(maps) + self.right(maps)).mean((2, 3))


@pytest.mark.parametrize(
    ("backbone", "tune", "words"),
    [
        ("bundled:glyphnet", "last:99", "has 7 blocks, so 'last:99' is too many"),
        ("bundled:glyphnet", "stage9", "no layer 'stage9' with parameters. Did you mean 'stage3'"),
        ("bundled:glyphnet", "pool1", "no layer 'pool1' with parameters"),
        ("bundled:glyphnet", "norm", "no normalisation with scale and shift"),
        ("bundled:pixels", "last:1", "has no layers that could train"),
        ("identity:a,b", "last:1", "has no layers that could train"),
        ("bundled:glyphnet", "head", "nothing to cut"),
        (Branching(), "last:1", "decides by the values of tensors: Branching, line"),
        (Parallel(), "right", "2 tensors cross there, the outputs of stem, left"),
    ],
)
def test_what_cannot_be_cut_is_refused(backbone: str | nn.Module, tune: str, words: str) -> None:
    if isinstance(backbone, nn.Module):
        whole = Backbone("python:mine:encoder", backbone, ImagePreprocessing(3, (8, 8), None, (0.5,) * 3, (0.5,) * 3))
    else:
        whole = load_backbone(backbone)
    with pytest.raises(UserError, match=words):
        split(whole, parse_tune(tune))


def test_stages_train_more_and_more_of_the_deepest_tail() -> None:
    specs = [parse_tune(text) for text in ("head", "bitfit@last:1", "last:1", "last:2")]
    tail = split(load_backbone("bundled:glyphnet"), specs[-1], stages=specs).tail
    weight, bias = "features.weight", "features.bias"
    assert [set(names) for names in tail.stages[:3]] == [set(), {bias}, {bias, weight}]
    assert set(tail.stages[3]) == set(tail.trainable()) == set(tail.depths)
    assert (tail.depths[weight], tail.depths["stage3.2.weight"]) == (0, 1)


@pytest.mark.parametrize("stages", [("last:2", "last:1"), ("last:1", "last:1"), ("last:1", "bitfit@last:2")])
def test_a_schedule_out_of_order_is_refused(stages: tuple[str, str]) -> None:
    specs = [parse_tune(text) for text in stages]
    with pytest.raises(UserError, match="out of order"):
        split(load_backbone("bundled:glyphnet"), specs[-1], stages=specs)
