import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhead.data import UnreadableSampleError, load_samples
from fedhead.errors import UserError

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (9, 6, 5), np.uint8)
COLOUR = GENERATOR.integers(0, 256, (9, 6, 5, 3), np.uint8)
LABELS = np.arange(9) % 3


@pytest.fixture(params=["stored", "compressed"])
def save(request: pytest.FixtureRequest) -> Any:
    return np.savez if request.param == "stored" else np.savez_compressed


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_rows_come_back_in_any_order(tmp_path: Path, save: Any, images: Any, order: str) -> None:
    save(tmp_path / "a.npz", images=np.asarray(images, order=order), labels=LABELS)
    samples = load_samples(f"npz:{tmp_path / 'a.npz'}")
    for row in (0, 1, 8, 3, 4):
        assert np.array_equal(np.asarray(samples.read(row)), images[row])
    elsewhere = pickle.loads(pickle.dumps(samples))
    assert np.array_equal(np.asarray(elsewhere.read(7)), images[7])
    assert samples.labels.tolist() == LABELS.tolist()


def test_the_forms_of_an_image(tmp_path: Path, save: Any) -> None:
    forms = {
        "channels first": COLOUR.transpose(0, 3, 1, 2),
        "floats": COLOUR / 255,
        "sixteen bits": COLOUR[..., 0].astype(np.uint16) * 257,
        "one channel": COLOUR[..., :1],
    }
    for name, images in forms.items():
        save(tmp_path / "a.npz", images=images, labels=LABELS)
        read = np.asarray(load_samples(f"npz:{tmp_path / 'a.npz'}").read(4))
        assert np.array_equal(read, COLOUR[4] if read.ndim == 3 else COLOUR[4, ..., 0]), name


