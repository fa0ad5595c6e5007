import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedhead.data import samples_from_arrays, samples_from_texts
from fedhead.errors import UserError
from fedhead.simulations.benchmarks.tuning_accuracy import app, negative, spread


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


def test_negatives_are_grey_and_inverted() -> None:
    samples = samples_from_arrays(np.full((3, 4, 4, 3), 250, dtype=np.uint8), [0, 1, 0], classes=["a", "b"])
    image = negative(samples).read(1)
    assert isinstance(image, Image.Image)
    assert np.unique(np.asarray(image)).tolist() == [5]
    assert negative(samples).fingerprint != samples.fingerprint
    with pytest.raises(UserError, match="no images"):
        negative(samples_from_texts(["one", "two"], [0, 1], classes=["a", "b"]))


def test_rows_are_spread_over_the_data() -> None:
    samples = samples_from_arrays(
        np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), range(10)
    )
    few = spread(samples, 4)
    assert few.labels.tolist() == [0, 3, 6, 9]
    assert np.asarray(few.read(2)).max() == 6
    assert spread(samples, 0) is samples
