"""Whatever decides a cached value is in its key: change any one input, and the key changes."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedhead.backbones import Backbone, ImagePreprocessing, load_backbone
from fedhead.data import Samples, load_samples, samples_from_arrays, samples_from_numbers, samples_from_texts
from fedhead.features.store import FeatureStore, store_key

GENERATOR = np.random.default_rng(0)


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (8, 8), np.uint8)).save(content, "png")
    return content.getvalue()


def palette(colour: tuple[int, int, int], *, transparent: bool = False) -> Image.Image:
    image = Image.new("P", (8, 8))
    image.putpalette([0, 0, 0, *colour])
    image.putdata([1] * 64)
    if transparent:
        image.info["transparency"] = 1
    return image


def oriented(orientation: int) -> Image.Image:
    content, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(content, "jpeg", exif=exif, quality=100)
    return Image.open(content)


PIXELS = GENERATOR.integers(0, 256, (8, 8), dtype=np.uint8)
UNLIKE: list[tuple[str, Any, Any]] = [
    ("pixels", PIXELS, PIXELS ^ 1),
    ("shape", PIXELS, PIXELS.reshape(4, 16)),
    ("type", PIXELS, PIXELS.astype(np.uint16)),
    ("range of integers", PIXELS.astype(np.int32), PIXELS.astype(np.int32) + 256),
    ("palette", palette((255, 0, 0)), palette((0, 255, 0))),
    ("transparency", palette((255, 0, 0)), palette((255, 0, 0), transparent=True)),
    ("orientation", oriented(1), oriented(6)),
    ("mode", Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert("RGB")),
]


@pytest.mark.parametrize(("one", "other"), [pair[1:] for pair in UNLIKE], ids=[pair[0] for pair in UNLIKE])
def test_images_in_memory(one: Any, other: Any) -> None:
    assert _of(one).fingerprint == _of(one).fingerprint
    assert _of(one).fingerprint != _of(other).fingerprint


def _of(image: Any) -> Samples:
    return samples_from_arrays([image, image], [0, 1])


@given(st.data())
def test_annotations_in_memory(data: st.DataObject) -> None:
    annotation = {
        "labels": st.lists(st.integers(0, 3), min_size=4, max_size=4),
        "groups": st.lists(st.sampled_from([None, "a", "b"]), min_size=4, max_size=4),
        "texts": st.lists(st.sampled_from(["x", "y y", "z"]), min_size=4, max_size=4),
    }
    given_values = {name: data.draw(strategy) for name, strategy in annotation.items()}
    changed = data.draw(st.sampled_from(sorted(annotation)))
    other = {**given_values, changed: data.draw(annotation[changed])}

    def fingerprint(values: dict[str, Any]) -> str:
        return samples_from_texts(values["texts"], values["labels"], groups=values["groups"]).fingerprint

    assert (fingerprint(given_values) == fingerprint(other)) == (given_values == other)


@given(st.data())
def test_numbers_in_memory(data: st.DataObject) -> None:
    table = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=2, max_size=4))
    row, column = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, 2))
    other = [list(values) for values in table]
    other[row][column] += 1
    labels = list(range(len(table)))
    one = samples_from_numbers(table, labels).fingerprint
    assert one != samples_from_numbers(other, labels).fingerprint
    assert one != samples_from_numbers(table, labels, columns=["a", "b", "c"]).fingerprint
    assert one == samples_from_numbers(np.array(table), labels).fingerprint


Change = Callable[[Path], object]


def _rewrite(path: Path) -> None:
    """Write other content of the same size, and set the time back as archives do."""
    stat = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _swap(folder: Path) -> None:
    one, other = folder / "1.png", folder / "2.png"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def _same_time(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        os.utime(path, ns=(1, 1))


FOLDER_CHANGES: dict[str, Change] = {
    "an image in place": lambda root: _rewrite(root / "a" / "1.png"),
    "two images swapped by their names": lambda root: _swap(root / "a"),
    "an image more": lambda root: (root / "a" / "9.png").write_bytes(png(9)),
    "an image less": lambda root: (root / "a" / "1.png").unlink(),
    "another class": lambda root: (root / "a").rename(root / "c"),
    "another name": lambda root: (root / "a" / "1.png").rename(root / "a" / "7.png"),
}


def make_folder(root: Path) -> str:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.png").write_bytes(png(number))
    # Equal sizes and times tell nothing.
    size = max(path.stat().st_size for path in root.rglob("*.png"))
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    _same_time(root)
    return f"folder:{root}"


@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_images_in_folders(tmp_path: Path, change: str) -> None:
    spec = make_folder(tmp_path / "d")
    before = load_samples(spec).fingerprint
    assert before == load_samples(spec).fingerprint
    FOLDER_CHANGES[change](tmp_path / "d")
    assert before != load_samples(spec).fingerprint


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "parquet of named images"])
@pytest.mark.parametrize("change", ["an image in place", "two images swapped by their names"])
def test_images_that_tables_name(tmp_path: Path, kind: str, change: str) -> None:
    make_folder(tmp_path / "d")
    names = [f"d/a/{number}.png" for number in range(4)]
    rows: list[dict[str, Any]] = [{"path": name, "label": row % 2} for row, name in enumerate(names)]
    if kind == "csv":
        path = tmp_path / "t.csv"
        path.write_text("path,label\n" + "".join(f"{row['path']},{row['label']}\n" for row in rows))
    elif kind == "jsonl":
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path = tmp_path / "t.parquet"
        if kind != "parquet":
            rows = [{"image": {"bytes": None, "path": row["path"]}, "label": row["label"]} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), path)
    spec = f"{kind.partition(' ')[0]}:{path}"
    before = load_samples(spec).fingerprint
    assert before == load_samples(spec).fingerprint
    FOLDER_CHANGES[change](tmp_path / "d")
    assert before != load_samples(spec).fingerprint


@pytest.mark.parametrize("option", ["label=other", "group=site", "split=train", "root=d/a"])
def test_options_of_tables(tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.csv"
    lines = [f"{'' if row < 2 else 'd/a/'}{row}.png,{row % 2},{row // 2},n{row},train" for row in range(4)]
    path.write_text("path,label,other,site,split\n" + "\n".join(lines) + "\n")
    plain = load_samples(f"csv:{path}?root=.")
    other = load_samples(f"csv:{path}?{option}" + ("" if option.startswith("root") else "&root=."))
    assert plain.fingerprint != other.fingerprint


def test_what_makes_features() -> None:
    backbone, again = load_backbone("bundled:pixels"), load_backbone("bundled:pixels")
    assert store_key(backbone, "f", "float32") == store_key(again, "f", "float32")
    square = ImagePreprocessing(3, (32, 32), None, (0.5,) * 3, (0.5,) * 3)
    module = torch.nn.Flatten()
    keys = {
        store_key(backbone, "f", "float32"),
        store_key(backbone, "g", "float32"),
        store_key(backbone, "f", "mixed"),
        store_key(load_backbone("bundled:glyphnet"), "f", "float32"),
        store_key(load_backbone("bundled:glyphnet", weights="random"), "f", "float32"),
        store_key(load_backbone("bundled:glyphnet", weights="random", seed=1), "f", "float32"),
        store_key(Backbone("bundled:pixels", module, square, layer="other"), "f", "float32"),
        store_key(Backbone("bundled:pixels", module, square, pooling="max"), "f", "float32"),
        store_key(
            Backbone("bundled:pixels", module, ImagePreprocessing(1, (32, 32), None, (0.5,), (0.5,))), "f", "float32"
        ),
    }
    assert len(keys) == 9


def make_former(root: Path, samples: Samples, backbone: Backbone) -> None:
    """Leave a store as the version before would have: under the former key, without what it did not write."""
    store = FeatureStore.open(backbone, samples, root=root)
    assert samples.former is not None
    meta = json.loads((store.path / "meta.json").read_text())
    del meta["passing"]
    (store.path / "meta.json").write_text(json.dumps(meta))
    store.path.rename(root / store_key(backbone, samples.former.fingerprint, "float32"))


def test_store_of_the_previous_version_is_migrated(tmp_path: Path) -> None:
    backbone, samples = load_backbone("bundled:pixels"), load_samples(make_folder(tmp_path / "d"))
    truth = FeatureStore.open(backbone, samples, root=tmp_path / "truth").features.clone()
    make_former(tmp_path / "stores", samples, backbone)
    store = FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    assert store.extracted == 0
    assert torch.equal(store.features, truth)
    assert FeatureStore.open(backbone, samples, root=tmp_path / "stores").extracted == 0


def test_previous_store_of_changed_files_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone, spec = load_backbone("bundled:pixels"), make_folder(tmp_path / "d")
    make_former(tmp_path / "stores", load_samples(spec), backbone)
    time.sleep(0.02)
    _swap(tmp_path / "d" / "a")
    samples = load_samples(spec)
    store = FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    assert store.extracted == len(samples)
    assert "are extracted again: files have changed, were renamed" in caplog.text
    truth = FeatureStore.open(backbone, samples, root=tmp_path / "truth").features
    assert torch.equal(store.features, truth)


def test_temporary_failure_is_retried(tmp_path: Path) -> None:
    backbone, spec = load_backbone("bundled:pixels"), make_folder(tmp_path / "d")
    samples, image = load_samples(spec), tmp_path / "d" / "a" / "1.png"
    kept = image.with_suffix(".away")
    image.rename(kept)
    store = FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    assert list(store.skipped) == [1]
    assert "no such file" in store.skipped[1]
    assert FeatureStore.open(backbone, samples, root=tmp_path / "stores").skipped == store.skipped
    kept.rename(image)
    store = FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    assert (store.skipped, store.extracted) == ({}, 1)
    truth = FeatureStore.open(backbone, samples, root=tmp_path / "truth")
    assert torch.equal(store.features, truth.features)
    assert (store.keys == truth.keys).all()
    assert FeatureStore.open(backbone, samples, root=tmp_path / "stores").extracted == 0


def test_permanent_failure_is_cached(tmp_path: Path) -> None:
    backbone, spec = load_backbone("bundled:pixels"), make_folder(tmp_path / "d")
    (tmp_path / "d" / "a" / "1.png").write_bytes(b"no image")
    samples = load_samples(spec)
    FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    shutil.rmtree(tmp_path / "d")
    store = FeatureStore.open(backbone, samples, root=tmp_path / "stores")
    assert "its format is unknown" in store.skipped[1]


def test_rows_with_features_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    class Logarithm(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.flatten(1).log()

    preprocessing = ImagePreprocessing(1, (8, 8), None, (0.0,), (1.0,))
    backbone = Backbone("test:log", Logarithm(), preprocessing)
    images = np.full((3, 8, 8), 9, np.uint8)
    images[1, 0, 0] = 0
    store = FeatureStore.open(backbone, samples_from_arrays(images, [0, 1, 1]), root=tmp_path)
    assert store.skipped == {1: "arrays[1]: test:log produces features that are not finite (NaN or infinity)."}
    assert bool(store.features.isfinite().all())
