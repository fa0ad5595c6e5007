"""A stranger's idle connections: sites connect and work, and the coordinator says how it is, all the while."""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from fedhead.flower.fleet_client import FleetClient
from fedhead.flower.messages import assemble, disassemble
from fedhead.protocol.messages import Payload
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.limits import ConnectionLimits
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import provision

COMMAND = [sys.executable, "-c", "from fedhead.cli import main; main()"]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kits") / "kit"
    provision(out, "127.0.0.1:9092", ["a"])
    return out


class Stranger:
    """Opens connections and says nothing on them.

    Args:
        port: of the coordinator.
        handshake: whether it completes TLS handshakes.
    """

    def __init__(self, port: int, *, handshake: bool) -> None:
        self._port = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if handshake else None
        if self._context is not None:
            self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self.connections: list[socket.socket] = []

    def connect(self, number: int) -> None:
        for _ in range(number):
            with suppress(OSError):
                plain = socket.create_connection(("127.0.0.1", self._port), timeout=30)
                self.connections.append(plain if self._context is None else self._context.wrap_socket(plain))

    def open(self) -> int:
        """Return how many connections the coordinator has not closed."""
        return sum(self._is_open(connection) for connection in self.connections)

    def _is_open(self, connection: socket.socket) -> bool:
        connection.setblocking(False)
        try:
            return bool(connection.recv(1))
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


@contextmanager
def stranger(port: int, number: int, *, handshake: bool) -> Iterator[Stranger]:
    made = Stranger(port, handshake=handshake)
    try:
        made.connect(number)
        yield made
    finally:
        made.close()


def site(port: int, kits: Path) -> FleetClient:
    key = serialization.load_pem_private_key((kits / "a" / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return FleetClient(f"127.0.0.1:{port}", key, (kits / "a" / "ca.pem").read_bytes(), 0, "a")


def until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < stop, "it never came about"
        time.sleep(0.05)


@contextmanager
def link_with(kits: Path, limits: ConnectionLimits) -> Iterator[SuperLink]:
    kit = replace(CoordinatorKit.read(kits / "coordinator"), connections=limits)
    with SuperLink("127.0.0.1", 0, kit) as link:
        yield link


@pytest.mark.parametrize("handshake", [False, True])
def test_a_site_works_among_idle_connections(kits: Path, handshake: bool) -> None:
    limits = ConnectionLimits(handshake_seconds=3600, first_request_seconds=3600, unproven=30, unproven_per_address=20)
    with link_with(kits, limits) as link, stranger(link.port, 150, handshake=handshake) as idle:
        client, grid = site(link.port, kits), NetworkGrid(link)
        node = client.activate(20.0)
        idle.connect(100)
        (message_id,) = grid.push_messages([Message(Payload({"number": 3}, {}).to_content(), node, "train")])
        delivery = client.pull(node)
        assert delivery is not None
        parts = {each: client.pull_object(delivery.message, each) or b"" for each in delivery.objects}
        reply = Message(Payload({"done": True}, {}).to_content(), reply_to=assemble(delivery, parts))
        tree, objects = disassemble(reply)
        session, wanted = client.push(reply, tree, 0.1)
        for object_id in wanted:
            client.push_object(reply, session, object_id, objects[object_id])
        (answer,) = grid.pull_messages([message_id])
        assert Payload.from_content(answer.content).values == {"done": True}
        until(lambda: idle.open() <= 20)


@pytest.mark.parametrize(
    ("handshake", "limits"),
    [
        (False, ConnectionLimits(handshake_seconds=0.2, first_request_seconds=3600)),
        (False, ConnectionLimits(handshake_seconds=3600, first_request_seconds=0.2)),
        (True, ConnectionLimits(handshake_seconds=3600, first_request_seconds=0.2)),
    ],
)
def test_connections_without_a_request_end(kits: Path, handshake: bool, limits: ConnectionLimits) -> None:
    with link_with(kits, limits) as link, stranger(link.port, 10, handshake=handshake) as idle:
        client = site(link.port, kits)
        node = client.activate(20.0)
        until(lambda: idle.open() == 0)
        before = client._client._client._transport._pool.connections
        time.sleep(2 * limits.first_request_seconds if limits.first_request_seconds < 1 else 0)
        assert client.heartbeat(node, 20.0)
        assert client._client._client._transport._pool.connections == before


SERVE = """
import resource, sys
from pathlib import Path
from fedhead.server.provision import CoordinatorKit
from fedhead.server.network.superlink import SuperLink
with SuperLink("127.0.0.1", 0, CoordinatorKit.read(Path(sys.argv[1]))) as link:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    print(link.port, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on open files")
def test_a_coordinator_without_files_left_accepts_sites(kits: Path) -> None:
    """The limit falls after the coordinator has taken it for granted, so that accepting fails."""
    command = [sys.executable, "-c", SERVE, str(kits / "coordinator")]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert running.stdout is not None
        port = int(running.stdout.readline())
        with stranger(port, 100, handshake=False):
            client = site(port, kits)
            assert client.heartbeat(client.activate(20.0), 20.0)
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on open files")
def test_a_run_goes_on_among_idle_connections(kits: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    settings = kits / "a" / "site.toml"
    settings.write_text(settings.read_text().replace("9092", str(port)))
    classes = ",".join(str(number) for number in range(10))
    out = tmp_path / "run"
    server = ["server", "--kit", str(kits / "coordinator"), "--port", str(port), "--out", str(out)]
    server += ["--classes", classes, "--backbone", "bundled:pixels", "--rounds", "3", "--min-sites", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limited = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *COMMAND, *server]
    with ExitStack() as stack:

        def start(home: str, *command: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / f"{home}.log").open("wb"))
            own = {**environment, "FEDHEAD_HOME": str(tmp_path / home)}
            process = subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        coordinator = start("coordinator", *limited)
        until(lambda: (out / "status.json").exists())
        idle = [stack.enter_context(stranger(port, 100, handshake=handshake)) for handshake in (False, True)]
        start("site", *COMMAND, "client", "--kit", str(kits / "a"), "--data", "digits")
        seen = []
        while coordinator.poll() is None:
            for each in idle:
                each.connect(5)
            seen.append(json.loads((out / "status.json").read_text()))
            time.sleep(0.2)
        said = (tmp_path / "coordinator.log").read_text()
    assert coordinator.returncode == 0, said
    assert len({values["updated"] for values in seen}) > 2
    assert json.loads((out / "result.json").read_text())["sites"] == 1
    assert "that sent no signed request" in said
