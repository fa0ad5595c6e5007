"""Messages that end the site's process: each is tried twice, and then refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedhead.backbones.weights import weights_path
from fedhead.client.connection import Connection
from fedhead.client.local_site import LocalSite
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess, StopSite
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.flower import in_process_identity
from fedhead.flower.messages import Delivery, PackedContent, packing
from fedhead.protocol.actions import DESCRIBE
from fedhead.protocol.messages import Manifest, Payload
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import provision

PATIENCE = 120.0
ENDED_TWICE = "process ended twice while it answered"


def question(backbone: str = "bundled:glyphnet", run: str = "run") -> Payload:
    manifest = Manifest(
        run=run,
        backbone=backbone,
        layer="penultimate",
        backbone_digest="0" * 64,
        weights_digest="0" * 64,
        num_features=192,
        classes=load_samples("digits").classes,
        head="linear",
        holdout=0.2,
        seed=0,
        local=RunConfig().local,
    )
    return Payload(manifest.model_dump(), {"probe": np.zeros((1, 192), np.float32)})


class Dies(Exception):  # noqa: N818
    """Stands for the end of the process: nothing that follows it in the process happens."""


class Delivers(Connection):
    """A coordinator that delivers one message again and again, as long as it is not answered."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.sent: list[Message] = []

    def open(self) -> None: ...

    def close(self, last: Message | None = None) -> None:
        self.last = last

    def receive(self, begin: Any = lambda delivery: None) -> Message:
        if self.sent:
            raise StopSite
        with packing():
            message = Message(self.payload.to_content(), 5, DESCRIBE)
            message.metadata.__dict__["_message_id"] = os.urandom(32).hex()
            objects = PackedContent.of(message.content).objects
        begin(Delivery(message, (message.metadata.message_id, *objects)))
        return message

    def send(self, reply: Message, seconds: float) -> None:
        self.sent.append(reply)


def process(folder: Path, payload: Payload) -> tuple[SiteProcess, Delivers]:
    settings = SiteSettings(name="here", coordinator="127.0.0.1:9092", data="digits")
    connection = Delivers(payload)
    return SiteProcess(settings, LocalSite("here", "digits", "cpu"), connection, folder), connection


@pytest.fixture
def identity() -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


@pytest.mark.usefixtures("identity")
def test_a_message_is_refused_after_two_deaths_and_others_are_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        dying, _ = process(tmp_path, question())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Dies):
            # Neither the message's end nor the process's is noted, as where it is killed.
            patch.setattr(dying, "_reply", lambda message: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr(dying._attempts, "end", lambda **options: (_ for _ in ()).throw(Dies))
            dying.run()
    for _ in range(2):
        third, connection = process(tmp_path, question())
        with pytest.raises(StopSite):
            third.run()
        (reply,) = connection.sent
        assert ENDED_TWICE in str(reply.error.reason)
        assert "attempts.json" in caplog.text
    other, connection = process(tmp_path, question(run="other"))
    with pytest.raises(StopSite):
        other.run()
    (reply,) = connection.sent
    assert not reply.has_error()


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, RecursionError, MemoryError, GeneratorExit])
def test_nothing_that_a_handler_raises_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    answering, connection = process(tmp_path, question())
    monkeypatch.setattr(LocalSite, "check_data", fail)
    with pytest.raises(StopSite):
        answering.run()
    (reply,) = connection.sent
    assert raised.__name__ in str(reply.error.reason)


@contextmanager
def client(folder: Path, kit: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real `fedhead client`, which calls `harmful:encoder` when a run asks for it."""
    with (folder / "client.log").open("a") as log:
        running = subprocess.Popen(
            [
                *(sys.executable, "-c", "from fedhead.cli import main; main()", "client", "--kit", str(kit)),
                *("--data", "digits", "--device", "cpu", "--allow-backbone", "python:harmful:encoder"),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "PYTHONPATH": str(folder),
                "FEDHEAD_HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
            },
        )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()


@contextmanager
def coordinator(folder: Path, code: str) -> Iterator[tuple[NetworkGrid, Path]]:
    """A coordinator, and the kit of a site whose allowed function notes that it is called, and then runs `code`."""
    lines = ("import os, time", "def encoder():", "    open('called', 'a').write('x')", f"    {code}")
    (folder / "harmful.py").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        # Weights that were sent before: the function is called to be filled with them.
        patch.setenv("FEDHEAD_HOME", str(folder / "home"))
        sent = weights_path("0" * 64)
    sent.parent.mkdir(parents=True)
    sent.write_bytes(b"")
    kits = folder / "kit"
    with SuperLink("127.0.0.1", 0, provision(kits, "127.0.0.1:9092", ["here"])) as link:
        settings = kits / "here" / "site.toml"
        settings.write_text(settings.read_text().replace(":9092", f":{link.port}"))
        yield NetworkGrid(link), kits / "here"


@pytest.mark.slow
def test_a_real_process_that_a_message_kills_twice_refuses_it(tmp_path: Path) -> None:
    called = tmp_path / "called"
    with coordinator(tmp_path, "os.abort()") as (grid, kit):
        with client(tmp_path, kit) as running:
            asked = ask(grid, question("python:harmful:encoder"))
            assert running.wait(PATIENCE) < 0
        with client(tmp_path, kit) as running:
            assert running.wait(PATIENCE) < 0
        with client(tmp_path, kit):
            assert ENDED_TWICE in str(answer(grid, asked).error.reason)
            # A coordinator that asks the same anew is refused as well, and one that asks another thing is not.
            asked = ask(grid, question("python:harmful:encoder"))
            assert ENDED_TWICE in str(answer(grid, asked).error.reason)
            assert not answer(grid, ask(grid, question())).has_error()
    assert called.read_text() == "xx"
    assert "Remove " in (tmp_path / "client.log").read_text()


@pytest.mark.slow
def test_stops_by_the_operator_are_no_deaths(tmp_path: Path) -> None:
    called = tmp_path / "called"
    with coordinator(tmp_path, "time.sleep(1000)") as (grid, kit):
        for times in range(1, 4):
            with client(tmp_path, kit) as running:
                ask(grid, question("python:harmful:encoder"))
                stop = time.monotonic() + PATIENCE
                while not called.exists() or len(called.read_text()) < times:
                    assert time.monotonic() < stop, (tmp_path / "client.log").read_text()
                    time.sleep(0.02)
                running.send_signal(signal.SIGTERM)
                assert running.wait(PATIENCE) == 0


def ask(grid: NetworkGrid, payload: Payload) -> str:
    """Ask the site once it is there."""
    stop = time.monotonic() + PATIENCE
    while not grid.link.online():
        assert time.monotonic() < stop
        time.sleep(0.02)
    (message_id,) = grid.push_messages([Message(payload.to_content(), grid.link.online()["here"], DESCRIBE)])
    return message_id


def answer(grid: NetworkGrid, message_id: str) -> Message:
    stop = time.monotonic() + PATIENCE
    while time.monotonic() < stop:
        grid.wait(0.5)
        for reply in grid.pull_messages([message_id]):
            return reply
    raise AssertionError("no answer")
