import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("matplotlib")

from fedhead.backbones.glyphnet import GlyphNet
from fedhead.simulations import glyphs, pretrain
from fedhead.simulations.glyphs import ALPHABET, FACES, LOOK_ALIKES, GlyphBank, draw, letter_of, thin
from fedhead.simulations.pretrain import few_shot, train


@pytest.fixture(scope="module")
def bank() -> GlyphBank:
    return GlyphBank.build(("cmr10", "cmsy10"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_alphabet_is_letters_and_nothing_that_passes_for_a_digit() -> None:
    assert {unicodedata.category(letter) for letter in ALPHABET} <= {"Lu", "Ll", "Lo"}
    assert not any(unicodedata.numeric(letter, None) for letter in ALPHABET)
    assert not set(ALPHABET) & set("".join(LOOK_ALIKES.values()))
    assert len(set(ALPHABET)) == len(ALPHABET)


@pytest.mark.parametrize("face", FACES)
def test_no_character_that_unicode_counts_as_a_number_is_drawn(face: str) -> None:
    drawn = [character for character in map(chr, range(0x110000)) if letter_of(character, face)]
    assert all(unicodedata.category(character)[0] == "L" for character in drawn)
    assert not any(unicodedata.normalize("NFKC", character).isnumeric() for character in drawn)


def test_styles_of_a_letter_are_the_letter() -> None:
    assert letter_of("\N{MATHEMATICAL SCRIPT CAPITAL A}", "STIXGeneral") == "A"
    assert letter_of("\N{MATHEMATICAL BOLD DIGIT THREE}", "STIXGeneral") == ""
    assert letter_of("a", "cmsy10") == ""


def test_a_bank_holds_every_letter_of_its_faces(bank: GlyphBank) -> None:
    latin = {letter for letter in glyphs.LATIN if letter in ALPHABET}
    assert {letter for alike in bank.classes for letter in alike} == latin
    assert len(bank.labels) == len(latin) + len(latin & set(glyphs.LATIN_CAPITALS))
    assert set(bank.labels.tolist()) == set(range(len(bank.classes)))
    assert (bank.pen.flatten(1).amin(1) == 0).all()
    assert (bank.outline.flatten(1).amin(1) < 0).all()


def test_letters_of_one_shape_are_one_class() -> None:
    bar = torch.zeros(8, 8, dtype=torch.bool)
    bar[:, 3:5] = True
    masks = {"A": bar, "B": bar.T, "C": bar.clone()}
    assert glyphs._merge_alike(["A", "B", "C", "D"], masks) == ["AC", "B", "D"]


def test_classes_are_sampled_alike(bank: GlyphBank) -> None:
    labels = bank.labels[bank.sample(20_000, seeded(0))]
    shares = torch.bincount(labels) / len(labels) * len(bank.classes)
    assert shares.min() > 0.8
    assert shares.max() < 1.2


def test_drawing_is_decided_by_the_seed(bank: GlyphBank) -> None:
    rows = bank.sample(32, seeded(0))
    grids = draw(bank, rows, seeded(1))
    assert grids.shape == (32, 1, 16, 16)
    assert grids.min() >= 0
    assert grids.max() <= 1
    assert 0.1 < grids.mean() < 0.45
    assert torch.equal(grids, draw(bank, rows, seeded(1)))
    assert not torch.equal(grids, draw(bank, rows, seeded(2)))


def test_a_coarse_grid_shows_less_than_a_fine_one(bank: GlyphBank) -> None:
    rows = bank.sample(64, seeded(0))
    coarse, fine = (draw(bank, rows, seeded(1), [side]) for side in (8, 28))
    assert coarse.diff(dim=-1).abs().mean() < fine.diff(dim=-1).abs().mean()


def test_a_thinned_bar_is_a_line() -> None:
    bar = torch.zeros(1, 64, 64, dtype=torch.bool)
    bar[0, 10:50, 20:29] = True
    line = thin(bar)
    assert not (line & ~bar).any()
    assert 25 < line.sum() < 45
    assert (line[0, 20:40].sum(1) == 1).all()


def test_distance_is_euclidean_up_to_its_reach() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 30, 30] = True
    found = glyphs._distance(mask)[0]
    assert found[30, 30] == 0
    assert found[33, 34] == 5
    assert found[30, 63] == glyphs.REACH


def test_a_short_training_beats_pixels_and_folds(bank: GlyphBank) -> None:
    net = train(bank, images=2048, seed=0, batch=64)
    rows = bank.sample(1000, seeded(3))
    inputs = (draw(bank, rows, seeded(4), [16]) - pretrain.MEAN) / pretrain.STD
    with torch.no_grad():
        features = net(inputs)
    assert features.mean(0).abs().max() < 1
    assert 0.8 < features.std() < 1.2
    learnt, raw = (few_shot(rows_of, bank.labels[rows], 10, splits=1) for rows_of in (features, inputs.flatten(1)))
    assert all(learnt[head] > raw[head] for head in raw)


def test_training_is_decided_by_the_seed_and_leaves_the_global_generator_alone(bank: GlyphBank) -> None:
    before = torch.get_rng_state()
    first, again, other = (train(bank, images=64, seed=seed, batch=32) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.features.weight, other.features.weight)


def test_the_command_writes_a_file_that_loads(
    bank: GlyphBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GlyphBank, "build", lambda: bank)
    out = tmp_path / "glyphnet.safetensors"
    threads = torch.get_num_threads()
    pretrain.main(out, seed=0, images=64, threads=threads, judge=False)
    GlyphNet().load_state_dict(load_file(out), strict=True)
    assert f"Wrote {out}" in capsys.readouterr().out
