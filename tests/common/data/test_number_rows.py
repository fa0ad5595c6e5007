import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedhead.data import Samples, TableRow, load_samples
from fedhead.data.items import content_key
from fedhead.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"id": 10 + row, "age": 20 + row, "pulse": 60.5 + row, "clinic": "ABC"[row % 3], "risk": row / 4, "ill": row % 2}
    for row in range(12)
]


def save_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    else:
        numbers = np.array([[row["age"], row["pulse"]] for row in rows])
        risk = np.array([row["risk"] for row in rows])
        np.savez(path, features=numbers, columns=["age", "pulse"], targets=risk)
    return f"{kind}:{path}"


def numbers_of(samples: Samples) -> list[list[float]]:
    rows = [samples.read(row) for row in range(len(samples))]
    assert all(isinstance(row, TableRow) for row in rows)
    return [row.values.tolist() for row in rows if isinstance(row, TableRow)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_numbers_become_features(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    samples = load_samples(save_rows(tmp_path, kind, ROWS) + "?label=ill")
    assert (samples.kind, samples.columns) == ("table", ("age", "pulse", "risk"))
    assert (samples.classes, samples.labels.tolist()) == (("0", "1"), [0, 1] * 6)
    assert numbers_of(samples) == [[row["age"], row["pulse"], row["risk"]] for row in ROWS]
    assert "'clinic'" in caplog.text
    assert "only row numbers; name it in ?features= to use it): 'id'" in caplog.text
    assert numbers_of(pickle.loads(pickle.dumps(samples))) == numbers_of(samples)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "npz"])
def test_targets_are_real_numbers(tmp_path: Path, kind: str) -> None:
    option = "" if kind == "npz" else "?target=risk&features=age,pulse"
    samples = load_samples(save_rows(tmp_path, kind, ROWS) + option)
    assert samples.targets is not None
    assert samples.targets.dtype == np.float64
    assert samples.targets.tolist() == [[row["risk"]] for row in ROWS]
    assert (samples.classes, samples.columns) == ((), ("age", "pulse"))
    assert numbers_of(samples) == [[row["age"], row["pulse"]] for row in ROWS]
    assert load_samples(samples.spec).fingerprint == samples.fingerprint


def test_several_targets_and_purposes_are_kept_apart(tmp_path: Path) -> None:
    rows = [{**row, "site": "AB"[row["id"] % 2], "group": row["age"] // 3, "split": "train"} for row in ROWS]
    samples = load_samples(save_rows(tmp_path, "csv", rows) + "?target=risk,ill")
    assert samples.target_names == ("risk", "ill")
    assert samples.columns == ("age", "pulse")
    assert samples.groups == [str(row["group"]) for row in rows]
    assert samples.sites == [row["site"] for row in rows]


def test_texts_and_images_can_have_real_targets(tmp_path: Path) -> None:
    samples = load_samples(
        save_rows(tmp_path, "csv", [{"text": "good", "stars": 4.5}, {"text": "bad", "stars": 1}]) + "?target=stars"
    )
    assert samples.kind == "text"
    assert samples.targets is not None
    assert samples.targets.tolist() == [[4.5], [1.0]]


def test_semicolons_come_with_decimal_commas(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("sep=;\nbmi;label\n21,5;a\n1e2;b\n", encoding="utf-8")
    assert numbers_of(load_samples(f"csv:{path}")) == [[21.5], [100.0]]


def test_names_with_commas(tmp_path: Path) -> None:
    rows = [{"size, mm": 1.5, "b": 2, "c": 3, "label": "x"}, {"size, mm": 2.5, "b": 1, "c": 2, "label": "y"}]
    samples = load_samples(save_rows(tmp_path, "csv", rows) + "?features=c,size, mm")
    assert samples.columns == ("c", "size, mm")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("risk", "", "line 4 has no value in the column 'risk' .1 of 12 rows have none"),
        ("risk", "inf", "line 4 has 'inf' in the column 'risk', which is not a finite number"),
        ("risk", "NaN", "line 4 has no value in the column 'risk'"),
        ("risk", "high", "line 4 has 'high' in the column 'risk'; expected a number"),
        ("age", "-inf", "line 4 has '-inf' in the column 'age'"),
    ],
)
def test_error_names_value_that_is_not_a_number(tmp_path: Path, column: str, value: str, words: str) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2][column] = value
    with pytest.raises(UserError, match=words):
        load_samples(save_rows(tmp_path, "csv", rows) + "?target=risk&features=age,pulse")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("?target=rsk", "has no column 'rsk'; it has 'id', 'age'"),
        ("?target=risk&label=ill", "names label and target; expected one of them"),
        ("?target=risk,risk", "names the column 'risk' twice"),
        ("?label=ill&features=age,ill", "'ill' is to be predicted"),
        ("?label=ill&features=clinic", "'A' in the column 'clinic'; expected a number"),
        ("?label=ill&kind=sound", "kind 'sound'; expected image, audio, text or table"),
        ("?label=ill&features=age&text=clinic", "a column for text, and rows of numbers"),
    ],
)
def test_invalid_options_are_rejected(tmp_path: Path, option: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_samples(save_rows(tmp_path, "csv", ROWS) + option)


def test_constant_target_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "risk": 2.5} for row in ROWS]
    load_samples(save_rows(tmp_path, "csv", rows) + "?target=risk")
    assert "is 2.5 in all 12 rows: there is nothing to predict" in caplog.text


