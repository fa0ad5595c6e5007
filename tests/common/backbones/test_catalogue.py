from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources, load_backbone
from fedhead.backbones.catalogue import catalogues, describe, entry_of, layers_of, search
from fedhead.backbones.weights import find_backbone, installed_weights
from fedhead.errors import UserError


def specs(pattern: str) -> list[str]:
    return [entry.spec for entry in search(pattern)]


def test_search_by_pattern_and_by_word() -> None:
    assert "timm:xception41.tf_in1k" in specs("timm:*xception*")
    assert all(spec.startswith("timm:") and "xception" in spec for spec in specs("timm:*xception*"))
    assert specs("torchvision:resnet1?") == ["torchvision:resnet18"]
    assert {"torchvision:vgg16", "timm:vgg16.tv_in1k"} < set(specs("vgg16"))
    assert specs("torchvision:resnet18") == ["torchvision:resnet18"]
    assert specs("bundled:*") == ["bundled:glyphnet", "bundled:logmel", "bundled:pixels"]
    assert specs("bundled:x*") == []
    with pytest.raises(UserError, match="cannot be listed"):
        specs("vectors:*")
    with pytest.raises(UserError, match="Did you mean 'torchvision'"):
        specs("torchvison:*")


def test_every_listed_name_has_an_entry() -> None:
    models = torchvision.models.list_models(module=torchvision.models)
    assert set(models) <= set(catalogues["torchvision"].names())
    assert "resnet50.IMAGENET1K_V1" in catalogues["torchvision"].names()
    for source in catalogues:
        for name in catalogues[source].names():
            entry = entry_of(f"{source}:{name}")
            assert entry is not None
            assert entry.spec == f"{source}:{name}"
            assert " x " in entry.input or "kHz" in entry.input


def test_metadata_of_weights() -> None:
    swag = entry_of("torchvision:vit_h_14")
    assert swag is not None
    assert (swag.input, swag.parameters, swag.weights) == ("518 x 518", 633470440, None)
    assert "SWAG" in str(swag.licence)
    xception = entry_of("timm:xception41.tf_in1k")
    assert xception is not None
    assert (xception.licence, xception.origin) == ("apache-2.0", "https://huggingface.co/timm/xception41.tf_in1k")
    glyphnet = entry_of("bundled:glyphnet")
    assert glyphnet is not None
    assert glyphnet.weights is not None
    assert glyphnet.weights.is_file()
    assert glyphnet.parameters == sum(p.numel() for p in load_backbone("bundled:glyphnet").module.parameters())
    assert entry_of("python:mine:net") is None


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        ("torchvision:squeezenet1_1", "penultimate"),
        ("torchvision:regnet_y_400mf", "penultimate"),
        ("torchvision:resnet18", "layer2:max"),
        ("timm:test_vit", "blocks.2:cls"),
        ("bundled:glyphnet", "penultimate"),
        ("bundled:pixels", "penultimate"),
    ],
)
def test_description_matches_the_built_backbone(spec: str, layer: str) -> None:
    described = describe(spec, layer, [Path("sent.safetensors")])
    backbone = load_backbone(spec, weights="random", layer=layer)
    assert described.num_features == backbone.num_features
    assert (described.num_parameters, described.num_bytes) == (backbone.num_parameters, backbone.num_bytes)
    assert (described.layer, described.kind) == (layer, "image")
    assert Path("sent.safetensors") in described.weights


def test_description_of_the_largest_model_allocates_no_weights() -> None:
    assert describe("torchvision:vit_h_14", "penultimate", []).num_bytes > 2.5e9


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:test_resnet"])
def test_every_listed_layer_of_a_small_model(spec: str) -> None:
    layers = layers_of(spec)
    assert len(layers) > 10
    for layer in layers[:: len(layers) // 8]:
        with torch.device("meta"):
            backbone = load_backbone(spec, weights="random", layer=layer)
        size = backbone.preprocessing.size  # type: ignore[attr-defined]
        assert backbone.features(torch.empty(2, 3, *size, device="meta")).shape[0] == 2


def test_description_of_a_source_without_catalogue() -> None:
    @backbone_sources.register("plain")
    def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
        return Backbone(f"plain:{name}", nn.Flatten(), ImagePreprocessing(1, (4, 4), None, (0.0,), (1.0,)))

    described = describe("plain:grey", "penultimate", [])
    assert (described.num_features, described.input, described.licence) == (16, "", None)
    assert layers_of("plain:grey") == ()


def test_weights_in_a_librarys_cache_need_not_be_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    torch.manual_seed(8)
    entry = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    cached = tmp_path / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), cached)
    backbone = load_backbone("torchvision:squeezenet1_1")
    digest = backbone.weights_digest
    found = find_backbone("torchvision:squeezenet1_1", "penultimate", digest)
    assert found is not None
    assert found.digest == backbone.digest
    assert find_backbone("torchvision:squeezenet1_1", "penultimate", "0" * 64) is None
    cached.write_bytes(cached.read_bytes()[:999])
    assert find_backbone("torchvision:squeezenet1_1", "penultimate", digest) is None


def test_installed_weights_are_found_by_their_spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path))
    assert installed_weights("bundled:glyphnet") == []
    load_backbone("bundled:glyphnet").save(tmp_path / "weights" / "a.safetensors")
    (tmp_path / "weights" / "b.safetensors").write_bytes(b"cut short")
    assert installed_weights("bundled:glyphnet") == [tmp_path / "weights" / "a.safetensors"]
    assert installed_weights("torchvision:resnet18") == []
