import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedhead.data import Samples, UnreadableSampleError, load_samples, load_sites
from fedhead.errors import UserError

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "Grüße 你好", "line\u2028separator\x0b", " spaces "]
LABELS = ["a", "b", "a", "c", "b", "a"]


def png(value: int, side: int = 6) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (side, side), np.uint8)).save(content, "png")
    return content.getvalue()


def write_csv(path: Path, rows: list[dict[str, object]], **options: str) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts_of(samples: Samples) -> list[object]:
    return [samples.read(row) for row in range(len(samples))]


def save_rows(folder: Path, kind: str, rows: list[dict[str, object]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_table_gives_the_same_rows_in_any_order(tmp_path: Path, kind: str) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    samples = load_samples(save_rows(tmp_path, kind, rows))
    assert (samples.kind, samples.classes, samples.labels.tolist()) == ("text", ("a", "b", "c"), [0, 1, 0, 2, 1, 0])
    assert texts_of(samples) == TEXTS
    assert [samples.read(row) for row in (5, 0, 3, 4, 2)] == [TEXTS[row] for row in (5, 0, 3, 4, 2)]
    elsewhere = pickle.loads(pickle.dumps(samples))
    assert [elsewhere.read(row) for row in (4, 1)] == [TEXTS[4], TEXTS[1]]
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00")), min_size=1))
def test_any_text_round_trips_through_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = write_csv(tmp_path_factory.mktemp("csv") / "t.csv", [{"text": text, "label": "a"} for text in texts])
    samples = load_samples(f"csv:{path}")
    for row, text in enumerate(texts):
        if text.strip():
            assert samples.read(row) == text
        else:
            with pytest.raises(UnreadableSampleError, match="has no text"):
                samples.read(row)


@pytest.mark.parametrize(
    ("dialect", "encoding"),
    [
        ({"lineterminator": "\r\n"}, "utf-8"),
        ({"lineterminator": "\n"}, "utf-8-sig"),
        ({"delimiter": ";"}, "utf-8"),
        ({"delimiter": "\t"}, "utf-8-sig"),
        ({"quoting": csv.QUOTE_ALL}, "utf-8"),
    ],
)
def test_csv_from_spreadsheets(tmp_path: Path, dialect: dict[str, str], encoding: str) -> None:
    rows: list[dict[str, object]] = [{"text": t, "label": c} for t, c in zip(TEXTS, LABELS, strict=True)]
    samples = load_samples(f"csv:{write_csv(tmp_path / 't.csv', rows, encoding=encoding, **dialect)}")
    assert texts_of(samples) == TEXTS
    assert samples.name(3).endswith("t.csv, line 6")


def test_other_encodings_need_an_option(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("text,label\nplain,a\nGrüße,b\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"t\.csv, line 3 is not text in UTF-8 \(byte 0xfc\).*\?encoding=cp1252"):
        load_samples(f"csv:{path}")
    assert load_samples(f"csv:{path}?encoding=cp1252").read(1) == "Grüße"
    path.write_text("text,label\nplain,a\n", encoding="utf-16")
    with pytest.raises(UserError, match="is text in UTF-16"):
        load_samples(f"csv:{path}")
    with pytest.raises(UserError, match="line by line in utf-16"):
        load_samples(f"csv:{path}?encoding=utf-16")
    with pytest.raises(UserError, match="There is no encoding 'klingon'"):
        load_samples(f"csv:{path}?encoding=klingon")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; expected a header line"),
        (b"path,label\n", "has no rows"),
        (b"path,label\na.png,x,y\n", "line 2 has 3 values for the 2 columns"),
        (b'path,label\n"a.png,x\n', "begins on line 2: unexpected end of data"),
        (b"path,label,label\na.png,x,x\n", "two columns 'label'"),
        (b"file_id,label\n1,x\n", "no column 'path', 'image', 'audio' or 'text'; it has 'file_id', 'label'"),
        (b"a,b,label\n,,x\n,,y\n", "columns 'a', 'b' of .* have no value in the first 2 rows"),
        (b"path,finding\na.png,x\n", r"no column 'label'; it has 'path', 'finding'.*\?label=finding"),
        (b"path,text,label\na.png,hi,x\n", "'path', 'text', any of which"),
        (b"path,labels,class\na.png,x,y\n", r"columns 'labels', 'class': choose one"),
        (b"text,label\nhi,x\nyo,\nup,\n", "2 of the 3 rows .* have no label in column 'label'; the first: .*line 3"),
        (b"path,label\nno/1.png,x\nno/2.png,y\n", r"None of the files .*no/1\.png.*\?root="),
        (b"PK\x03\x04rest", "is an archive or a spreadsheet"),
        (b"PAR1rest", "is a Parquet file"),
        (b"text,label,site\nhi,x,n\nyo,y,\n", "line 3 has no site"),
    ],
)
def test_invalid_tables_are_rejected(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_samples(f"csv:{tmp_path / 't.csv'}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty; expected a line"),
        ('[{"text": "a", "label": "x"},\n', "line 1 is not JSON.*looks like one JSON array"),
        ('{"text": "a", "label": "x"}\n{"text": \n', "line 2 is not JSON"),
        ('{"text": "a", "label": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON .* nested too deeply"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "line 1 is not JSON .* thousands of digits"),
        ('{"text": "a", "label": "x"}\n3\n', "line 2 is of type int; expected a JSON object"),
        ('{"text": "a", "label": ["x"]}\n{"text": "b", "label": "y"}\n', "line 2 has no list of labels"),
        ('{"text": "a", "label": null}\n', "have no label"),
    ],
)
def test_invalid_json_lines_are_rejected(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        load_samples(f"jsonl:{tmp_path / 't.jsonl'}")


def test_a_line_of_json_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "' + "b" * 40 + '", "label": "y"}\n')
    assert len(load_samples(f"jsonl:{tmp_path / 't.jsonl'}")) == 2
    monkeypatch.setattr("fedhead.data.jsonl_file.MOST_LINE", 50)
    with pytest.raises(UserError, match=r"line 2 has more than"):
        load_samples(f"jsonl:{tmp_path / 't.jsonl'}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("csv:", "Expected a file"),
        ("csv:{0}", "is a folder; expected a file"),
        ("csv:{0}/none.csv", "There is no file"),
        ("csv:{0}/t.csv?labl=x", "Did you mean 'label'"),
        ("csv:{0}/t.csv?label", "expected name=value"),
        ("csv:{0}/t.csv?label=a&label=b", "repeats the option 'label'"),
        ("csv:{0}/t.csv?label=x", "no column 'x'; it has 'text', 'label'"),
        ("csv:{0}/t.csv?split=train", "no column 'split' for choosing 'train'"),
        ("csv:{0}/t.csv?split=label:y", "no rows of the split 'y'"),
        ("parquet:{0}/t.csv", "is not a Parquet file"),
    ],
)
def test_invalid_table_specs_are_rejected(tmp_path: Path, spec: str, words: str) -> None:
    (tmp_path / "t.csv").write_text("text,label\nhi,x\n")
    with pytest.raises(UserError, match=words):
        load_samples(spec.format(tmp_path))


def test_damaged_parquet_file_is_rejected(tmp_path: Path) -> None:
    spec = save_rows(tmp_path, "parquet", [{"text": "a", "label": "x"}])
    path = tmp_path / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rows\.parquet is not a Parquet file or is damaged"):
        load_samples(spec)


def test_damage_within_a_parquet_file_affects_single_rows(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": png(n, side=40), "label": n % 2} for n in range(8)]
    spec = save_rows(tmp_path, "parquet", rows)
    path = tmp_path / "rows.parquet"
    begin = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    samples = load_samples(spec)
    for row in (0, 3):
        assert samples.read(row).size == (40, 40)  # type: ignore[union-attr]
    with pytest.raises(UnreadableSampleError, match=r"rows\.parquet, row 6: 'image' is damaged"):
        samples.read(5)


def test_paths_are_relative_to_the_table_or_to_a_root(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1.png").write_bytes(png(1))
    (tmp_path / "scans" / "2.png").write_bytes(png(2)[:60])
    write_csv(tmp_path / "t.csv", [{"path": f"scans/{n}.png", "label": n % 2} for n in (1, 2, 3)])
    samples = load_samples(f"csv:{tmp_path / 't.csv'}")
    assert samples.read(0).size == (6, 6)  # type: ignore[union-attr]
    with pytest.raises(UnreadableSampleError, match=r"2\.png cannot be read as an image"):
        samples.read(1)
    with pytest.raises(UnreadableSampleError, match=r"3\.png cannot be read: there is no such file"):
        samples.read(2)
    write_csv(tmp_path / "u.csv", [{"image": "1.png", "label": "x"}])
    rooted = load_samples(f"csv:{tmp_path / 'u.csv'}?root={tmp_path / 'scans'}")
    assert rooted.read(0).tobytes() == samples.read(0).tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_are_chosen_by_the_spec(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, object]] = [
        {"note": f"n{n}", "finding": n % 3, "patient": f"p{n // 2}", "hospital": "nw"[n % 2], "fold": n % 4}
        for n in range(12)
    ]
    spec = save_rows(tmp_path, kind, rows)
    options = "text=note&label=finding&group=patient&site=hospital"
    samples = load_samples(f"{spec}?{options}&split=fold:1,2")
    assert texts_of(samples) == ["n1", "n2", "n5", "n6", "n9", "n10"]
    assert samples.classes == ("0", "1", "2")
    assert samples.groups == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert list(samples.sites or ()) == ["w", "n"] * 3
    assert list(samples.splits or ()) == ["1", "2"] * 3
    assert load_sites(samples.spec).sites == samples.sites
    whole = load_samples(f"{spec}?{options}")
    assert whole.key(0, whole.read(0)) == whole.key(1, whole.read(1)) != whole.key(2, whole.read(2))
    with pytest.raises(UserError, match="names none"):
        load_sites(f"{spec}?text=note&label=finding")


def test_row_without_a_group_is_its_own_group(tmp_path: Path) -> None:
    rows = [{"text": t, "label": "x", "group": g} for t, g in (("a", "p"), ("b", "p"), ("c", ""), ("d", ""))]
    samples = load_samples(f"csv:{write_csv(tmp_path / 't.csv', rows)}")  # type: ignore[arg-type]
    keys = [samples.key(row, samples.read(row)) for row in range(4)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_use_of_all_splits_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, object]] = [
        {"text": n, "label": n % 2, "split": "train" if n < 6 else "test"} for n in range(9)
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    assert len(load_samples(f"csv:{path}")) == 9
    assert "has the splits test, train, and all rows are used" in caplog.text
    caplog.clear()
    parts = [load_samples(f"csv:{path}?split={split}") for split in ("train", "test", "train,test")]
    assert [len(part) for part in parts] == [6, 3, 9]
    assert len({part.fingerprint for part in parts}) == 3
    assert not caplog.text


@pytest.mark.parametrize("separator", [";", "|"])
def test_field_with_several_labels(tmp_path: Path, separator: str) -> None:
    marks = [["fox", "elk"], [], ["owl"], ["owl", "fox"]]
    rows = [{"text": str(n), "label": f" {separator} ".join(row)} for n, row in enumerate(marks)]
    samples = load_samples(f"csv:{write_csv(tmp_path / 't.csv', rows)}?separator={separator}")  # type: ignore[arg-type]
    lists = [{"text": str(n), "label": row} for n, row in enumerate(marks)]
    others = [load_samples(save_rows(tmp_path, kind, lists)) for kind in ("jsonl", "parquet")]  # type: ignore[arg-type]
    for one in (samples, *others):
        assert (one.multi_label, one.classes) == (True, ("elk", "fox", "owl"))
        assert one.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]]


