"""Whatever is on the disk and on the command line, the answer is a result or a sentence: never a traceback."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import samples_from_arrays
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model of images, in which each example makes its data."""
    root = tmp_path_factory.mktemp("fuzz")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    config = RunConfig(rounds=0, simulation={"min_rows": 0, "min_class_count": 0})
    simulate(config, samples_from_arrays(images, ["a", "b"] * 20), 2, out=root / "run")
    with pytest.MonkeyPatch.context() as patch:
        # Specs may name the current folder.
        patch.chdir(root / "run")
        yield root


def check(*arguments: str) -> None:
    """Run a command, and check that it ends as a command may."""
    result = CliRunner().invoke(app, list(arguments))
    said = click.unstyle(result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (0, 1, 2), (arguments, said)
    assert "unexpected" not in said or "unexpected end of data" in said, (arguments, said)
    assert "Traceback" not in said, (arguments, said)
    if result.exit_code == 2:
        assert said.strip(), arguments


# What is on the disk.

NAMES = st.one_of(
    st.sampled_from(
        ["a", "b", "cat", "2021", "__MACOSX", ".hidden", "DICOMDIR", "x=1&y?z", "100%", "%3F", "-rf", "[a]"]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=8).map(lambda name: os.fsdecode(name.replace(b"/", b"_").replace(b"\0", b"_"))),
).filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) < 200)
SUFFIXES = st.sampled_from(
    [".png", ".jpg", ".JPG", ".jfif", ".avif", ".heic", ".jp2", ".tif", ".dcm", ".txt", ".svs", "", ".7"]
)


def encoded(form: str, mode: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert(mode).save(content, form)
    return content.getvalue()


WHOLE = [
    encoded(form, mode) for form, mode in (("png", "P"), ("jpeg", "L"), ("tiff", "I"), ("gif", "L"), ("webp", "RGB"))
]
CONTENTS = st.one_of(
    st.sampled_from(WHOLE),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 400)).map(lambda cut: cut[0][: cut[1]]),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 400), st.binary(max_size=4)).map(
        lambda part: part[0][: part[1]] + part[2] + part[0][part[1] :]
    ),
    st.binary(max_size=40),
    st.binary(max_size=20).map(lambda rest: bytes(128) + b"DICM" + rest),
    st.text(max_size=20).map(lambda text: text.encode(errors="surrogatepass")),
)
FILES = st.dictionaries(st.tuples(st.lists(NAMES, max_size=3).map(tuple), NAMES, SUFFIXES), CONTENTS, max_size=8)


def write_files(root: Path, files: dict[Any, bytes]) -> None:
    for (parents, name, suffix), content in files.items():
        path = root.joinpath(*parents, name + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        # A file is where the folder should be, or a name is too long.
        except OSError:
            continue


def on_folders(folder: Path, files: dict[Any, bytes], flags: list[str], option: str) -> None:
    root = folder / "d"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    write_files(root, files)
    check("data", f"folder:{root}{option}", *flags)
    check("data", f"folder:{root}", "--html", str(folder / "page.html"), *flags)
    if (folder / "page.html").exists():
        (folder / "page.html").read_text(encoding="utf-8")
    check("predict", str(folder / "run"), str(root), "--out", str(folder / "out.csv"))
    check("evaluate", str(folder / "run"), "--data", f"folder:{root}")


FLAGS = st.lists(st.sampled_from(["--json", "--by-site"]), unique=True)
ANY_FOLDER = {
    "files": FILES,
    "flags": FLAGS,
    "option": st.sampled_from(["", "?nested=yes", "?nested=no", "?x", "?nested="]),
}


@FEW
@given(**ANY_FOLDER)
def test_any_folder(folder: Path, files: dict[Any, bytes], flags: list[str], option: str) -> None:
    on_folders(folder, files, flags, option)


@pytest.mark.slow
@MANY
@given(**ANY_FOLDER)
def test_any_of_many_folders(folder: Path, files: dict[Any, bytes], flags: list[str], option: str) -> None:
    on_folders(folder, files, flags, option)


# Tables.

CELLS = st.one_of(
    st.sampled_from(
        ["", "0", "0.0", "1", "nan", "NaN", "NA", "3,5", "1e400", "inf", "a.png", "a", "b", '"', "x;y", "\n"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
HEADERS = st.sampled_from(
    ["path", "filename", "image", "text", "label", "class", "target", "group", "site", "split", "x", "y", ""]
)
OPTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "label",
                "target",
                "features",
                "kind",
                "path",
                "text",
                "group",
                "site",
                "split",
                "separator",
                "root",
                "encoding",
                "wrong",
            ]
        ),
        st.one_of(HEADERS, st.sampled_from(["x,y", "table", "image", "%3F", "%", "utf-16", "cp1252", ";", "/nowhere"])),
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))
CSV = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda header, rows, delimiter, first, end: (
            first + end.join(delimiter.join(row) for row in [header, *rows])
        ).encode(),
        st.lists(HEADERS, min_size=1, max_size=4),
        st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=5),
        st.sampled_from([",", ";", "\t", "|"]),
        st.sampled_from(["", "sep=;\n", "\ufeff", "sep=\n"]),
        st.sampled_from(["\n", "\r\n", "\r"]),
    ),
    st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6).map(
        lambda rows: "\n".join(["text,label", *(f"{json.dumps(a)},{json.dumps(b)}" for a, b in rows)]).encode()
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HEADERS, inner, max_size=3),
    max_leaves=4,
)
JSONL = st.one_of(
    st.binary(max_size=60),
    st.lists(st.dictionaries(HEADERS, VALUES, max_size=4), max_size=5).map(
        lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()
    ),
    st.lists(VALUES, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
)


def parquet_of(columns: dict[str, list[Any]], cut: int) -> bytes:
    content = io.BytesIO()
    length = min(map(len, columns.values()), default=0)
    try:
        pq.write_table(pa.table({name: values[:length] for name, values in columns.items()}), content)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, NotImplementedError):
        return b"PAR1"
    return content.getvalue()[: len(content.getvalue()) - cut]