def test_row_identity_is_independent_of_column_order(tmp_path: Path) -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    one = load_samples(save_rows(tmp_path, "csv", ROWS) + "?label=ill").read(3)
    other = load_samples(save_rows(tmp_path, "jsonl", turned) + "?label=ill").read(3)
    assert isinstance(one, TableRow)
    assert isinstance(other, TableRow)
    assert one.columns.names != other.columns.names
    assert content_key(one) == content_key(other)


def test_an_archive_of_numbers_with_labels_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, features=np.array([[1.0, 2], [3, np.nan]]), labels=["a", "b"], risk=np.array([[1.0, 2], [3, 4]]))
    samples = load_samples(f"npz:{path}")
    assert (samples.kind, samples.columns, samples.classes) == ("table", ("x0", "x1"), ("a", "b"))
    with pytest.raises(Exception, match="row 1 has no finite number in the column 'x1'"):
        samples.read(1)
    np.savez(tmp_path / "e.npz", features=np.zeros((0, 2)), targets=np.zeros(0))
    with pytest.raises(UserError, match="has no rows"):
        load_samples(f"npz:{tmp_path / 'e.npz'}")
    targets = load_samples(f"npz:{path}?target=risk")
    assert targets.target_names == ("risk[0]", "risk[1]")


MIXED: list[dict[str, Any]] = [
    {"age": 40 + row, "pulse": [70, 0, ""][row % 3], "stage": ["I", "II", "III", ""][row % 4], "ill": "ny"[row % 2]}
    for row in range(24)
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_missing_numbers_and_levels_of_categories(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "pulse": row["pulse"] if kind == "csv" else row["pulse"] or None} for row in MIXED]
    samples = load_samples(save_rows(tmp_path, kind, rows) + "?label=ill&categories=stage&missing=pulse:0")
    assert samples.columns == ("age", "pulse", "stage=I", "stage=II", "stage=III", "stage=")
    assert samples.incomplete == ("pulse",)
    read = np.array(numbers_of(samples))
    assert np.isnan(read[:, 1]).tolist() == [row % 3 > 0 for row in range(24)]
    assert read[:, 2:].argmax(1).tolist() == [row % 4 for row in range(24)]
    assert (read[:, 2:].sum(1) == 1).all()


def test_levels_of_other_rows_do_not_change_a_rows_key(tmp_path: Path) -> None:
    whole = load_samples(save_rows(tmp_path, "csv", MIXED) + "?label=ill&categories=stage")
    keys = [content_key(whole.read(row)) for row in range(24)]
    (tmp_path / "part").mkdir()
    part = load_samples(save_rows(tmp_path / "part", "csv", MIXED[1::4]) + "?label=ill&categories=stage")
    assert part.columns == ("age", "pulse", "stage=II")
    assert [content_key(part.read(row)) for row in range(6)] == keys[1::4]
    assert len(set(keys)) == 24


def test_a_site_may_lack_levels_but_not_have_others(tmp_path: Path) -> None:
    from fedhead.backbones import load_backbone

    part = load_samples(save_rows(tmp_path, "csv", MIXED[1::4]) + "?label=ill&categories=stage&features=age")
    backbone = load_backbone("identity:age,stage=I,stage=II,stage=")
    assert backbone.features_of([part.read(0)]).tolist() == [[41, 0, 1, 0]]
    with pytest.raises(UserError, match=r"has 'II' in the categorical column 'stage', and the model knows .* 'I'"):
        load_backbone("identity:age,stage=I").features_of([part.read(0)])
    with pytest.raises(UserError, match=r"lacks 1 of the 2 columns .* 'grade=I'"):
        load_backbone("identity:age,grade=I").features_of([part.read(0)])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("missing=pulse", "expected COLUMN:CODE"),
        ("missing=puls:0", "expected COLUMN:CODE"),
        ("categories=stag", "no column 'stag'"),
        ("categories=ill", "'ill' is to be predicted"),
    ],
)
def test_wrong_options_of_mixed_tables_are_rejected(tmp_path: Path, option: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_samples(save_rows(tmp_path, "csv", MIXED) + f"?label=ill&{option}")


def test_names_and_free_text_are_no_categories(tmp_path: Path) -> None:
    rows = [{"name": f"person {row}", "ill": row % 2} for row in range(300)]
    with pytest.raises(UserError, match="'name' has 300 different values; a categorical column has at most 200"):
        load_samples(save_rows(tmp_path, "csv", rows) + "?label=ill&categories=name")
