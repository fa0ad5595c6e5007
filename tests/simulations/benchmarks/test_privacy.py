import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedhead.simulations.benchmarks.privacy import app, even_rows


def test_rows_are_drawn_evenly_from_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 3, 20])
    rows = even_rows(labels, 33)
    assert len(set(rows.tolist())) == 33
    assert np.bincount(labels[rows]).tolist() == [15, 3, 15]
    assert sorted(even_rows(labels, 73)) == list(range(73))


@pytest.mark.slow
def test_accuracy_falls_as_epsilon_does() -> None:
    done = CliRunner().invoke(app, ["privacy", "--repeats", "2", "--epsilons", "0.1,8", "--sites", "4", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["accuracy"].values()
    assert found.keys() == {"none", "0.1", "8"}
    # Of 360 rows, one or two can be right by luck.
    assert max(found["0.1"]) < min(found["8"]) <= found["none"][0] + 0.01
    assert min(found["8"]) > 0.95
