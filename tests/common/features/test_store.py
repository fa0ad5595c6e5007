import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fedhead.backbones import Backbone, TextPreprocessing, load_backbone
from fedhead.backbones.preprocessing import Batch
from fedhead.data import Samples, UnreadableSampleError, load_samples, samples_from_arrays, samples_from_texts
from fedhead.data.items import content_key
from fedhead.errors import FedheadError, UserError
from fedhead.features import extraction
from fedhead.features import store as features_module
from fedhead.features.store import FeatureStore


class Counting(Backbone):
    """A real backbone that counts the rows that went through it, or through what stands in for it."""

    def __init__(self) -> None:
        pixels = load_backbone("bundled:pixels")
        super().__init__(pixels.spec, pixels.module, pixels.preprocessing)
        self.batches: list[int] = []
        assert self.num_features == 3072
        self.batches.clear()

    @property
    def rows(self) -> int:
        return sum(self.batches)

    def features(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        self.batches.append(len(batch))
        return super().features(batch)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(features_module, "BLOCK", 16)
    yield


@pytest.fixture
def samples() -> Samples:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 12, 10), dtype=np.uint8)
    return samples_from_arrays(images, np.arange(50) % 3)


def direct(backbone: Backbone, samples: Samples) -> torch.Tensor:
    return backbone.features_of([samples.read(row) for row in range(len(samples))])


def test_features_equal_the_backbones_and_are_cached(tmp_path: Path, samples: Samples) -> None:
    backbone = Counting()
    store = FeatureStore.open(backbone, samples, root=tmp_path)
    assert torch.equal(store.features, direct(load_backbone("bundled:pixels"), samples))
    assert store.extracted == backbone.rows == 50
    again = FeatureStore.open(backbone, samples, root=tmp_path)
    assert (again.extracted, backbone.rows) == (0, 50)
    assert torch.equal(again.features, store.features)
    assert np.array_equal(again.keys, store.keys)


def test_stores_are_separate_by_data_and_backbone(tmp_path: Path, samples: Samples) -> None:
    backbone = Counting()
    first = FeatureStore.open(backbone, samples, root=tmp_path)
    images = [samples.read(row) for row in range(50)]
    images[7] = Image.new("L", (10, 12))
    other = samples_from_arrays(images, samples.labels)
    assert FeatureStore.open(backbone, other, root=tmp_path).path != first.path
    glyphnet = load_backbone("bundled:glyphnet", weights="random")
    assert FeatureStore.open(glyphnet, samples, root=tmp_path).path != first.path


def test_an_interrupted_extraction_resumes_at_the_last_block(tmp_path: Path, samples: Samples) -> None:
    class Interrupted(Counting):
        def features(self, batch: Batch) -> torch.Tensor:
            if self.rows >= 40:
                raise KeyboardInterrupt
            return super().features(batch)

    with pytest.raises(KeyboardInterrupt):
        FeatureStore.open(Interrupted(), samples, batch_size=8, root=tmp_path)
    backbone = Counting()
    store = FeatureStore.open(backbone, samples, batch_size=8, root=tmp_path)
    assert backbone.rows == store.extracted == 50 - 32
    assert torch.equal(store.features, direct(load_backbone("bundled:pixels"), samples))


@pytest.mark.parametrize("name", ["features.bin", "keys.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damaged_store_is_rebuilt(tmp_path: Path, samples: Samples, name: str, damage: str) -> None:
    backbone = Counting()
    good = FeatureStore.open(backbone, samples, root=tmp_path)
    expected = good.features.clone()
    path = good.path / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-9])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    store = FeatureStore.open(backbone, samples, root=tmp_path)
    assert torch.equal(store.features, expected)


def test_damaged_partial_store_restarts(tmp_path: Path, samples: Samples) -> None:
    good = FeatureStore.open(Counting(), samples, root=tmp_path)
    partial = good.path.with_suffix(".partial")
    good.path.rename(partial)
    (partial / "features.bin").write_bytes(b"short")
    meta = json.loads((partial / "meta.json").read_text())
    (partial / "meta.json").write_text(json.dumps({**meta, "done": 32, "checksums": meta["checksums"][:2]}))
    assert FeatureStore.open(Counting(), samples, root=tmp_path).extracted == 50


def with_unreadable(samples: Samples, broken: set[int]) -> Samples:
    def read(row: int) -> Image.Image:
        if row in broken:
            raise UnreadableSampleError(f"row {row} cannot be read.")
        return samples.read(row)

    return Samples("broken", samples.classes, samples.labels, read, samples.name, f"broken {broken}")


def test_unreadable_rows_are_skipped_and_reported(tmp_path: Path, samples: Samples) -> None:
    broken = with_unreadable(samples, {3, 20})
    for _ in range(2):
        store = FeatureStore.open(Counting(), broken, root=tmp_path)
        assert store.skipped == {3: "row 3 cannot be read.", 20: "row 20 cannot be read."}
        assert set(range(50)) - set(store.readable()) == {3, 20}
    kept = store.readable()
    assert torch.equal(store.features[kept], direct(load_backbone("bundled:pixels"), samples)[kept])
    with pytest.raises(UserError, match="row 3 cannot be read"):
        FeatureStore.open(Counting(), broken, root=tmp_path, strict=True)


def test_strict_data_stops_at_the_first_unreadable_row(tmp_path: Path, samples: Samples) -> None:
    with pytest.raises(UserError, match="row 3 cannot be read"):
        FeatureStore.open(Counting(), with_unreadable(samples, {3}), root=tmp_path, strict=True)


