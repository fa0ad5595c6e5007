"""LoRA on a tail equals PEFT's own on the whole model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.pooling import pool
from fedhead.backbones.split import Tail, merged, split
from fedhead.errors import UserError
from fedhead.tuning import parse_tune

from .test_hf import saved_text_model
from .test_split import batch_of

peft = pytest.importorskip("peft")


@pytest.fixture
def bert(tmp_path: Path) -> Backbone:
    return load_backbone(f"hf:{saved_text_model(tmp_path, 'bert')}")


def steps(tail: Tail, values: Tensor, mask: Tensor | None, count: int = 3) -> dict[str, Tensor]:
    """Train a tail by SGD on the sum of squares of the features plus their first column."""
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in tail.trainable().items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        loss(tail.run(parameters, values, mask)).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in parameters.items()}


def loss(features: Tensor) -> Tensor:
    return features.square().mean() + features[:, 0].mean()


def test_training_equals_pefts_own(bert: Backbone) -> None:
    trunk, tail = split(bert, parse_tune("lora:2@last:1"), seed=3)
    batch = batch_of(bert)
    assert isinstance(batch, dict)
    values, mask = trunk.boundary(batch)
    initial = tail.trainable()
    torch.testing.assert_close(tail.run(initial, values, mask), bert.features(batch), rtol=0, atol=1e-6)
    trained = steps(tail, values, mask)
    names = {name.partition(".lora_")[0] for name in initial}
    assert all(name.startswith("encoder.layer.1.") for name in names) and len(names) == 6
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=sorted(names), lora_dropout=0.0)
    reference = peft.get_peft_model(bert.module.model, config).eval()  # type: ignore[arg-type]
    own = dict(reference.base_model.model.named_parameters())
    for name, tensor in initial.items():
        own[name].data.copy_(tensor)
    optimizer = torch.optim.SGD([own[name] for name in initial], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        states = reference(**batch).last_hidden_state
        loss(pool(states, bert.pooling, mask)).backward()
        optimizer.step()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, own[name].data, rtol=1e-5, atol=1e-7)
    assert any((trained[name] - initial[name]).abs().max() > 1e-4 for name in trained)


@pytest.mark.parametrize("tune", ["last:2", "bitfit", "norm", "lora:3", "lora:2:ffa@last:1"])
@pytest.mark.parametrize("spec", ["timm:test_resnet", "hf"])
def test_merged_backbone_gives_the_tuned_features(bert: Backbone, tmp_path: Path, spec: str, tune: str) -> None:
    backbone = bert if spec == "hf" else load_backbone(spec, weights="random")
    digest, before = backbone.weights_digest, backbone.probe()
    trunk, tail = split(backbone, parse_tune(tune))
    batch = batch_of(backbone)
    values, mask = trunk.boundary(batch)
    torch.manual_seed(0)
    trained = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tail.trainable().items()}
    whole = merged(backbone, tail, trained)
    expected = tail.run(trained, values, mask)
    torch.testing.assert_close(whole.features(batch), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, backbone.features(batch), rtol=1e-3, atol=1e-4)
    assert whole.weights_digest != digest and whole.digest != backbone.digest
    assert torch.equal(backbone.probe(), before)
    whole.save(tmp_path / "tuned.safetensors")
    again = Backbone.load(tmp_path / "tuned.safetensors")
    assert again.digest == whole.digest
    with pytest.raises(ValueError, match="not those of this tail"):
        merged(backbone, tail, dict(list(trained.items())[1:]))


def test_initial_adapters_depend_on_the_seed_alone(bert: Backbone) -> None:
    one, again, other = (split(bert, parse_tune("lora:2"), seed=seed).tail.trainable() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    frozen = split(bert, parse_tune("lora:2:ffa"), seed=1).tail
    assert frozen.trainable().keys() == {name for name in one if "lora_B" in name}
    named = {name.removeprefix(frozen.prefix): tensor for name, tensor in frozen.named_parameters()}
    assert all(torch.equal(named[name], one[name]) for name in one)


def test_layers_without_matrices_are_refused() -> None:
    backbone = load_backbone("timm:test_resnet", weights="random")
    with pytest.raises(UserError, match="have no linear layers or convolutions"):
        split(backbone, parse_tune("lora:4@layer4.0.bn1"))
    names = split(backbone, parse_tune("lora:4@last:1")).tail.trainable()
    assert names and all("conv" in name or "downsample" in name for name in names)
