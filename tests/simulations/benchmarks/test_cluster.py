import json

import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks.cluster import app


@pytest.mark.slow
def test_rounds_on_nodes_equal_one_process() -> None:
    pytest.importorskip("ray")
    options = ["--sites", "60", "--rows", "10", "--features", "16", "--nodes", "2", "--blocks", "4", "--json"]
    done = CliRunner().invoke(app, ["cluster", *options])
    assert done.exit_code == 0, done.output
    # Ray says above it that a node is gone.
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["seconds"].keys() == {"one process", "2 nodes"}
    assert printed["ratio"].keys() == {
        "milliseconds a worker and round, 2 nodes",
        "seconds a round on 100 workers, by arithmetic",
    }
    assert printed["setting"]["heads"].startswith("equal in every bit")
