"""Sites that reach their coordinator through a CONNECT proxy, a reverse proxy, or IPv6: over real sockets."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from flwr.app import Message

from fedhead.addresses import proxy_of
from fedhead.client.connection import CannotHealError, Connection
from fedhead.client.settings import Kit, trusted
from fedhead.errors import UserError
from fedhead.flower.fleet_client import FleetClient
from fedhead.protocol.messages import Payload
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import provision

CONTENT = Payload({"answer": 42})


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "all_proxy", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    provision(folder, "localhost:9092", ["here"])
    return folder


@pytest.fixture(scope="module")
def link(kits: Path) -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0, CoordinatorKit.read(kits / "coordinator")) as link:
        yield link


@contextmanager
def connected(kits: Path, address: str, folder: Path, **changes: str) -> Iterator[Connection]:
    kit = Kit(kits / "here")
    settings = kit.settings({"coordinator": address, **changes})
    fleet = FleetClient(address, kit.key, trusted(kit, settings), 5, "here")
    connection = Connection(fleet, address, folder / "node.json")
    try:
        yield connection
    finally:
        connection.close()


def exchange(link: SuperLink, connection: Connection) -> None:
    """Have a message answered."""
    connection.open()
    grid = NetworkGrid(link)
    (message_id,) = grid.push_messages([Message(CONTENT.to_content(), link.online()["here"], "train")])
    while (message := connection.receive()) is None:
        pass
    connection.send(Message(Payload({"got": 42}).to_content(), reply_to=message), 0.0)
    while not (replies := list(grid.pull_messages([message_id]))):
        pass
    assert Payload.from_content(replies[0].content).values == {"got": 42}


Handle = Callable[[socket.socket], None]


@contextmanager
def listening(handle: Handle) -> Iterator[int]:
    """Call `handle` in a thread with each connection to a port."""
    server = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = []

    def handled(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            handle(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                opened.append(server.accept()[0])
                threading.Thread(target=handled, args=(opened[-1],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(server.getsockname()[1])
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in opened:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def relay(one: socket.socket, other: socket.socket, seen: bytearray | None = None) -> None:
    """Pass bytes between two connections until both are closed."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if seen is not None:
                    seen.extend(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=pass_on, args=(other, one), daemon=True)
    back.start()
    pass_on(one, other)
    back.join()


