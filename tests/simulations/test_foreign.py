"""Foreign inputs from a run to its model, its exports and the monitoring of new rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays
from fedhead.drift import DriftCounts, compare_drift, count_drift
from fedhead.errors import FedheadError, UserError
from fedhead.membership import leave
from fedhead.model import TransferModel
from fedhead.server.report.page import render
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = {"min_class_count": 0, "min_rows": 0}


def some_digits(rows: range) -> Samples:
    digits = load_samples("digits")
    return samples_from_arrays([digits.read(row) for row in rows], ["of no known class"] * len(rows), spec=f"{rows}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "run"
    simulate(RunConfig(rounds=0, foreign=True, with_backbone=True, simulation={**OFF, "sites": 3}), out=folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty digits, and thirty pictures of noise."""
    root = tmp_path_factory.mktemp("pictures")
    digits, generator = load_samples("digits"), np.random.default_rng(0)
    for kind in ("digits", "noise"):
        (root / kind).mkdir()
    for number in range(30):
        digits.read(number).save(root / "digits" / f"{number}.png")
        noise = generator.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(root / "noise" / f"{number}.png")
    return root


def test_predictions_say_which_inputs_are_unlike_anything_seen(finished: Path, pictures: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(finished), str(pictures / "digits"), str(pictures / "noise")])
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert header == "path,label,probability,remark,error"
    remarks = [line.split(",")[3] for line in lines]
    assert remarks[:30].count("unlike anything seen") <= 2
    assert remarks[30:].count("unlike anything seen") >= 29
    listed = CliRunner().invoke(app, ["predict", str(finished), str(pictures / "noise" / "1.png"), "--json"])
    assert json.loads(listed.stdout)["foreign"] is True


def test_without_the_setting_nothing_changes(tmp_path: Path, pictures: Path) -> None:
    simulate(RunConfig(rounds=0, with_backbone=True, simulation={**OFF, "sites": 3}), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.foreign.*"))
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), str(pictures / "noise" / "1.png")])
    assert result.stdout.splitlines()[0] == "path,label,probability,error"
    refused = CliRunner().invoke(app, ["monitor", str(tmp_path / "run"), "--data", "digits"])
    assert refused.exit_code == 2
    assert "has no test for foreign inputs" in " ".join(refused.output.split())


def test_the_report_names_the_test_and_its_exchanges(finished: Path) -> None:
    found = json.loads((finished / "evaluation.json").read_text())["foreign"]
    assert found["rows"] > 100
    assert found["limits"].keys() == {"class", "background"}
    text = render(RunRecord.read(finished))
    assert "Foreign inputs" in text
    assert "two more exchanges" in text


def test_any_split_gives_the_same_test(finished: Path, tmp_path: Path) -> None:
    simulate(
        RunConfig(rounds=0, foreign=True, simulation={**OFF, "sites": 7, "partition": "iid"}), out=tmp_path / "run"
    )
    first, second = (TransferModel.load(run).foreign for run in (finished, tmp_path / "run"))
    assert first is not None
    assert second is not None
    assert first.known.rows == second.known.rows
    assert first.thresholds == pytest.approx(second.thresholds, rel=0.03)
    assert torch.allclose(first.distances.means, second.distances.means, rtol=1e-4, atol=1e-5)


def test_secure_summation_gives_the_same_test_and_hides_what_a_site_brought(finished: Path, tmp_path: Path) -> None:
    config = RunConfig(rounds=0, foreign=True, privacy={"secure_sum": True}, simulation={**OFF, "sites": 3})
    simulate(config, out=tmp_path / "run")
    plain, secure = (TransferModel.load(run).foreign for run in (finished, tmp_path / "run"))
    assert plain is not None
    assert secure is not None
    assert plain.known.counts.sum() == secure.known.counts.sum()
    assert torch.allclose(plain.distances.means, secure.distances.means, rtol=1e-4, atol=1e-5)
    for command in (["worth"], ["solve", "--out", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, [command[0], str(tmp_path / "run"), *command[1:]])
        assert result.exit_code == 2
        assert "because secure summation hides them" in " ".join(result.output.split())
    with pytest.raises(UserError, match="worth = true"):
        simulate(config.changed({"worth": True}), out=tmp_path / "worth")


@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_programs_have_the_test_as_their_second_output(finished: Path, tmp_path: Path, file_format: str) -> None:
    out = tmp_path / "model"
    result = CliRunner().invoke(app, ["export", str(finished), "--format", file_format, "--out", str(out)])
    assert result.exit_code == 0, result.output
    model = TransferModel.load(finished)
    digits, generator = load_samples("digits"), np.random.default_rng(1)
    noise = [Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8)) for _ in range(4)]
    own = model.backbone.preprocessing
    batch = own.collate([own(item) for item in [*map(digits.read, range(4)), *noise]])
    assert isinstance(batch, torch.Tensor)
    if file_format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(out)
        assert [one.name for one in session.get_outputs()] == ["probabilities", "foreign"]
        excess = session.run(None, {"pixels": batch.numpy()})[1].tolist()
    else:
        excess = torch.export.load(out).module()(batch)[1].tolist()
    assert max(excess[:4]) < 1
    assert min(excess[4:]) > 1


def test_a_site_that_leaves_takes_the_test_along(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    leave(run, "site-2")
    assert not list(run.glob("*.foreign.*"))
    assert TransferModel.load(run).foreign is None


def test_monitoring_counts_drift_and_counts_add(finished: Path, pictures: Path, tmp_path: Path) -> None:
    files = []
    for start in (0, 300):
        model = TransferModel.load(finished)
        part = some_digits(range(start, start + 300))
        counts = count_drift(model, part)
        files.append(tmp_path / f"{start}.json")
        counts.save(files[-1])
        assert counts.rows == sum(counts.predicted.values()) == 300
    result = CliRunner().invoke(
        app, ["monitor", str(finished), "--counts", str(files[0]), "--counts", str(files[1]), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == 600
    assert found["foreign"] <= 0.03
    out = tmp_path / "noise.json"
    noisy = CliRunner().invoke(app, ["monitor", str(finished), str(pictures / "noise"), "--out", str(out)])
    assert noisy.exit_code == 0, noisy.output
    assert "rows differ from those" in " ".join(noisy.output.split())
    drift = compare_drift(TransferModel.load(finished), [DriftCounts.load(out)])
    assert drift.drifted
    assert drift.foreign > 0.9


def test_too_few_rows_and_damaged_or_foreign_counts(finished: Path, tmp_path: Path) -> None:
    model = TransferModel.load(finished)
    few = some_digits(range(19))
    with pytest.raises(FedheadError, match="19 rows, and the limit is 20"):
        count_drift(model, few)
    counts = count_drift(model, few, min_rows=0)
    counts.save(tmp_path / "counts.json")
    values = json.loads((tmp_path / "counts.json").read_text())
    for key, value in (
        ("foreign", 20),
        ("foreign", -1),
        ("foreign", True),
        ("predicted", {"1": 3}),
        ("distances", [[1]]),
        ("distances", "x"),
        ("format", "other"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**values, key: value}))
        with pytest.raises(UserError, match="damaged"):
            DriftCounts.load(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text(json.dumps({**values, "model": "0" * 64}))
    with pytest.raises(UserError, match="another model"):
        compare_drift(model, [DriftCounts.load(tmp_path / "other.json")])
    with pytest.raises(UserError, match="different models"):
        compare_drift(model, [counts, DriftCounts.load(tmp_path / "other.json")])
