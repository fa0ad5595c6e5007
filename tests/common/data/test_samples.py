from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedhead.data import (
    UnreadableSampleError,
    calibration_half,
    held_out,
    load_samples,
    load_sites,
    read_image,
    read_text,
    relabel,
    require_labels,
    samples_from_arrays,
    samples_from_texts,
    to_image,
)
from fedhead.data.python import samples_of_pairs
from fedhead.errors import UserError


def write_image(path: Path, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (9, 7, 3) if mode == "RGB" else (9, 7)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def test_digits_equal_scikit_learn() -> None:
    samples = load_samples("digits")
    assert (len(samples), samples.classes) == (1797, tuple("0123456789"))
    assert np.bincount(samples.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    image = np.asarray(samples.read(0))
    assert image.shape == (8, 8)
    assert image.max() == 239  # 15 of 16


def test_folder_with_a_sub_folder_per_class(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "a/2.PNG", "a/1.jpg", ".hidden/1.png", "a/.x.png", "a/notes.txt"]):
        write_image(tmp_path / name, number) if not name.endswith("txt") else (tmp_path / name).write_text("")
    samples = load_samples(f"folder:{tmp_path}")
    assert samples.classes == ("a", "b")
    assert samples.labels.tolist() == [0, 0, 1]
    assert [Path(samples.name(row)).name for row in range(3)] == ["1.jpg", "2.PNG", "1.png"]
    assert samples.read(2).size == (7, 9)


def test_folder_fingerprint_changes_with_its_files(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png")
    before = load_samples(f"folder:{tmp_path}").fingerprint
    assert load_samples(f"folder:{tmp_path}").fingerprint == before
    write_image(tmp_path / "b" / "1.png")
    assert load_samples(f"folder:{tmp_path}").fingerprint != before


def test_sub_folders_may_be_sites(tmp_path: Path) -> None:
    for name in ("north/a/1.png", "north/b/1.png", "south/b/1.png"):
        write_image(tmp_path / name)
    samples = load_sites(f"folder:{tmp_path}")
    assert samples.sites == ("north", "north", "south")
    assert [samples.classes[label] for label in samples.labels] == ["a", "b", "b"]
    with pytest.raises(UserError, match="partition = 'folder'"):
        load_samples(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("folder:/nowhere/at/all", "There is no folder"),
        ("folder:", "Expected a path"),
        ("folders:x", "Did you mean 'folder'"),
        ("digits:x", "takes no argument"),
        ("python:nothing", "python:MODULE:FUNCTION"),
        ("python:no_such_module:f", "cannot be imported"),
        ("python:json:nothing", "no function 'nothing'"),
        ("python:builtins:dict.fromkeys", "no function"),
    ],
)
def test_unknown_specs_are_rejected(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_samples(spec)


def test_empty_folder_and_file_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty; expected a sub-folder per class"):
        load_samples(f"folder:{tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        load_samples(f"folder:{tmp_path / 'file'}")


def test_labels_in_the_order_of_the_runs_classes() -> None:
    samples = samples_from_arrays(np.zeros((3, 4, 4), np.uint8), ["cat", "dog", "cat"])
    assert relabel(samples, ["dog", "bird", "cat"]).tolist() == [2, 0, 2]
    with pytest.raises(UserError, match=r"arrays\[1\] is of class 'dog'.*bird, cat"):
        relabel(samples, ["bird", "cat"])


@pytest.mark.parametrize(
    ("images", "labels", "classes", "words"),
    [
        (np.zeros((2, 4, 4), np.uint8), [0], None, "2 images but 1 labels"),
        (np.zeros((0, 4, 4), np.uint8), [], None, "has no rows"),
        (np.zeros((1, 4, 4), np.uint8), [3], ["a", "b"], "of class 3, which is neither one of its 2 classes"),
        (np.zeros((1, 4, 4), np.uint8), ["d"], ["a", "b"], "of class 'd', which is neither one of its 2 classes"),
        (np.zeros((1, 4, 4), np.uint8), [[[0, 1]]], None, "list inside its list of labels"),
        (np.zeros((2, 4, 4), np.uint8), [0, [1]], ["a", "b"], "mixes kinds of labels"),
        (
            np.zeros((2, 4, 4), np.uint8),
            [["a"], ["c"]],
            ["a", "b"],
            "of class 'c', which is neither one of its 2 classes",
        ),
        (np.zeros((2, 4, 4), np.uint8), [[0, 2], [1]], ["a", "b"], "of class 2, which is neither one of its 2 classes"),
    ],
)
def test_invalid_arrays_are_rejected(images: object, labels: object, classes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        samples_from_arrays(images, labels, classes=classes)


def test_every_form_of_an_image_gives_equal_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    forms = [
        pixels,
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        pixels / 255.0,
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        Image.fromarray(pixels),
    ]
    for form in forms:
        assert np.array_equal(np.asarray(to_image(form, "x")), pixels)


@pytest.mark.parametrize(
    "value",
    [np.zeros(4), np.full((4, 4), -1), np.full((4, 4), 2.0), np.full((4, 4), np.nan), np.zeros((2, 9, 5))],
)
def test_non_images_are_rejected(value: object) -> None:
    with pytest.raises(UnreadableSampleError, match="the scan"):
        to_image(value, "the scan")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_error_names_damaged_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.png"
    write_image(path)
    content = {"truncated": path.read_bytes()[:80], "empty": b"", "text": b"not an image"}[damage]
    path.write_bytes(content)
    with pytest.raises(UnreadableSampleError, match=r"x\.png"):
        read_image(path)


def test_photograph_is_rotated_by_its_exif_data(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 8)


@given(st.floats(0, 1, exclude_max=True), st.data())
def test_holding_out_is_independent_of_other_rows(share: float, data: st.DataObject) -> None:
    keys = np.array(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20)), dtype=np.uint64)
    out = held_out(keys, share)
    order = np.array(data.draw(st.permutations(range(len(keys)))))
    assert np.array_equal(held_out(keys[order], share), out[order])
    assert np.array_equal(held_out(keys[:1], share), out[:1])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.7])
