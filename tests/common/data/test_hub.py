import io
import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedhead.data import load_samples
from fedhead.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5), np.uint8)


def png(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def pictures(rows: slice = slice(None)) -> datasets.Dataset:
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])})
    content = [{"bytes": png(pixels), "path": None} for pixels in PIXELS[rows]]
    return datasets.Dataset.from_dict({"photo": content, "kind": (np.arange(12) % 2)[rows].tolist()}, features=features)


def check_pictures(spec: str) -> None:
    samples = pickle.loads(pickle.dumps(load_samples(spec)))
    assert (samples.kind, samples.classes, samples.labels.tolist()) == ("image", ("no", "yes"), [0, 1] * 6)
    for row in (0, 7, 3, 11):
        assert np.array_equal(np.asarray(samples.read(row)), PIXELS[row])


def test_data_saved_to_disk(tmp_path: Path) -> None:
    pictures().save_to_disk(tmp_path / "saved")
    check_pictures(f"hf:{tmp_path / 'saved'}")


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    pictures(slice(0, 6)).to_parquet(tmp_path / "shards" / "train-00000-of-00002.parquet")
    pictures(slice(6, 12)).to_parquet(tmp_path / "shards" / "train-00001-of-00002.parquet")
    check_pictures(f"hf:{tmp_path / 'shards'}")


def test_parquet_class_names_without_the_library(tmp_path: Path) -> None:
    pictures().to_parquet(tmp_path / "one.parquet")
    check_pictures(f"parquet:{tmp_path / 'one.parquet'}?image=photo&label=kind")


def test_choice_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = datasets.DatasetDict({"train": pictures(slice(0, 8)), "test": pictures(slice(8, 12))})
    parts.save_to_disk(tmp_path / "saved")
    samples = load_samples(f"hf:{tmp_path / 'saved'}?split=test")
    assert np.array_equal(np.asarray(samples.read(1)), PIXELS[9])
    assert samples.spec.endswith("saved?split=test")
    assert samples.name(1).endswith("test row 1")
    assert not caplog.text
    assert len(load_samples(f"hf:{tmp_path / 'saved'}")) == 12
    assert "has the splits test, train" in caplog.text
    with pytest.raises(UserError, match="no rows of the split 'val'"):
        load_samples(f"hf:{tmp_path / 'saved'}?split=val")


def test_texts_and_lists_of_classes_are_found_by_their_types(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["elk", "fox"])
    features = datasets.Features({"letter": datasets.Value("string"), "seen": datasets.Sequence(names)})
    rows = {"letter": ["a", "b", "c"], "seen": [[0, 1], [], [1]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    samples = load_samples(f"hf:{tmp_path / 'saved'}")
    assert (samples.kind, samples.classes) == ("text", ("elk", "fox"))
    assert samples.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert [samples.read(row) for row in range(3)] == ["a", "b", "c"]


def test_choice_of_columns_by_name(tmp_path: Path) -> None:
    rows = {"title": ["a", "b"], "body": ["c", "d"], "topic": ["x", "y"], "patient": ["p", "q"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no column 'label'; it has 'title', 'body', 'topic', 'patient'"):
        load_samples(f"hf:{tmp_path / 'saved'}")
    samples = load_samples(f"hf:{tmp_path / 'saved'}?text=body&label=topic&group=patient")
    assert ([samples.read(row) for row in range(2)], samples.groups) == (["c", "d"], ["p", "q"])


def test_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    pictures().save_to_disk(tmp_path / "saved")
    before = load_samples(f"hf:{tmp_path / 'saved'}").fingerprint
    assert load_samples(f"hf:{tmp_path / 'saved'}").fingerprint == before
    pictures(slice(0, 11)).save_to_disk(tmp_path / "saved")
    assert load_samples(f"hf:{tmp_path / 'saved'}").fingerprint != before


def test_missing_data_set_without_network_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(UserError, match=r"'hf:beans\?download=yes'"):
        load_samples("hf:beans")
    with pytest.raises(UserError, match="There is no folder /nowhere/at/all"):
        load_samples("hf:/nowhere/at/all")
    with pytest.raises(UserError, match="must be yes or no, not 'maybe'"):
        load_samples("hf:beans?download=maybe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be read as a data set"):
        load_samples(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="damaged cannot be read as a data set"):
        load_samples(f"hf:{tmp_path / 'damaged'}")


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("hf", "datasets", "datasets"), ("parquet", "pyarrow", "parquet")]
)
def test_error_names_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str, extra: str
) -> None:
    (tmp_path / "x").write_text("")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}, which is not installed: pip install 'fedhead\[{extra}\]'"):
        load_samples(f"{source}:{tmp_path / 'x'}")
