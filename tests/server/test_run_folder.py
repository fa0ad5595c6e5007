from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.model import TransferModel
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
    with pytest.raises(FedheadError, match=r"not on this machine: looked for .*backbone\.safetensors"):
        TransferModel.load(run)


def test_the_command_line_has_the_setting(tmp_path: Path) -> None:
    for flags, kept in ((["--with-backbone"], True), ([], False)):
        out = tmp_path / str(kept)
        told = CliRunner().invoke(app, ["simulate", "--rounds", "0", "--sites", "2", "--out", str(out), *flags])
        assert told.exit_code == 0, told.output
        assert (out / "backbone.safetensors").is_file() == kept
        assert RunConfig.from_toml(out / "run.toml").with_backbone == kept
