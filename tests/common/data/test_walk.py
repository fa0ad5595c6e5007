"""What is there and not used is counted, named and said; what can be read is read."""

import json
import os
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.data import load_samples, load_sites
from fedhead.data.inputs import find_inputs
from fedhead.data.specs import decode_path, join_options, split_options
from fedhead.errors import UserError


def save(path: Path, form: str | None = None, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=form)
    return path


def save_dicom(path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows = dataset.Columns = 4
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = bytes(16)
    dataset.save_as(path, enforce_file_format=True)


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "unexpected" not in result.output, result.output
    return result


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder as people have them."""
    root = tmp_path / "scans"
    for number in range(6):
        save(root / "cat" / f"{number}.png", value=number)
        save(root / "cat" / "2021" / f"{number}.png", value=10 + number)
        save(root / "dog" / f"{number}.jfif", "JPEG", 20 + number)
        save(root / "dog" / f"{number}.JPE", "JPEG", 30 + number)
        save(root / "fox" / "2021" / f"{number}.png", value=40 + number)
    save_dicom(root / "dog" / "IM0001")
    save_dicom(root / "dog" / "1.2.840.113619.2.5")
    save(root / "overview.png")
    save(root / "__MACOSX" / "cat" / "._0.png")
    (root / "cat" / "._1.png").write_bytes(b"fork")
    (root / "cat" / "Thumbs.db").write_bytes(b"db")
    (root / "cat" / "notes.txt").write_text("read me")
    (root / "dog" / "slide.svs").write_bytes(b"II*\0")
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return root


def test_messy_folder(messy: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = load_samples(f"folder:{messy}")
    assert dict(zip(samples.classes, np.bincount(samples.labels).tolist(), strict=True)) == {
        "cat": 12,
        "dog": 14,
        "fox": 6,
    }
    for row in range(len(samples)):
        samples.read(row)
    assert "12 of 32 images are in deeper folders (cat/2021, fox/2021)" in caplog.text
    assert "1 file left out (not in a class folder)" in caplog.text
    assert "overview.png" in caplog.text
    assert "1 file left out (not images; 1 .txt)" in caplog.text
    assert "whole-slide images; cut tiles from them first" in caplog.text
    assert "__MACOSX" not in caplog.text
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


def test_deeper_folders_can_be_excluded(messy: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = load_samples(f"folder:{messy}?nested=no")
    assert samples.classes == ("cat", "dog")
    assert "12 files left out (in deeper folders, by nested=no)" in caplog.text


@pytest.mark.parametrize("form", ["plain", "--json", "--html"])
def test_command_lists_used_and_unused_files(messy: Path, tmp_path: Path, form: str) -> None:
    page = tmp_path / "page.html"
    flags = {"plain": [], "--json": ["--json"], "--html": ["--html", page]}[form]
    result = command("data", f"folder:{messy}", *flags)
    assert result.exit_code == 0
    said = click.unstyle(result.stdout)
    if form == "--json":
        summary = json.loads(result.stdout)
        assert summary["classes"] == {"cat": 12, "dog": 14, "fox": 6}
        said = " ".join([*summary["left_out"], *summary["cautions"]])
    elif form == "--html":
        said = page.read_text(encoding="utf-8")
    # A terminal folds long paths anywhere.
    said = "".join(said.split())
    for words in ("overview.png", "notes.txt", "slide.svs", "hidden or of the system", "cat/2021"):
        assert words.replace(" ", "") in said, (words, said)


def test_predict_walks_as_training_does(messy: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [one.name for one in find_inputs([str(messy)], "image")]
    trained = load_samples(f"folder:{messy}")
    assert set(names) == {trained.name(row) for row in range(len(trained))} | {str(messy / "overview.png")}
    assert "not images; 1 .txt" in caplog.text


@pytest.mark.parametrize(
    "table",
    ["filename;remark\n{0};x\n", "sep=;\npath;y\n{0};1\n", "\ufeffpath,label\n{0},a\n", "Image_Path\tz\n{0}\t1\n"],
)
def test_predict_reads_tables_as_training_does(tmp_path: Path, table: str) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "new.csv").write_text(table.format("1.png"), encoding="utf-8")
    (found,) = find_inputs([str(tmp_path / "new.csv")], "image")
    assert found.name == "1.png"
    assert isinstance(found.read(), Image.Image)


def test_sites_and_splits_are_not_mistaken_for_classes(tmp_path: Path) -> None:
    for site in ("north", "south"):
        for name in ("cat", "dog"):
            save(tmp_path / "d" / site / name / "1.png")
    with pytest.raises(UserError, match=r"all 4 files are deeper, such as north/cat/1\.png\. .*nested=yes"):
        load_samples(f"folder:{tmp_path / 'd'}")
    assert load_samples(f"folder:{tmp_path / 'd'}?nested=yes").classes == ("north", "south")
    samples = load_sites(f"folder:{tmp_path / 'd'}")
    assert samples.classes == ("cat", "dog")
    assert samples.sites == ("north", "north", "south", "south")


def test_circular_links(tmp_path: Path) -> None:
    save(tmp_path / "d" / "a" / "1.png")
    (tmp_path / "d" / "a" / "again").symlink_to(tmp_path / "d", target_is_directory=True)
    assert len(load_samples(f"folder:{tmp_path / 'd'}")) == 1


def test_latin_1_names_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, middle in ((b"d/caf\xe9", 60), (b"d/bar", 180)):
        os.makedirs(name)  # noqa: PTH103 - names as bytes
        for number in range(15):
            pixels = np.clip(generator.normal(middle, 25, (16, 16)), 0, 255).astype(np.uint8)
            with open(name + b"/%d\xe4.png" % number, "wb") as file:  # noqa: PTH123 - names as bytes
                Image.fromarray(pixels).save(file, "PNG")
    os.makedirs(b"odd\xff")  # noqa: PTH103 - names as bytes
    os.rename(b"d", b"odd\xff/d")  # noqa: PTH104 - names as bytes
    data = f"folder:{os.fsdecode(b'odd')}\udcff/d"
    samples = load_samples(data)
    assert samples.classes == ("bar", "café")
    assert samples.spec.encode().endswith(b"odd%FF/d")
    assert load_samples(samples.spec).fingerprint == samples.fingerprint
    assert command("data", data).exit_code == 0
    assert command("data", data, "--json").exit_code == 0
    assert command("data", data, "--html", "page.html").exit_code == 0
    assert "café" in Path("page.html").read_text(encoding="utf-8")
    flags = ("--sites", "2", "--rounds", "1", "--min-rows", "0", "--min-class-count", "0", "--out", "run")
    assert command("simulate", "--backbone", "bundled:glyphnet", "--data", data, *flags).exit_code == 0
    assert command("predict", "run", "odd\udcff/d", "--out", "out.csv").exit_code == 0
    assert b"caf\xe9/3\xe4.png" in Path("out.csv").read_bytes()
    assert command("predict", "run", "odd\udcff/d", "--json").exit_code == 0
    assert command("evaluate", "run", "--data", data).exit_code == 0


def test_unreadable_row_sets_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 0), ("b", 1)):
        for number in range(12):
            save(Path("d") / name / f"{number}.png", value=value * 20 + number)
    Path("bad/a").mkdir(parents=True)
    Path("bad/a/x.png").write_text("junk")
    flags = ("--sites", "2", "--rounds", "0", "--min-rows", "0", "--min-class-count", "0", "--out", "run")
    assert command("simulate", "--backbone", "bundled:glyphnet", "--data", "folder:d", *flags).exit_code == 0
    assert command("predict", "run", "d/a/0.png", "bad/a/x.png").exit_code == 1
    assert command("data", "folder:bad").exit_code == 1


@pytest.mark.parametrize(
    "name", ["a?b.csv", "100%.csv", "a%3Fb.csv", "a&b=c.csv", "x%25y.csv", "caf\udce9.csv", "ü?.csv"]
)
def test_any_table_name_round_trips_through_its_spec(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("text,label\nx,a\ny,b\n")
    samples = load_samples(f"csv:{path}")
    samples.spec.encode()
    again = load_samples(samples.spec)
    assert again.fingerprint == samples.fingerprint
    with_options = load_samples(f"csv:{join_options(str(path), {'label': 'label', 'group': 'text'})}")
    assert with_options.groups == ["x", "y"]
    given, options = split_options(join_options(str(path), {"label": "50 % & ?"}), {"label"}, "x")
    assert (given, options) == (str(path), {"label": "50 % & ?"})


def test_a_question_mark_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "what?.csv").write_text("text,label\nx,a\ny,b\n")
    assert len(load_samples(f"csv:{tmp_path}/what%3F.csv?label=label")) == 2
    assert decode_path("/nowhere/50%25%3f") == "/nowhere/50%?"


@pytest.mark.parametrize("size", [131_072, 400_000])
def test_long_texts_are_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "t.csv").write_text(f'text,label\n"{"x " * (size // 2)}",a\nshort,b\n')
    samples = load_samples(f"csv:{tmp_path / 't.csv'}")
    assert samples.read(0) == "x " * (size // 2)
    assert samples.read(1) == "short"


@pytest.mark.parametrize("form", ["avif", "jpeg2000", "heif"])
def test_modern_formats_with_a_decoder(tmp_path: Path, form: str) -> None:
    if form == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    suffix = {"avif": ".avif", "jpeg2000": ".jp2", "heif": ".heic"}[form]
    for name in ("a", "b"):
        save(tmp_path / "d" / name / f"1{suffix}", form)
    samples = load_samples(f"folder:{tmp_path / 'd'}")
    image = samples.read(0)
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)


def test_warning_names_class_without_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "d" / "cat" / "1.png")
    (tmp_path / "d" / "dog").mkdir()
    (tmp_path / "d" / ".git").mkdir()
    assert load_samples(f"folder:{tmp_path / 'd'}").classes == ("cat",)
    assert f"1 folder of a class left out (no images in them): {tmp_path / 'd' / 'dog'}." in caplog.text
