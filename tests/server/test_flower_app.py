import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict, validate_config

from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.server.flower_app import from_run_config, write_flower_app
from fedhead.simulations.partition import divide

CONFIG = RunConfig(
    backbone="bundled:pixels",
    classes=["ill", 'so-called "well"', "über, all", "1"],
    rounds=3,
    strategy={"name": "FedAdam", "eta": 0.01},
    local={"lr": 0.05},
)


@pytest.mark.parametrize("changes", [{"subgroups": ["f", "m"]}, {"tune": {"schedule": {1: "head", 3: "last:1"}}}])
def test_lists_and_schedules_come_back_from_an_app(changes: dict[str, object], tmp_path: Path) -> None:
    config = RunConfig(classes=["ill", "well"], rounds=3, **changes)
    app = tomllib.loads(write_flower_app(tmp_path / "app", config).read_text())
    flat = flatten_dict(app["tool"]["flwr"]["app"]["config"])
    assert from_run_config(flat) == config


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


@pytest.mark.parametrize(
    ("run", "rounds"),
    [
        ({"task": "clusters", "rounds": 0}, 0),
        ({"task": "generation", "backbone": "hf:x/y"}, 5),
        ({"task": "segmentation", "backbone": "torchvision:mobilenet_v2", "classes": ("a", "b")}, 0),
        ({"classes": ("a", "b"), "tune": {"layers": "last:1"}}, 10),
        ({"classes": ("a", "b"), "privacy": {"epsilon": 1.0}}, 20),
        ({"classes": ("a", "b"), "privacy": {"epsilon": 1.0}, "rounds": 0}, 0),
    ],
    ids=str,
)
def test_an_app_has_the_settings_that_its_task_decides(run: dict[str, Any], rounds: int, tmp_path: Path) -> None:
    app = tomllib.loads(write_flower_app(tmp_path / "app", RunConfig(**run)).read_text())
    read = from_run_config(flatten_dict(app["tool"]["flwr"]["app"]["config"])).settled()
    assert read.rounds == rounds
    assert read == RunConfig(**run).settled()


def test_a_setting_that_flwr_run_misspells_is_told() -> None:
    with pytest.raises(UserError, match=r"no setting 'local.rl'"):
        from_run_config({"classes": '["a", "b"]', "local.rl": 0.1})


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start Flower's own commands and fedhead's, in an environment of their own; all are ended in the end."""
    started: list[subprocess.Popen[bytes]] = []
    commands = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FEDHEAD_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }

    def start(log: str, *command: str) -> subprocess.Popen[bytes]:
        with (tmp_path / log).open("ab") as file:
            # Of its own session, since SuperLink and SuperNode start processes of theirs.
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.slow
def test_flwr_run_with_stock_supernodes_and_a_client_of_ours(
    tmp_path: Path, flower: Callable[..., subprocess.Popen[bytes]]
) -> None:
    digits = load_samples("digits")
    for site, rows in divide("iid", digits.labels[:450], 3, 0).items():
        for row in rows:
            path = tmp_path / site / f"digit-{digits.labels[row]}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits.read(int(row)).save(path)
    port = free_port()
    (tmp_path / "flwr").mkdir()
    connection = f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (tmp_path / "flwr" / "config.toml").write_text(connection)
    classes = [f"digit-{label}" for label in range(10)]
    write_flower_app(tmp_path / "app", RunConfig(classes=classes, rounds=1, diagnose=False), str(tmp_path / "run"))
    address = ("--host", "127.0.0.1", "--port")
    flower(
        "superlink.log",
        "flower-superlink",
        "--insecure",
        *address,
        str(port),
        "--disable-runtime-dependency-installation",
    )
    wait_until(lambda: is_listening(port), tmp_path)
    for site in ("site-0", "site-1"):
        config = f'site="{site}" data="folder:{tmp_path / site}" device="cpu"'
        superlink = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--node-config", config)
        flower("supernode.log", "flower-supernode", *superlink, *address, str(free_port()))
    ours = ("client", "--insecure", "--site", "site-2", "--data", f"folder:{tmp_path / 'site-2'}")
    flower("client.log", sys.executable, "-c", MAIN, *ours, "--coordinator", f"127.0.0.1:{port}")
    log = tmp_path / "superlink.log"
    wait_until(lambda: log.read_text().count("Activated node_id") == 3, tmp_path)
    ran = flower("run.log", "flwr", "run", "app", "here", "--stream")
    wait_until(lambda: (tmp_path / "run" / "result.json").exists() or ran.poll() is not None, tmp_path)
    wait_until((tmp_path / "run" / "result.json").exists, tmp_path, seconds=5)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["sites"], result["sites_refused"]) == (3, {})
    assert result["accuracy"] > 0.9
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "train of round 1: done" in (tmp_path / "client.log").read_text()


MAIN = "from fedhead.cli import main; main()"


def is_listening(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], logs: Path, seconds: float = 420.0) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "\n".join(path.read_text()[-3000:] for path in sorted(logs.glob("*.log")))
        time.sleep(0.1)
