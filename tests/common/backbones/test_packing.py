import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.packing import WORTH, Packing
from fedhead.backbones.split import split
from fedhead.data.conversations import Conversation
from fedhead.tuning import NEXT_TOKEN, parse_tune

from .tiny_language_model import tiny_language_model

TALKS = [
    Conversation([("user", "x" * asked), ("assistant", "y" * answered)])
    for asked, answered in ((3, 4), (100, 40), (5, 9), (20, 1), (7, 7), (60, 2))
]


def mask_of(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_sequences_come_back_as_they_were(lengths: list[int]) -> None:
    mask = mask_of(lengths)
    packing = Packing.of(mask)
    if packing is None:
        return
    rows, width = packing.positions.shape
    assert width == max(lengths)
    assert sum(lengths) / width <= rows <= WORTH * len(lengths)
    values = torch.randn(*mask.shape, 3)
    packed = packing.pack(values)
    assert torch.equal(packing.unpack(packed)[mask > 0], values[mask > 0])
    # A sequence lies in one row, and its positions restart.
    places = packing.places[mask > 0].split(lengths)
    for length, own in zip(lengths, places, strict=True):
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + length))
        assert int(own[0]) // width == int(own[-1]) // width
        assert packing.positions.flatten()[own].tolist() == list(range(length))
    assert len(set(packing.places[mask > 0].tolist())) == sum(lengths)


def test_nothing_is_packed_that_saves_nothing() -> None:
    assert Packing.of(mask_of([5, 5, 5, 5])) is None
    assert Packing.of(mask_of([7])) is None
    assert Packing.of(mask_of([5, 3, 2, 5])) is not None


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    pytest.importorskip("transformers")
    folder = tiny_language_model(tmp_path_factory.mktemp(request.param), request.param)
    made = load_backbone(f"hf:{folder}", layer=NEXT_TOKEN)
    with torch.no_grad():
        # A new model hardly attends to anything.
        for parameter in made.module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return made


@pytest.mark.parametrize("where", ["last:1", "all"])
def test_packed_conversations_have_the_same_losses_and_gradients(backbone: Backbone, where: str) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune(f"lora:2@{where}"))
    values, mask = trunk.boundary(backbone.preprocessing.collate([backbone.preprocessing(talk) for talk in TALKS]))
    assert mask is not None
    above = tail.module
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in tail.trainable().items()
    }

    def found() -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs = tail.run(moved, values, mask)
        return outputs, list(torch.autograd.grad(outputs[:, 0].sum(), list(moved.values())))

    packed, slopes = found()
    assert above.packs is True
    above.packs = False
    apart, expected = found()
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-3)
    for own, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    # Each conversation alone gives the same loss, and in a row without bounds between them it would not.
    alone = torch.cat([tail.run(moved, values[row : row + 1], mask[row : row + 1]) for row in range(len(TALKS))])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-3)
    packing = Packing.of(mask)
    assert packing is not None
    width = packing.positions.shape[1]
    joined = Packing(packing.places, packing.mask, torch.arange(width).expand(len(packing.positions), width))
    with torch.no_grad():
        states = values[..., :-3]
        mixed = joined.unpack(above._packed(joined.pack(states), joined))[packing.mask]
        kept = packing.unpack(above._packed(packing.pack(states), packing))[packing.mask]
    assert float((mixed - kept).abs().max()) > 0.01


def test_a_model_that_mixes_neighbours_is_not_packed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune("lora:2@last:1"))
    values, mask = trunk.boundary(backbone.preprocessing.collate([backbone.preprocessing(talk) for talk in TALKS]))
    apart = tail.run(tail.trainable(), values, mask)
    above = tail.module
    above.packs = None

    def mixing(states: torch.Tensor, packing: Packing) -> torch.Tensor:
        return states.cumsum(1)

    monkeypatch.setattr(above, "_packed", mixing)
    torch.testing.assert_close(tail.run(tail.trainable(), values, mask), apart, rtol=1e-5, atol=1e-3)
    assert above.packs is False

    def failing(states: torch.Tensor, packing: Packing) -> torch.Tensor:
        raise TypeError("position_ids")

    above.packs = None
    monkeypatch.setattr(above, "_packed", failing)
    torch.testing.assert_close(tail.run(tail.trainable(), values, mask), apart, rtol=1e-5, atol=1e-3)
    assert above.packs is False


def test_conversations_of_several_sites_share_no_row(backbone: Backbone) -> None:
    pytest.importorskip("peft")
    trunk, tail = split(backbone, parse_tune("lora:2@last:1"))
    if not tail.takes_sites:
        pytest.skip("this model's adapters train at one site after the other")
    values, mask = trunk.boundary(backbone.preprocessing.collate([backbone.preprocessing(talk) for talk in TALKS]))
    assert mask is not None
    assert Packing.of(mask) is not None
    generator = torch.Generator().manual_seed(0)
    sites = [
        {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in tail.trainable().items()}
        for _ in range(2)
    ]
    apart = [tail.run(own, values[3 * at : 3 * at + 3], mask[3 * at : 3 * at + 3]) for at, own in enumerate(sites)]
    together = tail.run({name: torch.stack([one[name] for one in sites]) for name in sites[0]}, values, mask)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-3)
