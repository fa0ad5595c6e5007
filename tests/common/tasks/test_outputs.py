"""Names of a model's outputs for readers."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedhead.config import RunConfig
from fedhead.server.report.page import render
from fedhead.server.runs.record import RunRecord
from fedhead.simulations import simulate
from fedhead.tasks import tasks


@pytest.mark.parametrize(
    ("task", "columns", "shown", "name"),
    [
        ("classification", ["a", "b"], ["a", "b"], "classes"),
        ("regression", ["pressure"], ["pressure"], "targets"),
        ("clusters", ["cluster 0"], ["cluster 0"], "clusters"),
        (
            "survival",
            ["event until 90", "event until 180", "at risk until 90", "at risk until 180"],
            ["until 90", "until 180"],
            "time bins",
        ),
    ],
)
def test_outputs_are_named(task: str, columns: Sequence[str], shown: Sequence[str], name: str) -> None:
    assert list(tasks[task].shown(columns)) == shown
    assert tasks[task].output_names[1] == name


def test_one_site_is_not_compared_with_itself(tmp_path: Path) -> None:
    config = RunConfig.from_values({"rounds": 0, "simulation": {"sites": 1, "partition": "iid"}})
    result = simulate(config, out=tmp_path / "run")
    assert not result.outcome.diagnoses
    assert "One site is its own pool" in render(RunRecord.read(tmp_path / "run"))
    assert RunRecord.read(tmp_path / "run").outputs == "10 classes"
