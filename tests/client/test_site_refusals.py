"""What sites and coordinators refuse, by their commands: who can act reads why, and the exit status tells."""

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fedhead.backbones import load_backbone
from fedhead.client.release.ledger import read_ledger
from fedhead.protocol.messages import PROTOCOL
from fedhead.server.provision import add_sites, provision, revoke

pytestmark = pytest.mark.slow

COMMAND = "from fedhead.cli import main; main()"
PATIENCE = 120.0
CLASSES = ",".join(map(str, range(10)))

ENCODER = """
import torch
from torch import nn
from fedhead.backbones import ImagePreprocessing


def encoder():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.{}()), ImagePreprocessing.imagenet(16)
"""


class Command:
    """A `fedhead` command in a folder of its own, as on a machine of its own.

    Args:
        folder: its working folder; features are kept there too.
        arguments: of the command.
        before: Python to run first, for a site that is not what it should be.
        terminal: whether a person sits at it.
    """

    def __init__(self, folder: Path, *arguments: str, before: str = "", terminal: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        self.person, standard_input = pty.openpty() if terminal else (-1, subprocess.DEVNULL)
        output = standard_input if terminal else self.log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\n{COMMAND}", *arguments],
            stdin=standard_input,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, "FEDHEAD_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        )
        if terminal:
            os.close(standard_input)
        self._shown = ""

    def said(self) -> str:
        if self.person < 0:
            return self.log.read_text()
        while select.select([self.person], [], [], 0)[0]:
            try:
                self._shown += os.read(self.person, 65536).decode(errors="replace")
            except OSError:  # so Linux tells that the other side has gone
                break
        return re.sub(r"\x1b\[[0-9;]*m", "", self._shown).replace("\r\n", "\n")

    def until(self, words: str) -> None:
        stop = time.monotonic() + PATIENCE
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < stop, self.said()
            time.sleep(0.02)

    def type(self, line: str) -> None:
        self._shown = ""
        os.write(self.person, line.encode())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None


class Machines:
    """Starts commands, each on a machine of its own, and ends them with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Command] = []
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listening.getsockname()[1]}"

    def start(self, name: str, *arguments: str, before: str = "", terminal: bool = False) -> Command:
        self.started.append(Command(self.folder / name, *arguments, before=before, terminal=terminal))
        return self.started[-1]

    def server(self, name: str, *arguments: str) -> Command:
        port = self.address.rpartition(":")[2]
        return self.start(name, "server", "--port", port, "--classes", CLASSES, "--out", "run", *arguments)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    for command in made.started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def test_who_may_not_connect_is_told_on_both_sides(machines: Machines) -> None:
    kits = machines.folder / "kits"
    provision(kits, machines.address, ["right", "gone", "impostor"])
    provision(machines.folder / "others", machines.address, ["right"])
    shutil.copytree(kits, machines.folder / "later")
    add_sites(machines.folder / "later", ["stranger"])
    revoke(kits, ["gone"])
    settings = kits / "impostor" / "site.toml"
    settings.write_text(settings.read_text().replace('"impostor"', '"right"'))
    server = machines.server("server", "--kit", str(kits / "coordinator"), "--min-sites", "9")
    server.until("No site is connected")

    def client(name: str, *arguments: str) -> Command:
        return machines.start(name, "client", "--data", "digits", *arguments)

    refused = {
        client("stranger", "--kit", str(machines.folder / "later" / "stranger")): (
            r"its key \([0-9a-f]{16}\) is not registered\. Ask the coordinator's operator for a new kit",
            r"Refused: a site from 127.0.0.1, since its key \([0-9a-f]{16}\) is not registered",
        ),
        client("gone", "--kit", str(kits / "gone")): (
            r"its key is revoked\. Ask the coordinator's operator",
            r"Refused: gone \(127.0.0.1\), since its key is revoked",
        ),
        client("impostor", "--kit", str(kits / "impostor")): (
            r"its key is registered as 'impostor', and its site.toml calls it 'right'",
            r"Refused: a site from 127.0.0.1, since its key is registered as 'impostor'",
        ),
        client("other", "--kit", str(machines.folder / "others" / "right")): (
            r"is not the coordinator that made this kit.*Use the kit of this coordinator",
            r"Refused: a connection, since it does not trust this coordinator's certificate",
        ),
    }
    for command, (at_the_site, at_the_coordinator) in refused.items():
        assert command.ended() == 1, command.said()
        assert re.search(at_the_site, command.said()), command.said()
        assert re.search(at_the_coordinator, server.said()), server.said()
        assert "Traceback" not in command.said()
    assert server.stop() == 143
    assert "Traceback" not in server.said()


def test_who_may_not_take_part_is_told_on_both_sides(machines: Machines) -> None:
    kits = machines.folder / "kits"
    sites = ("older", "animals", "otherwise", "tampered", "careful", "right")
    provision(kits, machines.address, sites, backbones={"python:encoder:encoder": "the test's own"})
    for name in ("server", *sites):
        (machines.folder / name).mkdir()
        encoder = ENCODER.format("Tanh" if name == "otherwise" else "ReLU")
        (machines.folder / name / "encoder.py").write_text(encoder)
    for animal in ("cat", "dog"):
        (machines.folder / "animals" / "data" / animal).mkdir(parents=True)
        for shade in range(20):
            Image.new("L", (16, 16), shade).save(machines.folder / "animals" / "data" / animal / f"{shade}.png")
    settings = kits / "careful" / "site.toml"
    settings.write_text(settings.read_text().replace('"query.describe",', '# "query.describe",'))
    before = {
        "older": "import fedhead.protocol.messages; fedhead.protocol.messages.PROTOCOL = 0",
        "tampered": """
from fedhead.protocol.messages import WeightsChunk
right = WeightsChunk.from_payload
def changed(payload):
    chunk = right(payload)
    data = chunk.data.copy()
    data[-1:] ^= 1
    return WeightsChunk(chunk.file, chunk.size, chunk.offset, data)
WeightsChunk.from_payload = changed
""",
    }
    reasons = {
        "older": (f"speaks protocol 0 and the coordinator {PROTOCOL}; install the coordinator's version", ""),
        "animals": ("does not know", "0.png is of class 'cat', which this run does not know"),
        "otherwise": ("gives other features here than at the coordinator", ""),
        "tampered": ("changed in transit", ""),
        "careful": ("careful does not permit query.describe", "refused, because site.toml does not permit it"),
    }
    server = machines.server(
        *("server", "--kit", str(kits / "coordinator"), "--backbone", "python:encoder:encoder"),
        *("--min-sites", "1", "--rounds", "0", "--round-deadline", str(PATIENCE)),
    )
    server.until("No site is connected")

    def client(name: str) -> Command:
        data = "folder:data" if name == "animals" else "digits"
        arguments = ("client", "--kit", str(kits / name), "--data", data)
        return machines.start(name, *arguments, before=before.get(name, ""))

    clients = {name: client(name) for name in reasons}
    for name in reasons:
        server.until(f"{name} takes no part: ")
    clients["right"] = client("right")
    assert server.ended() == 0, server.said()
    for name, (at_the_coordinator, at_the_site) in reasons.items():
        said = clients[name].said()
        assert re.search(rf"{name} takes no part: [^\n]*{at_the_coordinator}", server.said()), server.said()
        assert (at_the_site or at_the_coordinator) in said, said
        assert "Traceback" not in said
    assert not list((machines.folder / "tampered" / "home" / "weights").glob("*.safetensors"))
    report = json.loads((machines.folder / "server" / "run" / "result.json").read_text())
    assert (report["sites"], set(report["sites_refused"])) == (1, set(reasons))
    assert clients["older"].stop(signal.SIGINT) == 0
    assert clients["older"].said().endswith("Stopping.\n")


def test_a_person_agrees_or_not_at_a_terminal(machines: Machines) -> None:
    run = ("--insecure", "--min-sites", "1", "--rounds", "1", "--round-deadline", "60")
    site = machines.start(
        *("ward", "client", "--insecure", "--site", "ward", "--data", "digits", "--approve"),
        *("--coordinator", machines.address),
        terminal=True,
    )
    question = "Agree, for this run and backbone? [y/N]: "
    ledger = machines.folder / "ward" / "home" / "ledger" / "ward.jsonl"
    server = machines.server("declined", *run)
    site.until(question)
    assert re.search(r"run +[0-9a-f]+\n.*\(query.statistics\)\n", site.said())
    assert re.search(r"part of fedhead\n[^?]*rows +[0-9]+ of digits\nclasses +0 [0-9]+, 1 ", site.said())
    shown = re.search(r"look at +(\S+)\.json", site.said())
    assert shown is not None
    assert Path(f"{shown[1]}.safetensors").is_file()
    site.type("n\n")
    assert server.ended() == 1, server.said()
    assert "The operator of ward did not approve query.statistics" in server.said()
    site.until("refused. The operator of ward did not approve")
    assert all((entry.rows, entry.classes) == (0, {}) for entry in read_ledger(ledger))
    server = machines.server("approved", *run)
    asked = []
    while server.process.poll() is None:
        if question in site.said():
            asked += re.findall(r"asks to .*\((\S+)\)\n", site.said())
            site.type("y\n")
        time.sleep(0.02)
    assert server.ended() == 0, server.said()
    assert len(asked) == len(set(asked)) > 4
    assert {"query.statistics", "train", "evaluate"} <= set(asked)
    assert site.stop() == 0


def test_unknown_weights_are_refused_and_taken_once_allowed(machines: Machines) -> None:
    backbone = load_backbone("bundled:glyphnet", weights="random", seed=5)
    weights = machines.folder / "chosen.safetensors"
    backbone.save(weights)
    run = ("--insecure", "--weights", str(weights), "--min-sites", "1", "--rounds", "0", "--round-deadline", "300")
    ward = ("client", "--insecure", "--data", "digits", "--coordinator", machines.address, "--site")
    server = machines.server("server", *run)
    careful = machines.start("careful", *ward, "careful")
    server.until("careful takes no part: ")
    entry = f"sha256:{backbone.weights_digest}"
    for said in (server.said(), careful.said()):
        assert f'add to [backbones] allow in its site.toml: "{entry}"' in said
    assert not list((machines.folder / "careful" / "home").glob("weights/*"))
    approving = machines.start("approving", *ward, "approving", "--approve", terminal=True)
    approving.until("Agree, for this run and backbone? [y/N]: ")
    assert re.search(r"asks to .*\(query.install\)\n", approving.said())
    assert re.search(rf"weights +{entry}\n +unknown to this site\n", approving.said())
    assert not list((machines.folder / "approving" / "home").glob("weights/*"))
    approving.stop()
    machines.start("allowing", *ward, "allowing", "--allow-backbone", entry)
    assert server.ended() == 0, server.said()
    report = json.loads((machines.folder / "server" / "run" / "result.json").read_text())
    assert report["sites"] == 1
    assert "careful" in report["sites_refused"]
