import json
from pathlib import Path
from typing import Any

import pytest

from fedhead.errors import FedheadError
from fedhead.server.runs.history import Round
from fedhead.server.runs.record import JOURNAL, RunRecord
from fedhead.server.runs.summary import RESULT

LINE = {"number": 0, "sites": 2, "seconds": 0.5, "bytes_down": 10, "bytes_up": 20}
FILES = {
    "metrics.jsonl": json.dumps({**LINE, "score": 0.5, "dropped": {"a": "late"}}) + "\n",
    JOURNAL: json.dumps({"status": "failed", "error": "caf\udce9", "sites": {"a": {"standing": "lost", "rows": 7}}}),
    RESULT: json.dumps({"score": 0.75, "kept_round": 0, "sites": 2}),
    "evaluation.json": json.dumps({"pooled": {"rows": 3}}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text('task = "classification"\n')
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_folders_files_are_read(folder: Path) -> None:
    record = RunRecord.read(folder)
    assert record.rounds == (Round(**LINE, score=0.5, dropped={"a": "late"}),)
    assert (record.status, record.score, record.num_sites) == ("failed", 0.75, 2)
    assert (record.standing["a"].rows, record.journal.error) == (7, "caf\udce9")


def test_a_run_that_only_began_has_an_empty_record(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()
    record = RunRecord.read(folder)
    assert (record.status, record.score, record.kept_round, record.num_sites) == ("running", None, -1, 0)


def test_lines_and_journals_of_earlier_versions_are_read(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(json.dumps({**LINE, "accuracy": 0.25, "test_accuracy": None}) + "\n")
    (folder / JOURNAL).write_text(json.dumps({"status": "finished", "gone": [1]}))
    record = RunRecord.read(folder)
    assert record.rounds[0].score == 0.25
    assert record.journal.release_steps is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, text) for name in (JOURNAL, RESULT, "evaluation.json") for text in ("{", "[]", "3")),
        (JOURNAL, {"status": "well"}),
        (JOURNAL, {"sites": {"a": 1}}),
        (JOURNAL, {"seconds": {"train": "long"}}),
        ("metrics.jsonl", "{\n"),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", json.dumps({**LINE, "sites": "many"}) + "\n"),
        ("metrics.jsonl", json.dumps({**LINE, "dropped": ["a"]}) + "\n"),
        ("run.toml", "= 3"),
    ],
)
def test_a_damaged_file_is_named_in_a_sentence(name: str, content: Any, folder: Path) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FedheadError, match=rf"{name}.* is damaged"):
        RunRecord.read(folder)
