from pathlib import Path
from typing import Any

import pytest

from fedhead.config import RunConfig, parse_assignments
from fedhead.errors import UserError


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig(
        backbone="bundled:pixels",
        classes=("a", 'b"\n'),
        seed=7,
        strategy={"name": "FedAdam", "eta": 0.01},
        local={"lr": 1e-7, "epochs": 3},
    )
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert RunConfig.from_toml(path) == config


def test_flags_lie_over_the_file_table_by_table(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('rounds = 3\n[local]\nlr = 0.5\nepochs = 2\n[strategy]\nname = "FedAdam"\n')
    config = RunConfig.from_toml(path, parse_assignments(["local.lr=0.05", "strategy.eta=0.1", "rounds=5"]))
    assert (config.rounds, config.local.lr, config.local.epochs) == (5, 0.05, 2)
    assert config.strategy.parameters == {"eta": 0.1}


def test_a_value_that_is_not_toml_is_text() -> None:
    assert parse_assignments(["simulation.data=folder:/data/x rays"]) == {"simulation": {"data": "folder:/data/x rays"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bakcbone": "x"}, ["bakcbone", "backbone"]),
        ({"local": {"learning_rate": 1}}, ["local.learning_rate", "lr"]),
        ({"local": {"lr": -1}}, ["local.lr", "greater than 0", "-1"]),
        ({"local": {"lr": float("nan")}}, ["local.lr"]),
        ({"rounds": -1}, ["rounds", "-1"]),
        ({"holdout": 1.0}, ["holdout"]),
        ({"privacy": {"epsilon": 1000}}, ["privacy.epsilon", "1000"]),
        ({"simulation": {"sites": 0}}, ["simulation.sites", "0"]),
        ({"classes": ["a"]}, ["two classes"]),
        ({"classes": ["a", "b", "a"]}, ["'a'", "twice"]),
        ({"classes": ["a", "b"], "classes_from": "digits"}, ["not both"]),
        ({"local": {"optimizer": "adamw", "momentum": 0.9}}, ["momentum"]),
        ({"local": {"optimizer": "lbfgs"}}, ["local.optimizer", "sgd", "adamw"]),
        ({"strategy": {"name": "FedAvg", "eta": [1]}}, ["strategy.eta"]),
    ],
)
def test_a_bad_value_is_a_sentence_that_names_it(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_values(values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["rounds = ", "\xff"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.toml is not valid TOML"):
        RunConfig.from_toml(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        RunConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("tune", [{"decay": 2.0}, {"lr": 0.1}, {"layers": "head", "epochs": 2}])
def test_settings_of_tuning_need_layers(tune: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs layers to tune"):
        RunConfig(tune=tune)


@pytest.mark.parametrize("text", ["lr", "=3", "local.=3"])
def test_an_assignment_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(UserError, match="TABLE"):
        parse_assignments([text])


def test_a_cluster_needs_the_engine_that_has_one() -> None:
    assert RunConfig(simulation={"engine": "ray", "cluster": "ray://head:10001"}).simulation.cluster
    with pytest.raises(UserError, match="engine 'ray'"):
        RunConfig(simulation={"cluster": "ray://head:10001"})


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(UserError, match=r"100 subgroups or fewer, not 376") as refused:
        RunConfig(subgroups=tuple(map(str, range(376))))
    assert len(str(refused.value)) < 700


def test_the_task_has_other_names_too() -> None:
    assert RunConfig().task == "classification"
    assert RunConfig(multi_label=True).task == RunConfig(task="multi-label").task == "multi-label"
    assert RunConfig(multi_label=False, task="regression").task == "regression"
    assert RunConfig(task="regression", targets=["pulse"]).classes == ("pulse",)
    assert "multi_label" not in RunConfig(multi_label=True).to_toml()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"multi_label": True, "task": "regression"}, "asks for task 'multi-label', but task is 'regression'"),
        ({"multi_label": "perhaps"}, "must be true or false"),
        ({"classes": ["a", "b"], "targets": ["c"]}, "classes or targets, not both"),
        ({"classes": ["a"]}, "two classes or more"),
    ],
)
def test_names_of_the_task_that_contradict_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RunConfig(**values)
