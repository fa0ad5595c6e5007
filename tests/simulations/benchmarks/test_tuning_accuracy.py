import json

from typer.testing import CliRunner

from fedhead.config import RunConfig
from fedhead.simulations.benchmarks.tuning_accuracy import app, tuned_by


def test_runs_are_compared_with_the_solved_head() -> None:
    arguments = ["tuning-accuracy", "--only", "head,last:1", "--rounds", "1", "--sites", "2", "--rows", "150"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    runs = printed["setting"]["runs"]
    assert printed["ratio"].keys() == runs.keys() == {"head", "last:1"}
    assert runs["head"]["kept"] == "solved"
    assert runs["head"]["trainable_parameters"] == 0 < runs["last:1"]["trainable_parameters"]
    assert runs["last:1"]["bytes_up_a_site"] > runs["head"]["bytes_up_a_site"] > 0
    for one in runs.values():
        assert one["interval"][0] < one["accuracy"] < one["interval"][1]
    if runs["last:1"]["kept"] == "solved":
        assert runs["last:1"]["accuracy"] == runs["head"]["accuracy"]


def test_progressive_unfreezing_reaches_four_blocks_in_the_last_quarter() -> None:
    made = RunConfig(rounds=8).changed(tuned_by("progressive", RunConfig(rounds=8)))
    assert made.tune.schedule == {1: "last:1", 3: "last:2", 5: "last:3", 7: "last:4"}
    assert made.tune.layers == "last:4"
