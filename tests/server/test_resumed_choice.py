"""A run that was killed goes on with the features that it had chosen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.config import RunConfig
from fedhead.data import load_samples, samples_from_arrays
from fedhead.server.observer import EachRound
from fedhead.server.runs.history import Round
from fedhead.simulations import simulate

ROWS = 200
SITES = [np.arange(start, ROWS, 4) for start in range(4)]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_with_the_features_that_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedhead.server.maps.AUTO_LIFT", "landmarks:48")
    monkeypatch.setattr("fedhead.server.runs.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("fedhead.server.runs.checkpoint.SHARE", float("inf"))
    monkeypatch.chdir(tmp_path)
    whole = load_samples("digits")
    samples = samples_from_arrays([whole.read(row) for row in range(ROWS)], whole.labels[:ROWS])
    config = RunConfig(rounds=3, lift="auto", simulation={"min_class_count": 0, "min_rows": 0})
    undisturbed = simulate(config, samples, list(SITES), out="undisturbed")

    def kill(finished: Round) -> None:
        if finished.number == 1:
            raise Killed

    with pytest.raises(Killed):
        simulate(config, samples, list(SITES), out="killed", observers=[EachRound(kill)])
    resumed = simulate(None, samples, list(SITES), out="killed", resume=True)
    assert resumed.config == undisturbed.config
    assert resumed.outcome.choices == undisturbed.outcome.choices
    assert resumed.outcome.choices[0]["question"] == "Features"
    first, second = resumed.model.head.state_dict(), undisturbed.model.head.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)
