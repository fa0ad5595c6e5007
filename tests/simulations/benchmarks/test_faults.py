import json
import sys

import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks import faults as faults
from fedhead.simulations.benchmarks.measurement import app


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(sys.platform == "win32", reason="forks processes and sends them signals")
def test_disturbed_runs_end_in_the_undisturbed_head() -> None:
    result = CliRunner().invoke(
        app,
        ["faults", "--count", "200", "--each", "25", "--sites", "2", "--rounds", "60", "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)["ratio"]
    assert sum(figures.values()) == 200
    assert len(figures) == 6
