import json

import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks.privacy import app

pytestmark = pytest.mark.slow


def test_accuracy_falls_as_epsilon_does() -> None:
    done = CliRunner().invoke(app, ["privacy", "--repeats", "2", "--epsilons", "0.1,8", "--sites", "4", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["accuracy"].values()
    assert found.keys() == {"none", "0.1", "8"}
    assert max(found["0.1"]) < min(found["8"]) <= found["none"][0]
    assert min(found["8"]) > 0.95
