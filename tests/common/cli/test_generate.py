import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedhead.cli.application import app

pytest.importorskip("transformers")

ANSWER = "Yes.\x1b[2J\x1b]0;title\x07 \x9b31m \u202eabc \ud800"


@pytest.fixture(autouse=True)
def a_model_that_writes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*given: Any, **settings: Any) -> list[str]:
        return [ANSWER]

    monkeypatch.setattr("fedhead.cli.generate.load_model", lambda *given: None)
    monkeypatch.setattr("fedhead.generation.generate", answers)


def test_commands_to_a_terminal_are_shown_as_escapes() -> None:
    for options in ([], ["--json"]):
        told = CliRunner().invoke(app, ["generate", "model", "Hi", *options])
        assert told.exit_code == 0
        assert told.output.startswith("Yes.") or json.loads(told.output)["completion"] == ANSWER
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(told.output)


def test_half_of_a_character_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    told = CliRunner().invoke(app, ["generate", "model", "Hi", "--out", str(file)])
    assert told.exit_code == 0, told.output
    assert json.loads(file.read_text(encoding="utf-8"))["completion"] == ANSWER.replace("\ud800", "\ufffd")
