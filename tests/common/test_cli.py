import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import fedhead.simulations
from fedhead.cli import app
from fedhead.config import PrivacyConfig, RunConfig, SimulationConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERMINAL_WIDTH", "140")
    return tmp_path


def fedhead_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def stderr_of(result: Result) -> str:
    return " ".join(click.unstyle(result.stderr).split())


def run_folders() -> list[Path]:
    return list(Path("runs").iterdir()) if Path("runs").exists() else []


def save_images(root: Path, per_class: int = 20, classes: tuple[str, ...] = ("ant", "bee")) -> None:
    """Write a sub-folder of images per class, whose brightness gives it away."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 60, (12, 12)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")


# Help.


def test_the_version_is_the_packages() -> None:
    result = fedhead_command("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, version("fedhead"))


def test_help_names_the_commands_and_shows_an_example() -> None:
    result = fedhead_command("--help")
    assert result.exit_code == 0
    text = click.unstyle(result.stdout)
    for word in ("simulate", "--version", "Example: fedhead simulate"):
        assert word in text
    assert "Example: fedhead simulate" in click.unstyle(fedhead_command().output)


def test_every_commands_help_groups_its_flags_and_shows_an_example() -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, click.Group)
    assert "simulate" in commands.commands
    for name, command in commands.commands.items():
        below = [(name, part) for part in command.commands] if isinstance(command, click.Group) else [(name,)]
        for words in below:
            text = click.unstyle(fedhead_command(*words, "--help").stdout)
            assert f"Example: fedhead {name}" in text, words
            assert "─ Output ─" in text, words


def test_every_setting_has_a_flag_of_its_name() -> None:
    settings = {*RunConfig.model_fields, *PrivacyConfig.model_fields} - {"strategy", "local", "privacy", "simulation"}
    simulated = [*settings, *SimulationConfig.model_fields]
    for command, names in (("simulate", simulated), ("server", settings)):
        text = click.unstyle(fedhead_command(command, "--help").stdout)
        for name in names:
            assert f"--{name.replace('_', '-')} " in text, (command, name)
        assert "─ The run ─" in text


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    # The flags of a run are generated from its settings, which pydantic checks.
    heavy = {"torch", "flwr", "numpy", "sklearn", *(() if "simulate" in arguments else ("pydantic",))}
    program = (
        "import sys\nfrom fedhead.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# What goes well.


def test_json_is_one_object_with_the_figures() -> None:
    result = fedhead_command("simulate", "--rounds", "1", "--sites", "3", "--json")
    assert (result.exit_code, stderr_of(result)) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    values = json.loads(result.stdout)
    assert values["accuracy"] > 0.8
    assert values["rounds"] == 1
    assert {"accuracy_worst_site", "bytes_down", "bytes_up", "seconds"} <= set(values)
    (folder,) = run_folders()
    assert Path(values["run_dir"]) == folder.resolve()


def test_a_person_reads_a_table_and_a_summary() -> None:
    result = fedhead_command("simulate", "--rounds", "2", "--sites", "3", "--out", "mine")
    assert result.exit_code == 0
    text = click.unstyle(result.stdout)
    for word in ("round", "loss", "accuracy", "down", "up", "seconds", "Accuracy", "worst", "Traffic", "Run folder"):
        assert word in text
    assert "mine" in text.splitlines()[-1]
    assert not run_folders()


def test_names_are_printed_as_they_are() -> None:
    save_images(Path("data/large:car:"), classes=("[bold]ant", "bee"))
    save_images(Path("data/small[b]"), per_class=2, classes=("[bold]ant", "bee"))
    flags = ["--data", "folder:data", "--partition", "folder", "--rounds", "1", "--out", "mine[/b][red]"]
    result = fedhead_command("simulate", *flags)
    assert result.exit_code == 0, stderr_of(result)
    for name in ("large:car:", "small[b]", "[bold]ant", "mine[/b][red]"):
        assert name in result.stdout
    missing = fedhead_command("simulate", "--data", "folder:no[b]:car:")
    assert "There is no folder no[b]:car:." in stderr_of(missing)


def test_flags_and_assignments_lie_over_the_file() -> None:
    Path("run.toml").write_text('rounds = 9\nseed = 5\ninit = "zeros"\n[local]\nlr = 0.5\nepochs = 2\n')
    flags = ["--rounds", "1", "--sites", "3", "--test-data", "digits", "--classes", ",".join("0123456789")]
    result = fedhead_command("simulate", "run.toml", *flags, "--set", "local.lr=0.05", "--out", "out", "--json")
    assert result.exit_code == 0, stderr_of(result)
    ran = RunConfig.from_toml(Path("out/run.toml"))
    assert (ran.rounds, ran.seed, ran.init, ran.local.lr, ran.local.epochs) == (1, 5, "zeros", 0.05, 2)
    assert (ran.simulation.sites, ran.simulation.test_data) == (3, "digits")
    assert json.loads(result.stdout)["accuracy"] == json.loads(result.stdout)["accuracy_test"]


def test_unreadable_images_are_counted_or_refused() -> None:
    save_images(Path("data"))
    Path("data/bee/broken.png").write_bytes(b"no image")
    Path("data/ant/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Path("data/bee/gone.png").symlink_to("nowhere.png")
    flags = ["simulate", "--data", "folder:data", "--sites", "2", "--rounds", "1", "--partition", "iid"]
    skipped = fedhead_command(*flags, "--json")
    assert skipped.exit_code == 0, stderr_of(skipped)
    assert json.loads(skipped.stdout)["rows_skipped"] == 3
    assert "3 unreadable rows" in fedhead_command(*flags).stdout
    before = run_folders()
    strict = fedhead_command(*flags, "--strict-data")
    assert strict.exit_code == 2
    assert "ant/cut.jpg cannot be read as an image" in stderr_of(strict)
    assert run_folders() == before


# What does not.


def refuse(status: int, words: str, *arguments: str) -> None:
    """Check that a command fails in one sentence and leaves nothing behind."""
    result = fedhead_command("simulate", *arguments)
    text = stderr_of(result)
    assert result.exit_code == status, (result.exit_code, text, result.exception)
    assert result.stdout == ""
    assert words in text, text
    assert "Traceback" not in text
    assert "unexpected" not in text
    assert not run_folders()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "run.toml cannot be read: No such file"),
        ("rounds = ", "run.toml is not valid TOML"),
        ("rouds = 3", "no setting 'rouds'. Did you mean 'rounds'"),
        ("[locale]\nlr = 1", "Did you mean 'local'"),
        ("[local]\nlearning_rate = 1", "no setting 'local.learning_rate'"),
        ("[simulation]\nsite = 3", "Did you mean 'sites'"),
        ("local = 3", "Setting 'local'"),
        ("classes = 'abc'", "Setting 'classes'"),
        ("classes = ['a', 'a']", "named twice"),
        ("rounds = 1.5", "Setting 'rounds'"),
        ("rounds = -4", "Setting 'rounds'"),
        ("holdout = nan", "Setting 'holdout'"),
        ("seed = 99999999999999999999", "Setting 'seed'"),
        ("[local]\nlr = inf", "Setting 'local.lr'"),
        ("[strategy]\nname = 3", "Setting 'strategy.name'"),
        ("[strategy]\nname = 'FedAdam'\netta = 1", "Did you mean 'eta'"),
        ("[strategy.deeper]\nx = 1", "Setting 'strategy.deeper"),
    ],
)
def test_a_configuration_that_is_none_is_a_sentence(text: str | None, words: str) -> None:
    if text is not None:
        Path("run.toml").write_text(text)
    refuse(2, words, "run.toml")


def test_a_folder_is_no_configuration() -> None:
    Path("run.toml").mkdir()
    refuse(2, "run.toml cannot be read", "run.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "local.lr"], "Expected TABLE.KEY=VALUE"),
        (["--epsilon", "0"], "choose one above 0"),
        (["--set", "privacy.epsilon=0"], "choose one above 0"),
        (["--set", "=3"], "Expected TABLE.KEY=VALUE"),
        (["--set", "locl.lr=0.1"], "Did you mean 'local'"),
        (["--set", "local.lrr=0.1"], "Did you mean 'lr'"),
        (["--set", "local=3"], "Setting 'local'"),
        (["--set", "privacy=3"], "Setting 'privacy'"),
        (["--set", "rounds.deep=3"], "Setting 'rounds'"),
        (["--set", "local.lr=fast"], "Setting 'local.lr'"),
        (["--set", "local.lr=-1"], "Setting 'local.lr'"),
        (["--set", "local.optimizer=lbfgs"], "'sgd' or 'adamw'"),
        (["--set", "local.optimizer=adamw", "--set", "local.momentum=0.9"], "momentum belongs to optimizer 'sgd'"),
        (["--rounds", "-1"], "Setting 'rounds'"),
        (["--holdout", "1"], "Setting 'holdout'"),
        (["--holdout", "-0.1"], "Setting 'holdout'"),
        (["--holdout", "nan"], "Setting 'holdout'"),
        (["--sites", "0"], "Setting 'simulation.sites'"),
        (["--sites", "-3"], "Setting 'simulation.sites'"),
        (["--sites", "2000"], "2000 sites cannot share 1797 rows"),
        (["--seed", "-1"], "Setting 'seed'"),
        (["--classes", "cat"], "two classes or more"),
        (["--classes", "cat,dog"], "of class '0', which this run does not know. Its classes are: cat, dog"),
        (["--classes", "cat,dog", "--classes-from", "digits"], "not both"),
        (["--classes-from", "nothing"], "no data source 'nothing'"),
        (["--backbone", "glyphnet"], "source:name"),
        (["--backbone", "bundled:"], "source:name"),
        (["--backbone", "bundled:glyfnet"], "Did you mean 'glyphnet'"),
        (["--backbone", "torchvison:resnet18"], "Did you mean 'torchvision'"),
        (["--backbone", "torchvision:resnet19"], "Did you mean 'resnet1"),
        (["--layer", "third"], "only the layer 'penultimate'"),
        (["--weights", "nowhere.pt"], "no weights file 'nowhere.pt'"),
        (["--weights", "."], "no weights file '.'"),
        (["--head", "linaer"], "Did you mean 'linear'"),
        (["--head", "mlp"], "hidden units"),
        (["--head", "mlp:0"], "hidden units"),
        (["--head", "linear:3"], "no argument"),
        (["--init", "zero"], "cannot start from 'zero'"),
        (["--head", "cosine", "--init", "zeros"], "cannot start from 'zeros'"),
        (["--set", "strategy.name=FedAvgg"], "Did you mean 'FedAvg"),
        (["--set", "strategy.name=QFedAvg"], "needs the parameter 'client_learning_rate'"),
        (["--set", "strategy.fraction_train=all"], "needs float as fraction_train"),
        (["--partition", "dirichlett:1"], "Did you mean 'dirichlet'"),
        (["--partition", "dirichlet:-1"], "positive number"),
        (["--partition", "shards:0"], "classes per site"),
        (["--partition", "iid:3"], "takes no argument"),
        (["--partition", "folder"], "'digits' names none. Expected folder:PATH"),
        (["--data", "digit"], "Did you mean 'digits'"),
        (["--data", "digits:8"], "takes no argument"),
        (["--data", "folder:"], "Expected a path"),
        (["--data", "folder:nowhere"], "no folder nowhere"),
        (["--data", "folder:file"], "file is not a folder"),
        (["--data", "folder:empty"], "empty is empty; expected"),
        (["--data", "folder:alone"], "two classes or more"),
        (["--data", "python:nowhere:f"], "cannot be imported"),
        (["--data", "python:json:nothing"], "no function 'nothing'"),
        (["--data", "python:json"], "Expected python:MODULE:FUNCTION"),
        (["--test-data", "folder:alone"], "of class 'ant'"),
        (["--test-data", "folder:empty"], "empty is empty; expected"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--out", "full"], "full exists and is not an empty folder"),
        (["--out", "file"], "file exists and is not an empty folder"),
        (["--out", "file/below"], "file/below cannot be written"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(arguments: list[str], words: str) -> None:
    Path("file").write_text("")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/other").write_text("")
    save_images(Path("alone"), classes=("ant",))
    refuse(2, words, *arguments)
    assert [path.name for path in Path("full").iterdir()] == ["other"]


@pytest.mark.parametrize("arguments", [["--rounds", "many"], ["--speed", "9"], ["a.toml", "b.toml"], ["--set"]])
def test_flags_that_do_not_exist_or_fit_are_usage_errors(arguments: list[str]) -> None:
    result = fedhead_command("simulate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_of_another_architecture_name_their_keys() -> None:
    save_file({"encoder.weight": torch.zeros(2), "stage1.0.bias": torch.zeros(3)}, "other.safetensors")
    refuse(2, "unknown: encoder.weight", "--weights", "other.safetensors")
    refuse(2, "stage1.0.bias is [3], not [32]", "--weights", "other.safetensors")
    Path("notes.pt").write_text("my weights")
    refuse(2, "notes.pt are neither safetensors nor a plain state dict", "--weights", "notes.pt")


def test_a_users_function_that_fails_is_a_sentence() -> None:
    Path("mydata.py").write_text("def nothing(): return None\ndef fails(): raise KeyError('column')\n")
    refuse(2, "returned NoneType", "--data", "python:mydata:nothing")
    result = fedhead_command("simulate", "--data", "python:mydata:fails")
    assert result.exit_code in (1, 2)
    assert "column" in stderr_of(result)
    assert "Traceback" not in result.stderr


def test_data_without_one_readable_image_is_a_failure() -> None:
    for name in ("ant", "bee"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "1.png").write_bytes(b"no image")
    refuse(2, "None of the rows", "--data", "folder:data", "--sites", "1")


def test_a_cache_that_cannot_be_written_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("FEDHEAD_HOME", str(Path("file").resolve()))
    refuse(2, "cannot be written")


def test_error_for_full_disk(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(own_folder / "home"))
    usage = shutil.disk_usage(own_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse(1, "Free some space")


def raising(error: BaseException) -> Any:
    def simulate(*args: Any, **options: Any) -> None:
        raise error

    return simulate


def test_a_failure_nobody_thought_of_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedhead.simulations, "simulate", raising(RuntimeError("boom\nand a long story")))
    result = fedhead_command("simulate")
    assert result.exit_code == 1
    assert "An unexpected RuntimeError: boom." in stderr_of(result)
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    debugged = fedhead_command("simulate", "--debug")
    assert isinstance(debugged.exception, RuntimeError)


def test_debug_shows_where_a_mistake_was_found() -> None:
    result = fedhead_command("simulate", "--rounds", "-1", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "Setting 'rounds'" in result.stderr


def test_ctrl_c_is_told_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedhead.simulations, "simulate", raising(KeyboardInterrupt()))
    result = fedhead_command("simulate")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert result.stdout == ""


# The real thing, in a process of its own.

COMMAND = Path(sys.executable).with_name("fedhead")


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMMAND), *arguments], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(not COMMAND.exists(), reason="the package is not installed")
def test_the_command_prints_one_json_object_and_nothing_else() -> None:
    ended = run_command("simulate", "--rounds", "1", "--sites", "3", "--json")
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    assert json.loads(ended.stdout)["accuracy"] > 0.8


@pytest.mark.skipif(not COMMAND.exists(), reason="the package is not installed")
def test_the_command_tells_mistakes_by_its_exit_status() -> None:
    ended = run_command("simulate", "--rounds", "-1", "--json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("Error: Setting 'rounds'")
    assert len(ended.stderr.splitlines()) == 1


SLOW_DATA = """
import time
from pathlib import Path
import numpy as np
from PIL import Image
from fedhead.data import Samples