def test_share_of_held_out_rows(share: float) -> None:
    samples = load_samples("digits")
    keys = np.array([samples.key(row, samples.read(row)) for row in range(len(samples))], dtype=np.uint64)
    assert held_out(keys, share).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 1797) ** 0.5 + 1e-12)


def test_the_calibration_half_is_independent_of_the_rows_held_out() -> None:
    samples = load_samples("digits")
    keys = np.array([samples.key(row, samples.read(row)) for row in range(len(samples))], dtype=np.uint64)
    out, half = held_out(keys, 0.5), calibration_half(keys)
    assert half.mean() == pytest.approx(0.5, abs=0.05)
    assert half[out].mean() == pytest.approx(0.5, abs=0.07)


def test_equal_rows_and_groups_are_never_divided() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)[[0, 1, 2, 3, 0]]
    samples = samples_from_arrays(images, np.arange(5))
    keys = [samples.key(row, samples.read(row)) for row in range(5)]
    assert keys[0] == keys[4]
    assert len(set(keys)) == 4

    class Scans:
        classes = ("a", "b")
        groups = ("ann", "bob", "ann", "bob", "cid")

        def __len__(self) -> int:
            return 5

        def __getitem__(self, row: int) -> tuple[object, int]:
            return images[row], row % 2

    grouped = Scans()
    loaded = samples_of_pairs(grouped, "scans")
    keys = [loaded.key(row, loaded.read(row)) for row in range(5)]
    assert keys[0] == keys[2] != keys[1] == keys[3]
    assert keys[4] not in keys[:4]


def test_user_function_returns_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_scans.py").write_text(
        "import numpy as np\n"
        "def arrays(): return np.zeros((4, 5, 5), np.uint8), ['x', 'y', 'x', 'y']\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    samples = load_samples("python:our_scans:arrays")
    assert (len(samples), samples.classes) == (4, ("x", "y"))
    assert samples.read(0).size == (5, 5)
    with pytest.raises(UserError, match="returned int"):
        load_samples("python:our_scans:wrong")


MARKS = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    "labels",
    [
        MARKS,
        np.array(MARKS),
        np.array(MARKS, dtype=bool),
        torch.tensor(MARKS, dtype=torch.float32),
        [torch.tensor(row) for row in MARKS],
        [(0, 2), (), (1,)],
        [["a", "c"], [], ["b"]],
        [np.array([2, 0]), np.array([]), np.array([1])],
    ],
)
def test_every_form_of_multi_labels_gives_equal_labels(labels: object) -> None:
    samples = samples_from_arrays(np.zeros((3, 4, 4), np.uint8), labels, classes=("a", "b", "c"))
    assert samples.multi_label
    assert samples.classes == ("a", "b", "c")
    assert samples.labels.dtype == np.int64
    assert samples.labels.tolist() == MARKS


