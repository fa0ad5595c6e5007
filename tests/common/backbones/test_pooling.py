import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.backbone import split_layer
from fedhead.backbones.pooling import pool, poolings
from fedhead.errors import UserError

SEQUENCES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
LENGTHS = (2, 4, 0)
MASK = torch.tensor([[int(place < length) for place in range(4)] for length in LENGTHS])


def test_poolings_of_sequences() -> None:
    assert torch.equal(pool(SEQUENCES, "mean"), SEQUENCES.mean(1))
    assert torch.equal(pool(SEQUENCES, "max"), SEQUENCES.amax(1))
    assert torch.equal(pool(SEQUENCES, "cls"), SEQUENCES[:, 0])
    assert torch.equal(pool(SEQUENCES, "last"), SEQUENCES[:, -1])
    assert torch.equal(pool(SEQUENCES, "flatten"), SEQUENCES.reshape(3, 20))


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_padding_is_ignored(pooling: str) -> None:
    padded = SEQUENCES.where(MASK.unsqueeze(-1) == 1, torch.inf)
    pooled = pool(padded, pooling, MASK)
    for row, length in enumerate(LENGTHS[:2]):
        torch.testing.assert_close(pooled[row : row + 1], pool(SEQUENCES[row : row + 1, :length], pooling))
    if pooling != "last":
        assert torch.equal(pooled[2], torch.zeros(5))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_maps_with_channels_first_or_last(pooling: str) -> None:
    maps = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    reference = maps.mean((2, 3)) if pooling == "mean" else maps.amax((2, 3))
    torch.testing.assert_close(pool(maps, pooling), reference)
    torch.testing.assert_close(pool(maps.permute(0, 2, 3, 1), pooling), reference)
    wide = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(pool(wide, "mean"), wide.mean((2, 3)))


@pytest.mark.parametrize("pooling", list(poolings))
def test_vectors_need_no_pooling(pooling: str) -> None:
    assert torch.equal(pool(SEQUENCES[0], pooling), SEQUENCES[0])


def test_invalid_poolings_are_rejected() -> None:
    for pooling in ("cls", "last"):
        with pytest.raises(UserError, match="for sequences; the layer gives maps"):
            pool(torch.zeros(1, 2, 3, 3), pooling)
    with pytest.raises(UserError, match="same number of positions"):
        pool(SEQUENCES, "flatten", MASK)
    with pytest.raises(UserError, match="Did you mean 'mean'"):
        load_backbone("bundled:glyphnet", layer="penultimate:meen")


def test_layer_name_ending_in_a_number() -> None:
    assert split_layer("hidden:3") == ("hidden:3", None)
    assert split_layer("hidden:3:max") == ("hidden:3", "max")
    assert split_layer("penultimate") == ("penultimate", None)
    assert split_layer(":cls") == ("penultimate", "cls")


def test_pooling_in_layer_name_and_digest() -> None:
    def loaded(layer: str) -> Backbone:
        return load_backbone("torchvision:squeezenet1_1", weights="random", layer=layer)

    mean, largest, flat = loaded("features.3"), loaded("features.3:max"), loaded("features.3:flatten")
    assert largest.layer == "features.3:max"
    assert len({mean.digest, largest.digest, flat.digest}) == 3
    assert mean.weights_digest == largest.weights_digest
    assert mean.num_features == largest.num_features == 128
    assert flat.num_features == 128 * 55 * 55
    batch = torch.rand(2, 3, 224, 224)
    assert (largest.features(batch) > mean.features(batch)).any()
    torch.testing.assert_close(flat.features(batch).reshape(2, -1, 128).amax(1), largest.features(batch))
    assert loaded(":max").layer == "penultimate:max"