def test_numeric_classes_are_sorted_by_value(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": str(n), "label": n} for n in (10, 9, 2, 10)]
    for kind in ("csv", "jsonl", "parquet"):
        samples = load_samples(save_rows(tmp_path, kind, rows))
        assert (samples.classes, samples.labels.tolist()) == (("2", "9", "10"), [2, 1, 0, 2])
    table = pa.table({"text": ["a", "b"], "label": [3.0, 4.0]})
    pq.write_table(table, tmp_path / "gaps.parquet")
    assert load_samples(f"parquet:{tmp_path / 'gaps.parquet'}").classes == ("3", "4")


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet_file_with_images(tmp_path: Path, form: str) -> None:
    files = [png(n) for n in range(10)]
    for n, content in enumerate(files):
        (tmp_path / f"{n}.png").write_bytes(content)
    forms: dict[str, Callable[[int], object]] = {
        "bytes": lambda n: files[n],
        "struct": lambda n: {"bytes": files[n], "path": None},
        "path": lambda n: {"bytes": None, "path": f"{n}.png"},
    }
    rows: list[dict[str, object]] = [{"image": forms[form](n), "label": n % 2} for n in range(10)]
    samples = load_samples(save_rows(tmp_path, "parquet", rows))
    assert samples.kind == "image"
    for n in (0, 1, 9, 4, 3):
        expected = np.asarray(Image.open(io.BytesIO(files[n])))
        assert np.array_equal(np.asarray(samples.read(n)), expected)


def test_error_names_broken_rows_of_a_parquet_file(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": content, "label": 0} for content in (png(0), None, b"", png(1)[:50])]
    samples = load_samples(save_rows(tmp_path, "parquet", rows))
    for row, words in ((1, "row 2 holds no image"), (2, "row 3 is empty"), (3, "row 4 cannot be read as an image")):
        with pytest.raises(UnreadableSampleError, match=words):
            samples.read(row)
    assert samples.read(0).size == (6, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_fingerprint_changes_with_the_content(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, object]] = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    before = load_samples(save_rows(tmp_path, kind, rows)).fingerprint
    assert load_samples(save_rows(tmp_path, kind, [rows[0], {"text": "c", "label": "y"}])).fingerprint != before


def test_fingerprint_changes_with_the_files_named_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    path = write_csv(tmp_path / "t.csv", [{"path": "1.png", "label": "x"}])
    before = load_samples(f"csv:{path}").fingerprint
    assert load_samples(f"csv:{path}").fingerprint == before
    (tmp_path / "1.png").write_bytes(png(2, side=7))
    assert load_samples(f"csv:{path}").fingerprint != before


def test_labels_that_differ_by_case_or_spaces_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, object]] = [
        {"text": n, "label": label} for n, label in enumerate(["cat", "Cat", "cat ", "dog"])
    ]
    samples = load_samples(f"csv:{write_csv(tmp_path / 't.csv', rows)}")
    assert samples.classes == ("Cat", "cat", "cat ", "dog")
    assert "The classes 'Cat' and 'cat' and 'cat ' of" in caplog.text


def test_rows_without_a_label_are_left_out_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label,group\na,x,1\nb,,2\nc,y,3\nd,x,4\n")
    samples = load_samples(f"csv:{path}?labels=some")
    assert [samples.read(row) for row in range(len(samples))] == ["a", "c", "d"]
    assert samples.groups == ["1", "3", "4"]
    assert [samples.classes[label] for label in samples.labels] == ["x", "y", "x"]
    assert [str(one) for one in samples.left_out] == [f"1 row left out (no label, by labels=some): {path}, line 3"]
    assert len(load_samples(f"csv:{path}?labels=no")) == 4
    with pytest.raises(UserError, match="labels=some"):
        load_samples(f"csv:{path}")
    path.write_text("text,label\na,\nb,\n")
    with pytest.raises(UserError, match=r"\?labels=no"):
        load_samples(f"csv:{path}?labels=some")
