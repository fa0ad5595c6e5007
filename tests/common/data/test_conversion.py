"""One door: whatever holds items, labels and groups, the same values give the same samples."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedhead.data import (
    Samples,
    TableRow,
    UnreadableSampleError,
    load_samples,
    read_image,
    samples_from_arrays,
    samples_from_frame,
    samples_from_numbers,
    samples_from_texts,
)
from fedhead.data.labels import index_labels, name_of
from fedhead.errors import UserError

polars = pytest.importorskip("polars")

TEXTS = [f"text {row}" for row in range(6)]
NAMES = [f"class {row}" for row in range(6)]
ORDER = [3, 1, 5, 0, 4, 2]
SERIES = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "pandas, shuffled": lambda values: pd.Series(values, index=ORDER),
    "pandas, categorical": lambda values: pd.Series(values, index=ORDER, dtype="category"),
    "polars": polars.Series,
    "arrow": pa.array,
    "generator": lambda values: (value for value in values),
}


def pairs_of(samples: Samples) -> list[tuple[Any, str]]:
    return [(samples.read(row), samples.classes[samples.labels[row]]) for row in range(len(samples))]


@pytest.mark.parametrize("of_texts", SERIES)
@pytest.mark.parametrize("of_labels", SERIES)
def test_texts_and_labels_are_read_by_position(of_texts: str, of_labels: str) -> None:
    samples = samples_from_texts(SERIES[of_texts](TEXTS), SERIES[of_labels](NAMES))
    assert pairs_of(samples) == list(zip(TEXTS, NAMES, strict=True))


@pytest.mark.parametrize("of_groups", sorted(set(SERIES) - {"pandas, categorical"}))
def test_groups_are_read_by_position(of_groups: str) -> None:
    samples = samples_from_texts(TEXTS, NAMES, groups=SERIES[of_groups](["a", "b", None, "a", "b", "a"]))
    assert samples.groups == ["a", "b", None, "a", "b", "a"]


def test_filtered_series_of_images_is_read_by_position() -> None:
    images = pd.Series([np.full((8, 8), value, np.uint8) for value in range(6)]).sample(frac=1, random_state=1)[2:]
    samples = samples_from_arrays(images, [str(image[0, 0]) for image in images])
    assert [(str(np.asarray(image)[0, 0]), name) for image, name in pairs_of(samples)] == [
        (str(image[0, 0]),) * 2 for image in images
    ]


FRAMES = {"pandas": pd.DataFrame, "polars": polars.DataFrame, "arrow": pa.table}


@pytest.mark.parametrize("library", FRAMES)
def test_frames_are_read_like_tables(library: str) -> None:
    frame = FRAMES[library]({"text": TEXTS, "label": NAMES, "group": list("aabbcc"), "site": list("xyxyxy")})
    samples = samples_from_frame(frame)
    assert pairs_of(samples) == list(zip(TEXTS, NAMES, strict=True))
    assert samples.groups == list("aabbcc")
    assert samples.sites == list("xyxyxy")
    numbers = FRAMES[library]({"a": [1.5, 2, 3], "b": [4, 5, 6], "y": [0.5, 1.5, 1.0]})
    regression = samples_from_frame(numbers, target="y")
    assert regression.columns == ("a", "b")
    assert regression.targets is not None
    assert regression.targets.tolist() == [[0.5], [1.5], [1.0]]


@pytest.mark.parametrize("library", [*FRAMES, "numpy", "torch", "list"])
def test_rows_of_numbers_of_any_library(library: str) -> None:
    if library in FRAMES:
        rows: Any = FRAMES[library]({"x0": [1.0, 3.0], "x1": [2.0, 4.0]})
    else:
        rows = {"numpy": np.array, "torch": torch.tensor, "list": list}[library]([[1.0, 2.0], [3.0, 4.0]])
    samples = samples_from_numbers(rows, ["a", "b"])
    assert samples.columns == ("x0", "x1")
    read = [samples.read(row) for row in range(2)]
    assert all(isinstance(row, TableRow) for row in read)
    assert [row.values.tolist() for row in read if isinstance(row, TableRow)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0.0", np.int8(0), np.float32(0), np.str_("0.0"), torch.tensor(0), b"0"])
def test_whole_numbers_name_one_class_in_every_form(zero: Any, tmp_path: Path) -> None:
    classes, labels = index_labels([zero, 1], None, "x")
    assert (classes, labels.tolist()) == (("0", "1"), [0, 1])
    assert name_of(zero) == "0"


@pytest.mark.parametrize("written", ["0", "0.0", "0."])
def test_whole_numbers_name_one_class_and_group_in_every_table(written: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"text,label,group\nx,{written},{written}\ny,1,7\n")
    frame = pd.DataFrame({"text": ["x", "y"], "label": [float(written), 1.0], "group": [float(written), 7]})
    frame.to_parquet(tmp_path / "t.parquet")
    for spec in (f"csv:{tmp_path / 't.csv'}", f"parquet:{tmp_path / 't.parquet'}"):
        samples = load_samples(spec)
        assert (samples.classes, samples.groups) == (("0", "1"), ["0", "7"])


MISSING = [None, float("nan"), np.nan, pd.NA, pd.NaT, "", "  ", "nan", np.float32("nan")]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_missing_labels_are_rejected(missing: Any) -> None:
    with pytest.raises(UserError, match=r"1 of the 3 rows of texts have no label; the first is row 1"):
        samples_from_texts(["a", "b", "c"], ["x", missing, "y"])
    with pytest.raises(UserError, match="missing label in its list"):
        samples_from_texts(["a", "b", "c"], [["x"], [missing], []])


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_missing_groups(missing: Any) -> None:
    assert samples_from_texts(["a", "b"], [0, 1], groups=["g", missing]).groups == ["g", None]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({0: "a", 1: "b"}, "are a dictionary"),
        ("ab", "are a single text"),
        ({"a", "b"}, "are a set, which has no order"),
        (7, "are of type int; expected a list"),
        ([["a"], "b"], "mixes kinds of labels"),
    ],
)
def test_labels_without_rows_are_rejected(labels: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        samples_from_texts(["x", "y"], labels)


def test_frame_columns_name_the_classes() -> None:
    marks = pd.DataFrame({"cough": [1, 0], "fever": [1, 1]}, index=[5, 2])
    samples = samples_from_texts(["x", "y"], marks)
    assert samples.multi_label
    assert (samples.classes, samples.labels.tolist()) == (("cough", "fever"), [[1, 1], [0, 1]])
    one_column = samples_from_texts(["x", "y"], pd.DataFrame({"label": ["b", "a"]}, index=[5, 2]))
    assert (one_column.classes, one_column.labels.tolist()) == (("a", "b"), [1, 0])


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64, np.dtype(">i4"), np.dtype(">u8")]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("door", ["list", "array", "npz", "one"])
def test_integers_up_to_255_are_eight_bits(dtype: Any, door: str, tmp_path: Path) -> None:
    pixels: npt.NDArray[Any] = np.arange(2 * 6 * 7).reshape(2, 6, 7).astype(dtype)
    assert np.array_equal(_through(door, pixels, tmp_path), pixels.astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.dtype(">i4")], ids=str)
@pytest.mark.parametrize("door", ["list", "array", "npz"])
def test_one_bright_image_implies_sixteen_bits_for_all(dtype: Any, door: str, tmp_path: Path) -> None:
    pixels: npt.NDArray[Any] = np.zeros((2, 6, 7), dtype=dtype)
    pixels[0], pixels[1, 0, 0] = 200, 65535
    read = _through(door, pixels, tmp_path)
    assert (read[0].max(), read[1].max()) == (1, 255)


def _through(door: str, pixels: npt.NDArray[Any], folder: Path) -> npt.NDArray[Any]:
    if door == "npz":
        np.savez(folder / "n.npz", images=pixels, labels=[0, 1])
        samples = load_samples(f"npz:{folder / 'n.npz'}")
    elif door == "one":
        return np.stack([np.asarray(samples_from_arrays([one], [0]).read(0)) for one in pixels])
    else:
        samples = samples_from_arrays(list(pixels) if door == "list" else pixels, [0, 1])
    return np.stack([np.asarray(samples.read(row)) for row in range(2)])


@given(st.integers(1, 8), st.sampled_from(["L", "RGB"]))
def test_orientation_is_the_same_by_path_and_in_memory(
    tmp_path_factory: pytest.TempPathFactory, orientation: int, mode: str
) -> None:
    path, exif = tmp_path_factory.mktemp("exif") / "p.jpg", Image.Exif()
    exif[274] = orientation
    pixels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif, quality=100)
    by_path = np.asarray(read_image(path))
    for image in (Image.open(path), path, str(path), Image.open(path).convert("RGB").convert(mode)):
        assert np.array_equal(np.asarray(samples_from_arrays([image], [0]).read(0)), by_path)


@pytest.mark.parametrize("form", ["png", "jpeg", "tiff", "webp", "bmp", "gif"])
def test_truncated_image_in_memory_is_an_unreadable_row(form: str) -> None:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(content, form)
    whole = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    try:
        cut = Image.open(io.BytesIO(content.getvalue()[: len(content.getvalue()) // 2]))
    except OSError:
        pytest.skip("already refused when opened")
    samples = samples_from_arrays([whole, cut], [0, 1])
    assert samples.read(0) is whole
    for _ in range(2):
        with pytest.raises(UnreadableSampleError, match=r"arrays\[1\] cannot be read as an image"):
            samples.read(1)


def test_missing_items_are_unreadable_rows() -> None:
    images = samples_from_arrays([np.zeros((4, 4), np.uint8), None, float("nan"), 3], [0, 1, 0, 1])
    for row, words in ((1, "holds no image"), (2, "holds no image"), (3, "is a number")):
        with pytest.raises(UnreadableSampleError, match=words):
            images.read(row)
    texts = samples_from_texts(["a", None, float("nan"), " "], [0, 1, 0, 1])
    for row in (1, 2, 3):
        with pytest.raises(UnreadableSampleError, match="has no text"):
            texts.read(row)


def test_functions_return_frames_numbers_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "i.png")
    (tmp_path / "doors.py").write_text(
        "import numpy as np, pandas as pd\n"
        "from pathlib import Path\n"
        "def frame(): return pd.DataFrame({'text': ['x', 'y'], 'label': [1.0, 2.0]}, index=[1, 0])\n"
        "def numbers(): return np.array([[1., 2.], [3., 4.]]), ['a', 'b']\n"
        f"def paths(): return [Path({str(tmp_path / 'i.png')!r})] * 2, [0, 1]\n"
        "def vectors(): return [(np.array([1., 2.]), 'a'), (np.array([3., 4.]), 'b')]\n"
        "def fails(): raise ValueError('no disk')\n"
        "class Broken:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, row): raise OSError('gone')\n"
        "def broken(): return Broken()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert pairs_of(load_samples("python:doors:frame")) == [("x", "1"), ("y", "2")]
    for name in ("numbers", "vectors"):
        samples = load_samples(f"python:doors:{name}")
        assert (samples.kind, samples.columns) == ("table", ("x0", "x1"))
    image = load_samples("python:doors:paths").read(1)
    assert np.asarray(image).max() == 7
    with pytest.raises(UserError, match="failed: ValueError: no disk"):
        load_samples("python:doors:fails")
    with pytest.raises(UserError, match="cannot be read: OSError: gone"):
        load_samples("python:doors:broken")