def test_data_without_readable_rows_is_rejected(tmp_path: Path, samples: Samples) -> None:
    with pytest.raises(FedheadError, match="None of the rows"):
        FeatureStore.open(Counting(), with_unreadable(samples, set(range(50))), root=tmp_path)


def test_full_disk_loses_nothing(tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = iter(range(100))

    def fsync(handle: int) -> None:
        if next(syncs) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module.os, "fsync", fsync)
    with pytest.raises(FedheadError, match="disk is full"):
        FeatureStore.open(Counting(), samples, root=tmp_path)
    monkeypatch.undo()
    store = FeatureStore.open(Counting(), samples, root=tmp_path)
    assert torch.equal(store.features, direct(load_backbone("bundled:pixels"), samples))


def test_error_for_unwritable_folder(tmp_path: Path, samples: Samples) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        FeatureStore.open(Counting(), samples, root=tmp_path / "file" / "below")


class Letters(Backbone):
    """Texts as the mean of their letters' vectors; counts the positions that were padding."""

    def __init__(self) -> None:
        torch.manual_seed(0)

        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(256, 5)

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                sequences: torch.Tensor = self.table(input_ids)
                return sequences

        super().__init__("letters:5", Module(), TextPreprocessing(lambda text: list(text.encode()), "letters"))
        self.padding = 0

    def features(self, batch: Batch) -> torch.Tensor:
        assert not isinstance(batch, torch.Tensor)
        self.padding += int((batch["attention_mask"] == 0).sum())
        return super().features(batch)


def test_texts_are_batched_by_length_and_keep_their_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdefg "), generator.integers(0, 60))) for _ in range(50)]
    backbone = Letters()
    samples = samples_from_texts(texts, np.arange(50) % 2)
    store = FeatureStore.open(backbone, samples, batch_size=4, root=tmp_path)
    alone = torch.cat([Letters().features_of([text]) for text in texts])
    assert torch.allclose(store.features, alone, atol=1e-6)
    assert store.keys.tolist() == [samples.key(row, text) for row, text in enumerate(texts)]
    as_they_come = Letters()
    for start in range(0, 50, 4):
        as_they_come.features_of(texts[start : start + 4])
    assert backbone.padding < as_they_come.padding / 2


def test_backbone_of_another_kind_is_rejected(tmp_path: Path, samples: Samples) -> None:
    with pytest.raises(UserError, match=r"letters:5 takes texts, but the data contains images\. Use an image backbone"):
        FeatureStore.open(Letters(), samples, root=tmp_path)
    with pytest.raises(UserError, match=r"takes images, but the data contains texts\. Use a text backbone"):
        FeatureStore.open(Counting(), samples_from_texts(["a", "b"], [0, 1]), root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_mixed_precision_features_are_close_and_stored_separately(
    tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "multiplies_halves", lambda device: True)
    glyphnet = load_backbone("bundled:glyphnet")
    exact = FeatureStore.open(glyphnet, samples, root=tmp_path)
    mixed = FeatureStore.open(glyphnet, samples, precision="mixed", root=tmp_path)
    assert mixed.path != exact.path
    assert mixed.features.dtype == torch.float32
    difference = (mixed.features - exact.features).abs().max() / exact.features.abs().max()
    assert 1e-6 < difference < 0.03


def test_features_have_the_same_bits_with_any_number_of_batches_at_once(
    tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    glyphnet = load_backbone("bundled:glyphnet")
    made = []
    for lanes in (1, 3):
        monkeypatch.setattr(extraction, "lanes_of", lambda backbone, lanes=lanes: lanes)
        made.append(FeatureStore.open(glyphnet, samples, root=tmp_path / str(lanes)))
    assert torch.equal(made[0].features, made[1].features)
    assert made[0].digest == made[1].digest


def test_contents_are_added_to_a_store_without_them(tmp_path: Path, samples: Samples) -> None:
    grouped = replace(samples, groups=[f"patient {row // 3}" for row in range(len(samples))])
    contents = [content_key(samples.read(row)) for row in range(len(samples))]
    store = FeatureStore.open(load_backbone("bundled:pixels"), grouped, root=tmp_path)
    assert store.contents.tolist() == contents
    assert len(set(store.keys.tolist())) == 17
    (store.path / "contents.bin").unlink()
    assert FeatureStore.open(Counting(), grouped, root=tmp_path).contents.tolist() == contents


def test_rows_that_do_not_fit_the_backbone_are_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("age,stage,ill\n41,I,0\n52,II,1\n,I,0\n63,I,1\n1e300,I,1\n")
    samples = load_samples(f"csv:{tmp_path}/rows.csv?label=ill&categories=stage")
    store = FeatureStore.open(load_backbone("identity:age,stage=I"), samples, root=tmp_path)
    assert store.features.tolist() == [[41, 1], [0, 0], [0, 0], [63, 1], [0, 0]]
    assert sorted(store.skipped) == [1, 2, 4]
    assert "line 3: A row has 'II' in the categorical column 'stage'" in store.skipped[1]
    assert "line 4: A row has no value in the column 'age'" in store.skipped[2]
    assert "too large for a feature" in store.skipped[4]
    with pytest.raises(UserError, match=r"A row has 'II' .* 3 rows are unreadable"):
        FeatureStore.open(load_backbone("identity:age,stage=I"), samples, root=tmp_path, strict=True)
    other = load_backbone("identity:stage=III")
    with pytest.raises(FedheadError, match=r"None of the rows .* The first: .* the model knows the levels 'III'"):
        FeatureStore.open(other, samples, root=tmp_path)
    assert len(FeatureStore.open(other, samples, root=tmp_path, empty=True).readable()) == 0
