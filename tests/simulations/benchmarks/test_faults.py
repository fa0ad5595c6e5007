import json

import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks import faults as faults
from fedhead.simulations.benchmarks.measurement import app


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_disturbed_runs_end_in_the_undisturbed_head() -> None:
    result = CliRunner().invoke(
        app, ["faults", "--count", "40", "--sites", "2", "--rounds", "100", "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)["ratio"]
    assert sum(figures.values()) > 10
    assert len(figures) > 2