def test_multi_labels_by_class_name() -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    named = samples_from_arrays(images, [["fox"], ["owl", "elk"], []])
    assert (named.classes, named.labels.tolist()) == (("elk", "fox", "owl"), [[0, 1, 0], [1, 0, 1], [0, 0, 0]])
    assert samples_from_arrays(images, MARKS).classes == ("0", "1", "2")
    numbered = samples_from_arrays(images, [[3, 10], [10, 7], [7, 3]])
    assert (numbered.classes, numbered.labels.tolist()) == (("3", "7", "10"), [[1, 0, 1], [0, 1, 1], [1, 1, 0]])


def test_relabelling_reorders_the_columns_of_multi_labels() -> None:
    samples = samples_from_arrays(np.zeros((3, 4, 4), np.uint8), MARKS, classes=("a", "b", "c"))
    assert relabel(samples, ("c", "new", "b", "a")).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    with pytest.raises(UserError, match=r"arrays\[2\] is of class 'b'.*a, c"):
        relabel(samples, ("a", "c"))
    unheld = samples_from_arrays(np.zeros((3, 4, 4), np.uint8), np.array(MARKS) * [1, 0, 1], classes=("a", "b", "c"))
    assert relabel(unheld, ("a", "c")).tolist() == [[1, 1], [0, 0], [0, 0]]


def test_data_of_the_other_kind_is_rejected() -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    one, several = samples_from_arrays(images, [0, 1, 0]), samples_from_arrays(images, MARKS)
    require_labels(one, multi_label=False)
    require_labels(several, multi_label=True)
    with pytest.raises(UserError, match="names one class per row"):
        require_labels(one, multi_label=True)
    with pytest.raises(UserError, match="run it with --multi-label"):
        require_labels(several, multi_label=False)
    for annotated, task in (("mask", "segmentation"), ("boxes", "detection")):
        with pytest.raises(UserError, match=f"run it with --task {task}, or with --multi-label"):
            require_labels(replace(several, annotated=annotated), multi_label=False)


def test_user_function_returns_multi_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_sightings.py").write_text(
        "import numpy as np\n"
        "class Pairs:\n"
        "    classes = ('elk', 'fox', 'owl')\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, row): return np.zeros((5, 5), np.uint8), [[0, 2], [], ['fox']][row]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    samples = load_samples("python:our_sightings:Pairs")
    assert samples.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_texts_are_samples_like_images() -> None:
    texts = ["a cat", "a dog", "a cat", "ein Hündchen"]
    samples = samples_from_texts(texts, ["cat", "dog", "cat", "dog"])
    assert (samples.kind, samples.classes, samples.labels.tolist()) == ("text", ("cat", "dog"), [0, 1, 0, 1])
    assert [samples.read(row) for row in range(4)] == texts
    keys = [samples.key(row, samples.read(row)) for row in range(4)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    assert samples_from_texts([*texts[:3], "ein Hund"], samples.labels).fingerprint != samples.fingerprint
    # Where one text ends and the next begins is part of the content.
    assert samples_from_texts(["ab", "c"], [0, 1]).fingerprint != samples_from_texts(["a", "bc"], [0, 1]).fingerprint


def test_invalid_texts_are_rejected() -> None:
    with pytest.raises(UserError, match="2 texts but 1 labels"):
        samples_from_texts(["a", "b"], [0])
    with pytest.raises(UserError, match=r"texts\[1\] is int; expected a text"):
        samples_from_texts(["a", 3], [0, 1])
    with pytest.raises(UnreadableSampleError, match=r"texts\[1\] has no text"):
        samples_from_texts(["a", float("nan")], [0, 1]).read(1)


def test_user_function_returns_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_letters.py").write_text(
        "import numpy as np\n"
        "def arrays(): return ['dear sir', 'hi'], ['formal', 'not']\n"
        "def pairs(): return [('dear sir', 0), ('hi', 1)]\n"
        "def mixed(): return [('dear sir', 0), (np.zeros((4, 4), np.uint8), 1)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for function in ("arrays", "pairs"):
        samples = load_samples(f"python:our_letters:{function}")
        assert (samples.kind, samples.read(0), samples.labels.tolist()) == ("text", "dear sir", [0, 1])
    with pytest.raises(UserError, match="contains images and texts"):
        load_samples("python:our_letters:mixed")


def test_text_files_must_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Grüße", encoding="utf-8-sig")
    assert read_text(path) == "Grüße"
    path.write_text("Grüße", encoding="latin-1")
    with pytest.raises(UnreadableSampleError, match=r"letter\.txt is not a text in UTF-8 \(byte 2\)"):
        read_text(path)
    with pytest.raises(UnreadableSampleError, match="No such file"):
        read_text(tmp_path / "none.txt")