class ConnectProxy:
    """An HTTP proxy that connects to one address, whatever name it is asked for."""

    def __init__(self, port: int, answer: bytes = b"") -> None:
        self.port, self.answer = port, answer
        self.heads: list[bytes] = []
        self.seen = bytearray()

    def __call__(self, connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        self.heads.append(head)
        if self.answer:
            connection.sendall(self.answer)
            return
        with socket.create_connection(("127.0.0.1", self.port)) as onward:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            relay(connection, onward, self.seen)


def test_a_site_connects_through_a_proxy_that_sees_only_tls(
    link: SuperLink, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ConnectProxy(link.port)
    with listening(proxy) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{port}")
        with connected(kits, f"localhost:{link.port}", tmp_path) as connection:
            exchange(link, connection)
    assert {head.split(b"\r\n")[0] for head in proxy.heads} == {f"CONNECT localhost:{link.port} HTTP/1.1".encode()}
    assert all(b"proxy-authorization: basic" in head.lower() for head in proxy.heads)
    assert proxy.seen
    assert b"/v1/fleet" not in proxy.seen


def warning(caplog: pytest.LogCaptureFixture, connection: Connection) -> str:
    caplog.set_level(logging.WARNING)
    thread = threading.Thread(target=lambda: _quietly(connection.open), daemon=True)
    thread.start()
    stop = time.monotonic() + 20
    while not caplog.records and time.monotonic() < stop:
        time.sleep(0.01)
    connection.close()
    thread.join()
    return caplog.records[0].getMessage()


def _quietly(call: Callable[[], object]) -> None:
    with suppress(Exception):
        call()


def test_a_dead_proxy_is_named_without_its_password(
    link: SuperLink, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = server.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{dead}")
    with connected(kits, f"localhost:{link.port}", tmp_path) as connection:
        said = warning(caplog, connection)
    assert f"The proxy http://127.0.0.1:{dead} does not answer" in said
    assert "list localhost in NO_PROXY" in said
    assert "secret" not in said


def test_a_proxy_that_refuses_is_named(
    link: SuperLink, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with listening(ConnectProxy(link.port, refusal)) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        with connected(kits, f"localhost:{link.port}", tmp_path) as connection:
            said = warning(caplog, connection)
    assert f"The proxy http://127.0.0.1:{port} does not connect this site to localhost:{link.port} (403" in said


def test_the_environment_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of("coord.example.org", 9092) == ""
    monkeypatch.setenv("ALL_PROXY", "all.example.org:3128")
    assert proxy_of("coord.example.org", 9092) == "http://all.example.org:3128"
    monkeypatch.setenv("HTTPS_PROXY", "http://https.example.org:3128")
    assert proxy_of("coord.example.org", 9092) == "http://https.example.org:3128"
    for bypass in ("*", "example.org", ".example.org", "coord.example.org:9092", "other,coord.example.org"):
        monkeypatch.setenv("NO_PROXY", bypass)
        assert proxy_of("coord.example.org", 9092) == ""
    monkeypatch.setenv("NO_PROXY", "coord.example.org:443")
    assert proxy_of("coord.example.org", 9092)
    for wrong in ("socks5://user:secret@proxy:1080", "http://", "http://proxy:99999"):
        monkeypatch.setenv("HTTPS_PROXY", wrong)
        with pytest.raises(UserError, match="HTTP proxies only") as refused:
            proxy_of("coord.example.org", 9092)
        assert "secret" not in str(refused.value)


@contextmanager
def reverse_proxy(link: SuperLink, kits: Path, other: Path, names: list[str | None]) -> Iterator[int]:
    """Terminate TLS with a certificate of another authority, note the name asked for, and connect onwards."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(other / "coordinator" / "server.pem", other / "coordinator" / "server.key")
    server.sni_callback = lambda made, name, context: names.append(name)
    client = ssl.create_default_context(cafile=str(kits / "ca.pem"))

    def handle(connection: socket.socket) -> None:
        with ExitStack() as stack:
            front = stack.enter_context(server.wrap_socket(connection, server_side=True))
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", link.port)))
            relay(front, stack.enter_context(client.wrap_socket(plain, server_hostname="localhost")))

    with listening(handle) as port:
        yield port


def test_a_reverse_proxy_needs_its_authority_and_is_told_the_name(link: SuperLink, kits: Path, tmp_path: Path) -> None:
    other, names = tmp_path / "other", []  # type: ignore[var-annotated]
    provision(other, "localhost:443", ["x"])
    with reverse_proxy(link, kits, other, names) as port:
        address = f"localhost:{port}"
        with connected(kits, address, tmp_path) as connection, pytest.raises(CannotHealError, match="--ca-bundle"):
            connection.open()
        with connected(kits, address, tmp_path, ca_bundle=str(other / "ca.pem")) as connection:
            exchange(link, connection)
    assert set(names) == {"localhost"}


def test_a_bundle_that_cannot_be_used_is_refused(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    for bundle, words in (("missing.pem", "cannot be read"), ("broken.pem", "cannot be used")):
        with (
            pytest.raises(UserError, match=words),
            connected(kits, "localhost:1", tmp_path, ca_bundle=str(tmp_path / bundle)),
        ):
            pass


def test_ipv6_addresses_work_end_to_end(tmp_path: Path) -> None:
    provision(tmp_path / "kit", "[::1]:9092", ["here"])
    kit = CoordinatorKit.read(tmp_path / "kit" / "coordinator")
    assert kit.listen == "[::]:9092"
    with SuperLink("::1", 0, kit) as link, connected(tmp_path / "kit", f"[::1]:{link.port}", tmp_path) as connection:
        exchange(link, connection)
