"""What tuning the last blocks of a backbone stores and sends."""

import json

import pytest
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.backbones.split import split
from fedhead.cli import app
from fedhead.simulations.rank import tuning_costs
from fedhead.tuning import parse_tune

pytestmark = pytest.mark.usefixtures("one_thread")


def test_costs_are_those_of_the_cuts() -> None:
    backbone = load_backbone("bundled:glyphnet")
    costs = tuning_costs(backbone, 100)
    assert [one.tune for one in costs] == ["last:1", "last:2", "last:3", "last:4"]
    images = backbone.preprocessing.collate([backbone.preprocessing(item) for item in backbone.preprocessing.probes()])
    for one in costs:
        trunk, tail = split(backbone, parse_tune(one.tune))
        assert one.parameters == sum(value.numel() for value in tail.trainable().values())
        assert one.bytes_per_row == 2 * trunk.boundary(images).values[0].numel()
        assert one.bytes_stored == 100 * one.bytes_per_row
        assert 0 < one.seconds_per_row < 10


def test_a_backbone_without_layers_has_no_costs(caplog: pytest.LogCaptureFixture) -> None:
    assert tuning_costs(load_backbone("bundled:pixels"), 100) == ()
    assert "no layers that could train" in caplog.text


def test_the_command_shows_them() -> None:
    flags = ["rank", "bundled:glyphnet", "--sites", "2", "--tune"]
    shown = CliRunner().invoke(app, flags, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "last:4" in shown.stdout and "recomputing, a row" in shown.stdout
    printed = CliRunner().invoke(app, [*flags, "--json"])
    (ranked,) = json.loads(printed.stdout)
    assert ranked["cuts"][0]["tune"] == "last:1"
