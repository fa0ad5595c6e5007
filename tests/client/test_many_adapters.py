"""Adapters of many sites at once, against the loop over sites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.adapters import for_sites
from fedhead.backbones.split import Tail, split
from fedhead.client.labelled_features import SiteRows
from fedhead.client.tails import LabelledActivations
from fedhead.client.training import train_heads
from fedhead.config import LocalConfig
from fedhead.data import IntArray
from fedhead.heads import LinearHead, TunedHead
from fedhead.heads.tail import ELEMENTS_TOGETHER, LEAST_FILLED
from fedhead.tasks.losses import CrossEntropy
from fedhead.tuning import parse_tune

from ..common.backbones.test_hf import saved_text_model, saved_vision_model

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, WIDTH, ROWS = 3, 16, 70
SGD = LocalConfig(epochs=2, batch_size=4, lr=0.05, momentum=0.9, weight_decay=0.01)


class Rows:
    """Activations of random rows: sequences of one to 30 tokens, or images of 17 patches."""

    def __init__(self, *, sequences: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sequences = sequences
        self.values = torch.randn(ROWS, 30 if sequences else 17, WIDTH, generator=generator)
        self.lengths = torch.randint(1, 31, (ROWS,), generator=generator)

    def take(self, rows: IntArray) -> Tensor:
        values = self.values[torch.from_numpy(rows)]
        if not self.sequences:
            return values
        lengths = self.lengths[torch.from_numpy(rows)]
        mask = (torch.arange(30) < lengths[:, None]).float()[..., None]
        return torch.cat([values * mask, mask], -1)[:, : int(lengths.max())]


class Alone(TunedHead):
    """Trains one site at a time."""

    def together(self, rows: int) -> int:
        return 1


def made(kind: str, folder: Path, tune: str) -> tuple[Tail, Rows]:
    saved = saved_vision_model(folder, "vit") if kind == "vit" else saved_text_model(folder, kind)
    backbone: Backbone = load_backbone(f"hf:{saved}")
    return split(backbone, parse_tune(tune)).tail, Rows(sequences=kind != "vit")


def sites() -> list[SiteRows]:
    ends = [0, 11, 20, 26, 33, 40, 52, 70]
    return [SiteRows(f"site-{at}", np.arange(ends[at], ends[at + 1])) for at in range(len(ends) - 1)]


@pytest.mark.parametrize(("kind", "tune"), [("bert", "lora:2"), ("gpt2", "lora:2:ffa@last:1"), ("vit", "lora:2")])
@pytest.mark.parametrize("adjusted", [False, True])
def test_many_sites_at_once_train_as_one_after_the_other(tmp_path: Path, kind: str, tune: str, adjusted: bool) -> None:
    tail, rows = made(kind, tmp_path, tune)
    assert tail.takes_sites
    head = LinearHead(WIDTH, CLASSES)
    head.randomise(torch.Generator().manual_seed(2))
    scale = (torch.full((WIDTH,), 0.1), torch.full((WIDTH,), 0.7))
    labels = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    shares = torch.tensor([0.2, 0.3, 0.5]) if adjusted else None
    data = LabelledActivations(torch.zeros(ROWS, 1), labels, loss=CrossEntropy(), store=rows, shares=shares)  # type: ignore[arg-type]
    together, alone = (type_(tail, head, scale, sequences=rows.sequences, decay=2.0) for type_ in (TunedHead, Alone))
    assert together.together(4) > len(sites())
    incoming = together.trainable()
    one, other = (train_heads(way, incoming, data, sites(), SGD, seed=3, round_number=1) for way in (together, alone))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
    for name, value in other.parameters.items():
        moved = (value - incoming[name]).norm()
        assert moved > 0
        assert (one.parameters[name] - value).norm() < 1e-4 * moved, name


def test_stages_of_a_schedule_train_some_of_the_adapters(tmp_path: Path) -> None:
    tail, rows = made("bert", tmp_path, "lora:2")
    names = [name for name in tail.trainable() if ".layer.1." in name]
    assert 0 < len(names) < len(tail.trainable())
    heads = [type_(tail, LinearHead(WIDTH, CLASSES), sequences=True, names=names) for type_ in (TunedHead, Alone)]
    for value in heads[0].head.parameters():
        nn.init.normal_(value)
    heads[1].head.assign(heads[0].head.trainable())
    labels = torch.arange(ROWS) % CLASSES
    data = LabelledActivations(torch.zeros(ROWS, 1), labels, loss=CrossEntropy(), store=rows)  # type: ignore[arg-type]
    one, other = (train_heads(way, heads[0].trainable(), data, sites(), SGD, seed=3, round_number=1) for way in heads)
    for name, value in other.parameters.items():
        torch.testing.assert_close(one.parameters[name], value, rtol=1e-4, atol=1e-5)


def test_sites_are_computed_at_once_if_their_lengths_are_alike(tmp_path: Path) -> None:
    tail, _ = made("bert", tmp_path, "lora:2")
    head = TunedHead(tail, LinearHead(WIDTH, CLASSES), sequences=True)
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0))
    features = torch.zeros(40, 4, 60, WIDTH + 1)
    features[..., -1] = (torch.arange(60) < lengths[:, None]).float()[:, None]
    groups = head._groups(features)
    assert sorted(torch.cat([sites for sites, _ in groups]).tolist()) == list(range(40))
    for sites, length in groups:
        assert int(lengths[sites].max()) == length
        assert int(lengths[sites].min()) >= LEAST_FILLED * length
        assert len(sites) == 1 or len(sites) * 4 * length <= ELEMENTS_TOGETHER
    assert len(groups) < 40


def test_memory_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    tail, _ = made("bert", tmp_path, "lora:2")
    head = TunedHead(tail, LinearHead(WIDTH, CLASSES), sequences=True)
    assert [head.together(rows) * rows <= 128 for rows in (1, 4, 32, 128)] == [True] * 4
    assert head.together(500) == 1


def test_other_layers_train_one_site_at_a_time(tmp_path: Path) -> None:
    convolutions = split(load_backbone("bundled:glyphnet"), parse_tune("lora:2")).tail
    full, _ = made("bert", tmp_path, "last:1")
    for tail, width in ((convolutions, 64), (full, WIDTH)):
        assert not tail.takes_sites
        assert TunedHead(tail, LinearHead(width, CLASSES)).together(1) == 1


class Mixing(nn.Module):
    """A layer that reads other rows than its own, as no adapter of one site may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = self.inner(values.flip(0), mask)
        return output


def test_models_that_mix_rows_are_found_out(tmp_path: Path) -> None:
    tail, rows = made("bert", tmp_path, "lora:2")
    values = rows.take(np.arange(5))
    tail.prefix, tail.module = "module.inner.model.", Mixing(tail.module)
    tail._many = ()
    tail.join_sites(values[..., :-1], values[..., -1])
    assert not tail.takes_sites


def test_peft_layers_of_other_kinds_are_left_as_they_are() -> None:
    tail = split(load_backbone("bundled:glyphnet"), parse_tune("lora:2")).tail
    before = [type(module) for module in tail.module.modules()]
    assert not for_sites(tail.module)
    assert [type(module) for module in tail.module.modules()] == before