def load():
    images = np.random.default_rng(0).integers(0, 256, (1300, 8, 8), dtype=np.uint8)

    def read(row):
        if row == 1200 and not Path("go").exists():
            Path("reached").touch()
            time.sleep(100)
        return Image.fromarray(images[row])

    return Samples("python:slow:load", ("a", "b"), np.arange(1300) % 2, read, str, "slow data")
"""


def interrupted(reached: Callable[[], bool], *arguments: str) -> tuple[int, str, str]:
    """Start the command, press Ctrl-C once it has `reached` a point, and return how it ended."""
    process = subprocess.Popen(
        [str(COMMAND), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    stop = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND.exists(), reason="the package is not installed")
def test_ctrl_c_during_extraction_leaves_no_run_folder_and_loses_no_features() -> None:
    Path("slow.py").write_text(SLOW_DATA)
    flags = ["simulate", "--data", "python:slow:load", "--sites", "2", "--rounds", "1", "--json"]
    status, stdout, stderr = interrupted(Path("reached").exists, *flags)
    assert (status, stdout) == (130, "")
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert not run_folders()
    Path("go").touch()
    ended = run_command(*flags)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["rows_extracted"] == 1300 - 1024


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND.exists(), reason="the package is not installed")
def test_ctrl_c_during_the_rounds_keeps_what_is_there() -> None:
    flags = ["simulate", "--rounds", "100000", "--sites", "3", "--init", "zeros", "--out", "mine", "--json"]
    metrics = Path("mine/metrics.jsonl")
    status, stdout, stderr = interrupted(lambda: metrics.exists() and metrics.stat().st_size > 0, *flags)
    assert (status, stdout) == (130, "")
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert not Path("mine/result.json").exists()
    assert [json.loads(line)["number"] for line in metrics.read_text().splitlines()]
    RunConfig.from_toml(Path("mine/run.toml"))


def test_a_study_prints_means_and_keeps_what_did_not_fail(own_folder: Path) -> None:
    arguments = ["simulate", "--seeds", "2", "--rounds", "1", "--backbone", "bundled:glyphnet", "--no-diagnose"]
    table = fedhead_command(*arguments, "--sweep", "partition=iid,shards:2", "--csv", "study.csv")
    assert table.exit_code == 0, table.output
    assert "shards:2" in table.stdout
    assert "±" in table.stdout
    assert len((own_folder / "study.csv").read_text().splitlines()) == 5
    failing = fedhead_command(*arguments, "--sweep", "sites=3,5000", "--json")
    assert failing.exit_code == 1
    printed = json.loads(failing.stdout)
    assert [bool(one["error"]) for one in printed["runs"]] == [False, False, True, True]
    assert "2 of 4 runs failed" in stderr_of(failing)