def test_medmnist_arrays_are_splits(tmp_path: Path, save: Any, caplog: pytest.LogCaptureFixture) -> None:
    parts = {"train": slice(0, 5), "val": slice(5, 7), "test": slice(7, 9)}
    arrays = {f"{name}_images": COLOUR[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": LABELS[part, None] for name, part in parts.items()}
    save(tmp_path / "m.npz", **arrays)
    for name, part in parts.items():
        samples = load_samples(f"npz:{tmp_path / 'm.npz'}?split={name}")
        assert [samples.classes[label] for label in samples.labels] == [str(label) for label in LABELS[part]]
        assert np.array_equal(np.asarray(samples.read(1)), COLOUR[part][1])
        assert samples.name(1).endswith(f"{name} row 1")
    assert not caplog.text
    whole = load_samples(f"npz:{tmp_path / 'm.npz'}")
    assert (len(whole), set(whole.splits or ())) == (9, set(parts))
    assert "has the splits test, train, val, and all rows are used" in caplog.text
    with pytest.raises(UserError, match=r"no rows of the split 'tset'\. Did you mean 'test'"):
        load_samples(f"npz:{tmp_path / 'm.npz'}?split=tset")


def test_keras_names_and_multi_labels_and_classes(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "k.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:2], y_test=LABELS[:2])
    assert len(load_samples(f"npz:{tmp_path / 'k.npz'}?split=test")) == 2
    marks = np.array([[1, 0], [0, 0], [1, 1]])
    save(tmp_path / "l.npz", images=GREY[:3], labels=marks, classes=np.array(["elk", "fox"]))
    samples = load_samples(f"npz:{tmp_path / 'l.npz'}")
    assert (samples.classes, samples.labels.tolist()) == (("elk", "fox"), marks.tolist())
    save(tmp_path / "c.npz", images=GREY, labels=LABELS.astype(float), classes=np.array(["a", "b", "c"]))
    assert load_samples(f"npz:{tmp_path / 'c.npz'}").classes == ("a", "b", "c")


def test_groups_sites_and_texts(tmp_path: Path, save: Any) -> None:
    texts = np.array(["dear sir", "", "grüße"])
    save(tmp_path / "t.npz", texts=texts, labels=["x", "y", "x"], groups=[1, 1, 2], sites=np.array(["n", "w", "n"]))
    samples = load_samples(f"npz:{tmp_path / 't.npz'}")
    assert (samples.kind, samples.read(2), samples.classes) == ("text", "grüße", ("x", "y"))
    assert (samples.groups, samples.sites) == (["1", "1", "2"], ["n", "w", "n"])
    with pytest.raises(UnreadableSampleError, match="row 1 has no text"):
        samples.read(1)


def test_error_names_rows_with_invalid_pixels(tmp_path: Path, save: Any) -> None:
    images = GREY / 255
    images[2, 1, 1] = np.nan
    save(tmp_path / "a.npz", images=images, labels=LABELS)
    samples = load_samples(f"npz:{tmp_path / 'a.npz'}")
    assert samples.read(1).size == (5, 6)  # type: ignore[union-attr]
    with pytest.raises(UnreadableSampleError, match=r"a\.npz, row 2 has values that are not finite"):
        samples.read(2)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": GREY, "labels": LABELS}, "no arrays 'images'.*it has 'labels', 'pictures'"),
        ({"images": GREY.reshape(9, 30), "labels": LABELS}, r"shape \[9, 30\]; expected \[n, H, W\]"),
        ({"images": GREY[0], "labels": LABELS}, r"shape \[6, 5\]"),
        ({"images": np.zeros((9, 5, 5, 5)), "labels": LABELS}, r"shape \[9, 5, 5, 5\]"),
        ({"images": GREY, "labels": LABELS[:8]}, "9 rows in 'images' but 8 in 'labels'"),
        ({"images": GREY, "labels": LABELS * np.nan}, "not all finite"),
        ({"images": GREY, "labels": LABELS + 0.5}, "not whole numbers"),
        ({"images": GREY, "labels": np.array(list("abc") * 3, object)}, "'labels' .* cannot be read.*astype"),
        ({"images": GREY.astype(object), "labels": LABELS}, "'images' .* contains Python objects"),
        (
            {"images": GREY, "labels": LABELS, "classes": np.array(["a", "b"])},
            "row of class 2, which is neither one of its 2 classes",
        ),
        ({"images": GREY, "labels": LABELS, "groups": np.arange(3)}, r"'groups' of shape \[3\]; expected \[9\]"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "has no rows"),
    ],
)
def test_invalid_arrays_are_rejected(tmp_path: Path, save: Any, arrays: dict[str, Any], words: str) -> None:
    save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load_samples(f"npz:{tmp_path / 'a.npz'}")


def test_damaged_archives_are_rejected(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    for spec, words in (("npz:", "Expected a file"), (f"npz:{path}", "There is no file")):
        with pytest.raises(UserError, match=words):
            load_samples(spec)
    save(path, images=GREY, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"a\.npz is not a NumPy archive or is damaged"):
        load_samples(f"npz:{path}")
    path.write_bytes(whole)
    with pytest.raises(UserError, match="no splits to choose from"):
        load_samples(f"npz:{path}?split=train")


def test_damage_within_a_compressed_array_affects_single_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=GENERATOR.integers(0, 256, (40, 64, 64), np.uint8), labels=np.arange(40) % 2)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("images.npy").header_offset
    content[begin + 60_000 : begin + 60_200] = b"\xff" * 200
    path.write_bytes(content)
    samples = load_samples(f"npz:{path}")
    assert samples.read(0).size == (64, 64)  # type: ignore[union-attr]
    with pytest.raises(UnreadableSampleError, match=r"Row \d+ of 'images' in .*a\.npz is damaged"):
        for row in range(40):
            samples.read(row)


def test_fingerprint_changes_with_the_content_and_the_split(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, images=GREY, labels=LABELS)
    before = load_samples(f"npz:{path}").fingerprint
    save(path, images=GREY, labels=LABELS)
    assert load_samples(f"npz:{path}").fingerprint == before
    save(path, images=np.where(GREY[0, 0, 0] == GREY, 0, GREY), labels=LABELS)
    assert load_samples(f"npz:{path}").fingerprint != before
