"""Real processes over loopback that find objects in images, in one exchange and in rounds."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.model import TransferModel
from fedhead.prediction import evaluate_model
from fedhead.server.provision import provision

from ..simulations.test_detection import draw
from .test_site_process import PATIENCE, Process

pytestmark = pytest.mark.slow

SITES = ("orchard-a", "orchard-b")


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.running.poll() is None:
            process.kill()


def test_real_sites_make_a_detector_in_one_exchange_and_a_round(tmp_path: Path, started: list[Process]) -> None:
    specs = {
        site: draw(tmp_path / site, 24, seed=number).removesuffix("&site=lab") for number, site in enumerate(SITES)
    }
    settings = {
        "task": "detection",
        "backbone": "torchvision:mobilenet_v2",
        "weights": "random",
        "layer": "features.2+features.3+features.4:map@96",
        "classes": ("square", "disc"),
        "rounds": 1,
        "with_backbone": True,
        "local": {"lr": 0.001, "batch_size": 32},
    }
    config = RunConfig(**settings)
    (tmp_path / "run.toml").write_text(config.to_toml())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
    allowed = {"torchvision:mobilenet_v2": "the test's"}
    provision(tmp_path / "kit", f"127.0.0.1:{port}", SITES, backbones=allowed)
    deadline = ("--round-deadline", str(PATIENCE), "--min-sites", "2")
    server = Process(tmp_path, "server", "server", "run.toml", "--kit", "kit/coordinator", "--out", "run", *deadline)
    started.append(server)
    for site, spec in specs.items():
        started.append(Process(tmp_path, site, "client", "--kit", f"kit/{site}", "--data", spec))
    assert server.ended() == 0, server.said()
    model = TransferModel.load(tmp_path / "run")
    fresh = load_samples(draw(tmp_path / "fresh", 8, seed=5))
    assert evaluate_model(model, fresh).report.ap50.value > 0.4
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["sites"], result["rounds"]) == (2, 1)
    assert not (tmp_path / "run" / "examples.json").exists()
