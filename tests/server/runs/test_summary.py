import json
from pathlib import Path
from typing import Any

import pytest

from fedhead.errors import UserError
from fedhead.server.runs.summary import RESULT, RunSummary


def written(folder: Path, values: Any) -> Path:
    (folder / RESULT).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize("name", ["accuracy", "r2"])
def test_a_summary_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    summary = RunSummary(score=0.5, score_name=name, score_worst_site=0.25, kept_round=3, sites=2, rows_withheld=7)
    summary.write(tmp_path)
    assert RunSummary.read(tmp_path) == summary
    values = json.loads((tmp_path / RESULT).read_text())
    assert values == summary.to_dict()
    assert values[name] == values["score"] == 0.5
    assert values[f"{name}_worst_site"] == 0.25
    assert values["seconds"] is None
    changed = summary.after({"action": "leave", "site": "a"})
    changed.write(tmp_path)
    assert RunSummary.read(tmp_path) == changed
    assert {**values, "membership": {"action": "leave", "site": "a"}} == changed.to_dict()


def test_results_of_earlier_versions_are_read_and_keep_their_keys(tmp_path: Path) -> None:
    read = RunSummary.read(written(tmp_path, {"accuracy": 0.75, "kept_round": 0, "sites": 3, "remark": "kept"}))
    assert read is not None
    assert (read.score, read.score_name, read.sites, read.seconds) == (0.75, "accuracy", 3, None)
    assert read.to_dict()["remark"] == "kept"


def test_a_run_without_a_result_has_no_summary(tmp_path: Path) -> None:
    assert RunSummary.read(tmp_path) is None


@pytest.mark.parametrize(
    "values", ["[", "[]", "null", {}, {"kept_round": -1, "sites": 1}, {"kept_round": 0, "sites": "many"}, "\xff"]
)
def test_a_damaged_result_is_a_sentence(values: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"result\.json is damaged: .+\.$"):
        RunSummary.read(written(tmp_path, values))
