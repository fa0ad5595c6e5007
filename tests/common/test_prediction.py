import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.errors import UserError
from fedhead.heads import make_head
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model, find_inputs, predict_inputs
from fedhead.simulations import simulate


@pytest.fixture(scope="module")
def digits() -> Samples:
    return load_samples("digits")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, digits: Samples) -> Path:
    """A finished run on the first 1,200 digits."""
    seen = samples_from_arrays([digits.read(row) for row in range(1200)], digits.labels[:1200], classes=digits.classes)
    path = tmp_path_factory.mktemp("runs") / "digits"
    simulate(RunConfig(rounds=0), data=seen, sites=4, out=path)
    return path


@pytest.fixture
def unseen(tmp_path: Path, digits: Samples) -> Path:
    """Digits that the run has not seen, as files in a folder per class."""
    for row in range(1200, 1797):
        folder = tmp_path / "unseen" / digits.classes[digits.labels[row]]
        folder.mkdir(parents=True, exist_ok=True)
        image = digits.read(row)
        assert isinstance(image, Image.Image)
        image.save(folder / f"{row}.png")
    return tmp_path / "unseen"


def fedhead_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_the_models_own_in_order(run_dir: Path, unseen: Path) -> None:
    model = TransferModel.load(run_dir)
    inputs = find_inputs([str(unseen)], "image")
    predictions = list(predict_inputs(model, inputs))
    assert [one.name for one in predictions] == [one.name for one in inputs]
    expected = model.probabilities([Path(one.name) for one in inputs])
    assert torch.allclose(torch.tensor([one.answers for one in predictions]), expected, atol=1e-5)
    assert [one.decision for one in predictions] == [model.classes[row] for row in expected.argmax(1).tolist()]


def test_files_folders_patterns_and_tables_name_the_same_inputs(unseen: Path, tmp_path: Path) -> None:
    files = sorted(map(str, unseen.rglob("*.png")))
    table = tmp_path / "new.csv"
    table.write_text("path,remark\n" + "".join(f"{Path(file).relative_to(tmp_path)},x\n" for file in files))
    assert [one.name for one in find_inputs(files, "image")] == files
    assert [one.name for one in find_inputs([str(unseen)], "image")] == files
    assert [one.name for one in find_inputs([str(unseen / "*" / "*.png")], "image")] == files
    assert [one.name for one in find_inputs([str(unseen / "**" / "*.png")], "image")] == files
    from_table = find_inputs([str(table)], "image")
    assert [str(tmp_path / one.name) for one in from_table] == files
    assert from_table[0].read() == find_inputs(files[:1], "image")[0].read()


def test_the_command_writes_csv_and_json_lines(run_dir: Path, unseen: Path, tmp_path: Path) -> None:
    as_csv = fedhead_command("predict", run_dir, unseen, "--all", "--coverage", "0.9")
    assert as_csv.exit_code == 0
    rows = rows_of(as_csv.stdout)
    assert len(rows) == 597
    right = sum(Path(row["path"]).parent.name == row["label"] for row in rows)
    assert right > 0.93 * len(rows)
    assert all(row["label"] in row["set"].split(";") and not row["error"] for row in rows)
    assert float(rows[0][rows[0]["label"]]) == float(rows[0]["probability"])
    out = tmp_path / "predictions.jsonl"
    assert fedhead_command("predict", run_dir, unseen, "--out", out, "--all").exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1)