PARQUET = st.builds(
    parquet_of,
    st.dictionaries(
        HEADERS,
        st.one_of(
            *(
                st.lists(of, min_size=2, max_size=4)
                for of in (
                    st.integers(-3, 300),
                    st.floats(),
                    st.text(max_size=4),
                    st.binary(max_size=9),
                    st.booleans(),
                    st.none(),
                    st.lists(st.integers(0, 2), max_size=2),
                    st.sampled_from(WHOLE),
                    st.fixed_dictionaries(
                        {
                            "bytes": st.one_of(st.none(), st.sampled_from(WHOLE)),
                            "path": st.sampled_from(["a.png", None]),
                        }
                    ),
                )
            )
        ),
        max_size=4,
    ),
    st.sampled_from([0, 0, 0, 1, 9]),
)
ARRAYS = st.sampled_from(
    [
        "images",
        "labels",
        "features",
        "targets",
        "texts",
        "classes",
        "groups",
        "sites",
        "columns",
        "x",
        "y",
        "train_images",
        "train_labels",
        "test_images",
        "test_labels",
    ]
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = st.sampled_from(["u1", "i1", "i4", "i8", ">u2", ">i4", "f2", "f4", "f8", "?", "U3", "S2", "c8", "M8[s]", "O"])


def npz_of(arrays: dict[str, Any], compressed: bool, cut: int) -> bytes:
    content = io.BytesIO()
    made = {}
    for name, (shape, dtype) in arrays.items():
        made[name] = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape).astype(dtype)
    (np.savez_compressed if compressed else np.savez)(content, **made)
    return content.getvalue()[: len(content.getvalue()) - cut]


NPZ = st.builds(
    npz_of,
    st.dictionaries(ARRAYS, st.tuples(SHAPES, DTYPES), max_size=4),
    st.booleans(),
    st.sampled_from([0, 0, 0, 1, 40]),
)
TABLES = st.one_of(
    st.tuples(st.just("csv"), CSV),
    st.tuples(st.just("jsonl"), JSONL),
    st.tuples(st.just("parquet"), PARQUET),
    st.tuples(st.just("npz"), NPZ),
)


def on_tables(folder: Path, table: tuple[str, bytes], options: str, flags: list[str]) -> None:
    kind, content = table
    path = folder / f"t.{kind}"
    path.write_bytes(content)
    (folder / "a.png").write_bytes(WHOLE[0])
    spec = f"{kind}:{path}{f'?{options}' if options else ''}"
    check("data", spec, *flags)
    check("data", spec, "--html", str(folder / "page.html"), "--rows", "2")
    check("evaluate", str(folder / "run"), "--data", spec)
    check("predict", str(folder / "run"), str(path), spec)


ANY_TABLE = {"table": TABLES, "options": OPTIONS, "flags": FLAGS}


@FEW
@given(**ANY_TABLE)
def test_any_table(folder: Path, table: tuple[str, bytes], options: str, flags: list[str]) -> None:
    on_tables(folder, table, options, flags)


@pytest.mark.slow
@MANY
@given(**ANY_TABLE)
def test_any_of_many_tables(folder: Path, table: tuple[str, bytes], options: str, flags: list[str]) -> None:
    on_tables(folder, table, options, flags)


# The command line itself.

SPECS = st.one_of(
    st.text(max_size=20),
    st.builds(
        lambda source, rest: f"{source}:{rest}",
        st.sampled_from(["folder", "csv", "jsonl", "parquet", "npz", "hf", "torchvision", "python", "digits", "wsi"]),
        st.one_of(st.text(max_size=12), st.sampled_from(["", "~nobody/x", "a\0b", "os:getcwd", "x" * 5000, "MNIST"])),
    ),
)


def on_specs(folder: Path, spec: str, backbone: str) -> None:
    # The whole disk would take too long.
    spec = spec.replace("/", "_")
    check("data", "--", spec)
    check("predict", "--", str(folder / "run"), spec)
    check("simulate", "--data", spec, "--backbone", backbone, "--rounds", "0", "--out", str(folder / "new"))
    shutil.rmtree(folder / "new", ignore_errors=True)


ANY_SPEC = {
    "spec": SPECS,
    "backbone": st.one_of(
        st.text(max_size=9), st.sampled_from(["identity", "identity:a,b", "bundled:pixels", "vectors:x"])
    ),
}


@FEW
@given(**ANY_SPEC)
def test_any_spec(folder: Path, spec: str, backbone: str) -> None:
    on_specs(folder, spec, backbone)


@pytest.mark.slow
@MANY
@given(**ANY_SPEC)
def test_any_of_many_specs(folder: Path, spec: str, backbone: str) -> None:
    on_specs(folder, spec, backbone)
