import hashlib

import pytest
import torch
from torch import Tensor, nn

from fedhead.backbones import Backbone, ImagePreprocessing, backbone_sources
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.simulations import rank


class Noise(nn.Module):
    """2,400 features that are fixed for an image and say nothing of it."""

    def forward(self, batch: Tensor) -> Tensor:
        rows = []
        for image in batch:
            seed = int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:7], "little")
            rows.append(torch.randn(2400, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows)


@backbone_sources.register("noise")
def load_noise(name: str, weights: str, layer: str, seed: int) -> Backbone:
    return Backbone(f"noise:{name}", Noise(), ImagePreprocessing(1, (8, 8), None, (0.5,), (0.5,)))


@pytest.mark.slow
def test_transfer_comes_first_and_wide_noise_last() -> None:
    config = RunConfig.from_values({"simulation": {"sites": 3, "partition": "iid"}})
    ranked = rank(["noise:wide", "bundled:pixels", "bundled:glyphnet"], config)
    assert [one.backbone for one in ranked] == ["bundled:glyphnet", "bundled:pixels", "noise:wide"]
    by_h_score = sorted(ranked, key=lambda one: -one.h_score)
    assert by_h_score[-1].backbone == "noise:wide"
    assert ranked[0].accuracy is not None
    assert ranked[1].accuracy is not None
    assert ranked[0].accuracy > ranked[1].accuracy > 0.9
    assert ranked[0].num_features == 192
    assert ranked[0].bytes_per_site < ranked[1].bytes_per_site


def test_every_backbone_is_checked_before_any_is_run() -> None:
    with pytest.raises(UserError, match="Did you mean 'glyphnet'"):
        rank(["bundled:glyphnet", "bundled:glyphnett"])
    with pytest.raises(UserError, match="Name one backbone"):
        rank([])
