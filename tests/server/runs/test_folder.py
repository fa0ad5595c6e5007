import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.model import TransferModel
from fedhead.server.runs.folder import RunFolder
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate

ANIMALS, PLANTS = ["cat", "dog", "cow"], ["oak", "elm", "fir"]


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """Word vectors in which animals and plants lie apart."""
    draw = np.random.default_rng(0)
    path = tmp_path / "vectors.txt"
    lines = [(word, sign) for words, sign in ((ANIMALS, 1), (PLANTS, -1)) for word in words]
    path.write_text(
        "".join(f"{word} {' '.join(f'{x:.3f}' for x in draw.normal(sign, 0.2, 4))}\n" for word, sign in lines)
    )
    return path


def table(path: Path, rows: int) -> Path:
    draw = np.random.default_rng(1)
    lines = [
        f"{' '.join(draw.choice(words, int(draw.integers(3, 9))))},{name}\n"
        for _ in range(rows)
        for name, words in (("animal", ANIMALS), ("plant", PLANTS))
    ]
    path.write_text("text,label\n" + "".join(lines))
    return path


def test_a_run_that_keeps_its_backbone_needs_no_other_weights(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(tmp_path / "rows.csv", 60)
    config = RunConfig(
        backbone=f"vectors:{vectors}",
        with_backbone=True,
        rounds=0,
        simulation={"data": f"csv:{data}", "sites": 2, "partition": "iid", "min_class_count": 0, "min_rows": 0},
    )
    run = simulate(config, out=tmp_path / "run").run_dir
    assert run is not None and (run / "backbone.safetensors").is_file()
    vectors.unlink()
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "another machine"))

    assert TransferModel.load(run).predict(["cat cow", "fir"]) == ["animal", "plant"]
    letter = tmp_path / "letter.txt"
    letter.write_text("elm and oak")
    told = CliRunner().invoke(app, ["predict", str(run), str(letter)])
    assert told.exit_code == 0, told.output
    assert f"{letter},plant," in told.stdout
    more = table(tmp_path / "more.csv", 30)
    joined = CliRunner().invoke(app, ["join", str(run), "--site", "late", "--data", f"csv:{more}"])
    assert joined.exit_code == 0, joined.output

    (run / "backbone.safetensors").unlink()
    with pytest.raises(FedheadError, match=r"not on this machine: they are neither at .*backbone\.safetensors"):
        TransferModel.load(run)


def test_the_command_line_has_the_setting(tmp_path: Path) -> None:
    for flags, kept in ((["--with-backbone"], True), ([], False)):
        out = tmp_path / str(kept)
        told = CliRunner().invoke(app, ["simulate", "--rounds", "0", "--sites", "2", "--out", str(out), *flags])
        assert told.exit_code == 0, told.output
        assert (out / "backbone.safetensors").is_file() == kept
        assert RunConfig.from_toml(out / "run.toml").with_backbone == kept


def test_one_of_two_runs_takes_a_folder(tmp_path: Path) -> None:
    first, second = (RunFolder.create(tmp_path / "run", "digits") for _ in range(2))
    first.write_config(RunConfig(rounds=1))
    with pytest.raises(UserError, match="Another run has taken"):
        second.write_config(RunConfig(rounds=2))
    second.discard_if_unused()
    assert RunConfig.from_toml(tmp_path / "run" / "run.toml").rounds == 1


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    assert [RunFolder.create(None, "digits").path.name for _ in range(3)] == [
        "20260101-000000-digits",
        "20260101-000000-digits-2",
        "20260101-000000-digits-3",
    ]


def test_a_run_killed_before_it_wrote_its_configuration_can_be_started_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "digits")
    with pytest.raises(UserError, match=r"had not begun.*--out"):
        RunFolder.open(tmp_path / "run")
    resumed = CliRunner().invoke(app, ["simulate", "--resume", str(tmp_path / "run")])
    assert resumed.exit_code == 2
    assert simulate(RunConfig(rounds=0), out=tmp_path / "run").run_dir == (tmp_path / "run").resolve()


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not an empty folder"):
        RunFolder.create(tmp_path, "digits")


@pytest.mark.parametrize("line", ["[1]", "null", "{", '"round"'])
def test_damaged_metrics_are_told_in_a_sentence(tmp_path: Path, line: str) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    folder.write_config(RunConfig(rounds=1))
    (folder.path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="damaged"):
        folder.rewind(1)
    with pytest.raises(FedheadError, match=r"Line 1 of .* is damaged"):
        RunRecord.read(folder.path)


@pytest.mark.parametrize("wrong", [{"sites": "three"}, {"loss": [1]}, {"dropped": {"a": 1}}, {"number": None}])
def test_metrics_of_another_type_are_rejected(tmp_path: Path, wrong: dict[str, object]) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    folder.write_config(RunConfig(rounds=1))
    line = {"number": 0, "sites": 3, "seconds": 0.1, "bytes_down": 1, "bytes_up": 1, "loss": 0.5, "dropped": {}}
    (folder.path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    assert folder.rewind(1)[0].sites == 3
    (folder.path / "metrics.jsonl").write_text(f"{json.dumps({**line, **wrong})}\n")
    with pytest.raises(UserError, match=f"another type: {next(iter(wrong))}"):
        folder.rewind(1)


def test_a_folder_without_metrics_is_discarded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    folder.write_config(RunConfig(rounds=1))
    (folder.path / "metrics.jsonl").unlink()
    folder.discard_if_unused()
    assert not folder.path.exists()
