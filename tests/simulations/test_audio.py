"""Sounds from data to a finished model: simulated and judged, then predicted, evaluated, exported and described."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.export import describe_export
from fedhead.model import TransferModel
from fedhead.server.report.card import CARD

soundfile = pytest.importorskip("soundfile")

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("falling", "rising", "steady")


def clip(number: int, row: int) -> Any:
    random = np.random.default_rng(100 * number + row)
    seconds = 0.25 + 0.2 * random.random()
    time = np.arange(int(8000 * seconds)) / 8000
    pitch = random.uniform(400, 900)
    slope = (-600, 600, 0)[number]
    tone = np.sin(2 * np.pi * (pitch + slope * time) * time)
    return (random.uniform(0.1, 0.5) * tone + 0.02 * random.standard_normal(len(time))).astype(np.float32)


def write_recordings(root: Path) -> None:
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for row in range(40):
            soundfile.write(root / name / f"{row}.wav", clip(number, row), 8000)


def fedhead(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("sounds")
    write_recordings(root / "recordings")
    result = fedhead(
        *("simulate", "--backbone", "bundled:logmel", "--data", f"folder:{root / 'recordings'}", "--sites", 3),
        *("--rounds", 0, "--out", root / "run", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["accuracy_held_out"] > 0.9
    return root


def test_predictions_name_each_unreadable_file(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "stereo.flac", np.stack([clip(1, 99)] * 2, axis=1), 44_100)
    soundfile.write(tmp_path / "good.wav", clip(1, 98), 8000)
    (tmp_path / "bad.mp3").write_bytes(b"not a sound" * 99)
    result = fedhead("predict", folder / "run", tmp_path, "--out", tmp_path / "out.csv")
    assert result.exit_code == 1
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "out.csv").open())}
    assert rows["good.wav"]["label"] == "rising"
    assert rows["stereo.flac"]["label"] in CLASSES
    assert "cannot be read as a sound" in rows["bad.mp3"]["error"]
    assert len(rows) == 3


def test_evaluation_card_and_python_agree_on_clips(folder: Path) -> None:
    result = fedhead("evaluate", folder / "run", "--data", f"folder:{folder / 'recordings'}", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["score"] > 0.9
    card = (folder / "run" / CARD).read_text()
    assert "A classifier of clips" in card
    assert 'pipeline_tag: "audio-classification"' in card or "pipeline_tag: audio-classification" in card
    assert "function" not in (folder / "run" / "journal.json").read_text()
    model = TransferModel.load(folder / "run")
    assert model.predict([folder / "recordings" / "steady" / "3.wav"]) == ["steady"]


@pytest.mark.parametrize(
    "form", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export", "state-dict", "fedhead"]
)
def test_every_export_runs_back(folder: Path, tmp_path: Path, form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    result = fedhead("export", folder / "run", "--format", form, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    described = describe_export(TransferModel.load(folder / "run"))
    assert described["task"] == "audio-classification"
    assert described["input"]["shapes"] == {"clips": ["batch", "length"], "lengths": ["batch"]}
    assert any("16000 Hz" in step for step in described["preprocessing"]["steps"])


@pytest.mark.slow
def test_an_encoder_from_a_folder_is_exported_for_clips_of_one_length(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        vocab_size=9,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    transformers.WhisperModel(config).save_pretrained(tmp_path / "whisper")
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    result = fedhead(
        *("simulate", "--backbone", f"hf:{tmp_path / 'whisper'}", "--data", f"folder:{folder / 'recordings'}"),
        *("--sites", 2, "--rounds", 0, "--out", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.output
    result = fedhead("export", tmp_path / "run", "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    described = describe_export(TransferModel.load(tmp_path / "run"))
    assert described["input"]["shapes"] == {"clips": ["batch", "length", 81]}


def test_texts_and_images_are_refused_for_sounds(folder: Path) -> None:
    recordings = f"folder:{folder / 'recordings'}"
    result = fedhead("simulate", "--data", recordings, "--sites", 2, "--rounds", 0, "--out", folder / "other")
    assert result.exit_code == 2
    assert "takes images, but the data contains clips" in " ".join(result.output.split())


@pytest.mark.slow
def test_spoken_digits_by_their_spectrogram(tmp_path: Path, assets: Path, caplog: pytest.LogCaptureFixture) -> None:
    recordings = sorted((assets / "fsdd" / "recordings").glob("*.wav"))
    if not recordings:
        pytest.skip("needs the spoken digits of fsdd")
    lines = ["path,label,speaker,split"]
    for path in recordings:
        digit, speaker, number = path.stem.split("_")
        lines.append(f"{path},{digit},{speaker},{'test' if int(number) < 5 else 'train'}")
    (tmp_path / "digits.csv").write_text("\n".join(lines))
    spec = f"csv:{tmp_path / 'digits.csv'}?split="
    with caplog.at_level(logging.ERROR):
        result = fedhead(
            *("simulate", "--backbone", "bundled:logmel", "--data", f"{spec}train", "--test-data", f"{spec}test"),
            *("--sites", 10, "--rounds", 0, "--out", tmp_path / "run", "--json"),
        )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["accuracy_test"] > 0.96