def test_what_is_no_image_is_told_in_its_line_and_by_the_exit_status(run_dir: Path, unseen: Path) -> None:
    (unseen / "3" / "broken.png").write_bytes(b"not an image")
    result = fedhead_command("predict", run_dir, unseen / "3")
    assert result.exit_code == 1
    broken = [row for row in rows_of(result.stdout) if row["error"]]
    assert [Path(row["path"]).name for row in broken] == ["broken.png"]
    assert not broken[0]["label"]
    assert "1 of" in result.stderr


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["empty"], "contains no images"),
        (["other.csv"], "has no column 'path', 'image', 'audio' or 'text'; it has 'name', 'age'"),
        (["bare.csv"], "has no rows"),
        (["latin.csv"], "is not text in UTF-8"),
    ],
)
def test_what_cannot_be_predicted_is_a_sentence(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("other.csv").write_text("name,age\nx,1\n")
    Path("bare.csv").write_text("path\n")
    Path("latin.csv").write_bytes("path\nblümchen.png\n".encode("latin-1"))
    result = fedhead_command("predict", run_dir, *paths)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_run_that_has_not_finished_and_a_model_that_is_not_there_are_sentences(run_dir: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.toml").write_bytes((run_dir / "run.toml").read_bytes())
    result = fedhead_command("predict", unfinished, "x.png")
    assert result.exit_code == 2
    assert "has not finished" in result.stderr
    assert fedhead_command("predict", tmp_path / "nowhere", "x.png").exit_code == 2


def test_a_missing_backbone_is_looked_for_and_taken_from_a_file(tmp_path: Path, unseen: Path) -> None:
    backbone = load_backbone("bundled:glyphnet", weights="random", seed=7)
    model = TransferModel(backbone, make_head("linear", backbone.num_features, 2), ("a", "b"))
    model.save(tmp_path / "m" / "model.safetensors")
    image = next(unseen.rglob("*.png"))
    result = fedhead_command("predict", tmp_path / "m", image)
    assert result.exit_code == 1
    said = "".join(result.stderr.split())
    assert "--weights" in said
    assert "backbone.safetensors" in said
    backbone.save(tmp_path / "weights.safetensors")
    by_file = fedhead_command("predict", tmp_path / "m", image, "--weights", tmp_path / "weights.safetensors")
    backbone.save(tmp_path / "m" / "backbone.safetensors")
    beside = fedhead_command("predict", tmp_path / "m", image)
    assert by_file.exit_code == beside.exit_code == 0
    assert by_file.stdout == beside.stdout


def test_an_evaluation_counts_what_prediction_says(run_dir: Path, unseen: Path) -> None:
    model, samples = TransferModel.load(run_dir), load_samples(f"folder:{unseen}")
    evaluated = evaluate_model(model, samples, coverage=0.9)
    predicted = model.predict([Path(path) for path in sorted(map(str, unseen.rglob("*.png")))])
    truth = [path.parent.name for path in sorted(unseen.rglob("*.png"))]
    assert evaluated.sums.correct == sum(one == other for one, other in zip(predicted, truth, strict=True))
    assert evaluated.covered >= evaluated.sums.correct
    assert 1 <= evaluated.mean_size < 2
    assert evaluated.covered / evaluated.sums.rows >= 0.9


def test_the_command_evaluates(run_dir: Path, unseen: Path) -> None:
    result = fedhead_command("evaluate", run_dir, "--data", f"folder:{unseen}", "--coverage", "0.9", "--json")
    assert result.exit_code == 0
    values: dict[str, Any] = json.loads(result.stdout)
    assert values["rows"] == 597
    assert values["accuracy"][0] > 0.93
    assert values["sets"]["stated"] == 0.9
    assert np.array(values["confusion"]).sum() == 597
    shown = fedhead_command("evaluate", run_dir, "--data", f"folder:{unseen}", "--coverage", "0.9")
    assert "(nominal 90.0 %)" in shown.stdout


def test_data_of_other_classes_or_another_kind_is_refused(run_dir: Path, unseen: Path) -> None:
    model = TransferModel.load(run_dir)
    (unseen / "3").rename(unseen / "three")
    with pytest.raises(UserError, match="three"):
        evaluate_model(model, load_samples(f"folder:{unseen}"))


def test_a_reader_that_has_enough_is_no_failure(run_dir: Path, unseen: Path) -> None:
    command = [sys.executable, "-c", "from fedhead.cli import main; main()", "predict", str(run_dir), str(unseen)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stderr is not None
    assert reader.stdout.readline().startswith("path,label")
    reader.stdout.close()
    assert reader.wait(300) == 0
    assert "Error" not in reader.stderr.read()
    reader.stderr.close()
