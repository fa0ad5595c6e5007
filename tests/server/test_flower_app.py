import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict, validate_config

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.server.flower_app import from_run_config, write_flower_app

CONFIG = RunConfig(
    backbone="bundled:pixels",
    classes=["ill", 'so-called "well"', "über, all", "1"],
    rounds=3,
    strategy={"name": "FedAdam", "eta": 0.01},
    local={"lr": 0.05},
)


def test_a_run_comes_back_from_the_app_that_it_was_written_to(tmp_path: Path) -> None:
    path = write_flower_app(tmp_path / "app", CONFIG, "/runs/xray")
    app = tomllib.loads(path.read_text())
    flat = flatten_dict(app["tool"]["flwr"]["app"]["config"])
    assert flat["out"] == "/runs/xray"
    assert from_run_config(flat) == CONFIG
    assert from_run_config({**flat, "rounds": 5, "local.lr": 1.0}) == CONFIG.changed(
        {"rounds": 5, "local": {"lr": 1.0}}
    )


def test_flower_finds_the_app_valid(tmp_path: Path) -> None:
    path = write_flower_app(tmp_path / "app", CONFIG)
    valid, mistakes, warnings = validate_config(tomllib.loads(path.read_text()), True, path.parent)
    assert (valid, mistakes, warnings) == (True, [], [])


def test_an_app_without_classes_or_over_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs its classes"):
        write_flower_app(tmp_path / "app", RunConfig())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        write_flower_app(tmp_path, CONFIG)


def test_a_setting_that_flwr_run_misspells_is_told() -> None:
    with pytest.raises(UserError, match=r"no setting 'local.rl'"):
        from_run_config({"classes": '["a", "b"]', "local.rl": 0.1})
