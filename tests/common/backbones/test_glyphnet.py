"""The bundled weights: they load, they are small, and what they learnt from letters serves digits."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedhead.backbones.glyphnet import INPUT_SIZE, NUM_FEATURES, GlyphNet
from fedhead.simulations.pretrain import digits, few_shot

WEIGHTS = Path(str(files("fedhead.backbones") / "glyphnet.safetensors"))


@pytest.fixture(scope="module")
def net() -> GlyphNet:
    module = GlyphNet()
    module.load_state_dict(load_file(WEIGHTS), strict=True)
    return module.eval()


@pytest.fixture(scope="module")
def handwritten() -> tuple[Tensor, Tensor]:
    return digits()


def test_the_weights_are_float32_and_under_two_megabytes() -> None:
    assert {value.dtype for value in load_file(WEIGHTS).values()} == {torch.float32}
    assert WEIGHTS.stat().st_size < 2e6


@torch.no_grad()
def test_features_depend_on_their_own_row_only(net: GlyphNet) -> None:
    inputs = torch.randn(7, 1, INPUT_SIZE, INPUT_SIZE, generator=torch.Generator().manual_seed(0))
    features = net(inputs)
    assert features.shape == (7, NUM_FEATURES)
    assert features.dtype == torch.float32
    assert torch.equal(features, net(inputs))
    torch.testing.assert_close(features[2:3], net(inputs[2:3]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, net.train()(inputs))
    net.eval()


@torch.no_grad()
def test_children_run_in_order(net: GlyphNet) -> None:
    inputs = torch.randn(2, 1, INPUT_SIZE, INPUT_SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net(inputs), nn.Sequential(*net.children())(inputs))


@pytest.mark.parametrize("rows_per_class", [5, 20])
@torch.no_grad()
def test_few_shot_accuracy_exceeds_pixels(
    net: GlyphNet, handwritten: tuple[Tensor, Tensor], rows_per_class: int
) -> None:
    inputs, labels = handwritten
    ours = few_shot(net(inputs), labels, rows_per_class, splits=2)
    pixels = few_shot(inputs.flatten(1), labels, rows_per_class, splits=2)
    for head, accuracy in ours.items():
        assert accuracy > 0.93
        assert 1 - accuracy < 0.6 * (1 - pixels[head])


@torch.no_grad()
def test_features_of_digits_are_near_standard(net: GlyphNet, handwritten: tuple[Tensor, Tensor]) -> None:
    features = net(handwritten[0])
    assert features.mean().abs() < 0.2
    assert 0.7 < features.std() < 1.4
    assert features.std(0).min() > 0.3
