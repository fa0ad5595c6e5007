import http.server
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedhead.client import connection as module
from fedhead.client.connection import IDLE, PROMPT, CannotHealError, Connection, TakenOverError, WorkIsOverError
from fedhead.client.settings import Kit, insecure_key
from fedhead.flower import fleet_client, site_link
from fedhead.flower.fleet_client import FleetClient
from fedhead.flower.inline import MOST_INLINE_BYTES
from fedhead.protocol.messages import Payload
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network import api, superlink
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import add_sites, provision, revoke

HOST = "127.0.0.1"
CONTENT = Payload({"answer": 42})


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    provision(folder, f"{HOST}:9092", ["here", "there"])
    return folder


@contextmanager
def serving(kits: Path | None, port: int = 0, host: str = HOST) -> Iterator[SuperLink]:
    kit = None if kits is None else CoordinatorKit.read(kits / "coordinator")
    with SuperLink(host, port, kit) as link:
        yield link


class CountingClient(FleetClient):
    pulls = 0

    def pull(self, node_id: int, *, hold: bool = True):  # type: ignore[no-untyped-def]
        self.pulls += 1
        return super().pull(node_id, hold=hold)


Connect = Callable[..., Connection]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Make connections to `host:port` with a kit, or without one; all are closed in the end."""
    made: list[Connection] = []

    def make(port: int, kit: Path | None, *, host: str = HOST, wait: int = 5, name: str = "here", **more: float):  # type: ignore[no-untyped-def]
        opened = None if kit is None else Kit(kit)
        key = insecure_key(tmp_path) if opened is None else opened.key
        fleet = CountingClient(f"{host}:{port}", key, opened and opened.root_certificates, wait, name)
        connection = Connection(fleet, f"{host}:{port}", tmp_path / "node.json", insecure=kit is None, **more)
        made.append(connection)
        return connection

    yield make
    for connection in made:
        connection.close()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return int(listening.getsockname()[1])


def ask(grid: NetworkGrid, name: str = "here") -> str:
    (message_id,) = grid.push_messages([Message(CONTENT.to_content(), grid.link.online()[name], "train")])
    return message_id


def answer(message: Message) -> Message:
    return Message(Payload({"got": Payload.from_content(message.content).values}).to_content(), reply_to=message)


def receive(connection: Connection) -> Message:
    while (message := connection.receive()) is None:
        pass
    return message


def reply_to(grid: NetworkGrid, message_id: str) -> Message:
    while not (replies := list(grid.pull_messages([message_id]))):
        pass
    return replies[0]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not come about in time"
        time.sleep(0.01)


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("secure", [True, False])
def test_a_message_is_answered(kits: Path, connect: Connect, secure: bool) -> None:
    with serving(kits if secure else None) as link:
        connection = connect(link.port, kits / "here" if secure else None)
        connection.open()
        grid = NetworkGrid(link)
        message_id = ask(grid)
        message = receive(connection)
        assert message.metadata.message_type == "train"
        assert Payload.from_content(message.content) == CONTENT
        connection.send(answer(message), 0.1)
        assert Payload.from_content(reply_to(grid, message_id).content).values == {"got": {"answer": 42}}


def requests_of(connection: Connection) -> list[str]:
    """Return the last parts of the paths of all requests from now on."""
    paths: list[str] = []
    hooks = connection._fleet._client._client.event_hooks
    connection._fleet._client._client.event_hooks = {
        **hooks,
        "request": [lambda request: paths.append(request.url.path.rpartition("/")[2])],
    }
    return paths


@pytest.mark.parametrize("earlier", ["", "coordinator", "site"])
def test_a_message_and_its_reply_take_two_requests_where_both_ends_know_how(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    if earlier == "coordinator":
        monkeypatch.setattr(site_link, "fitting", lambda objects, room: {})
        monkeypatch.setattr(site_link, "objects_of", lambda body, most: {})
    elif earlier == "site":
        monkeypatch.setattr(fleet_client, "INLINE_HEADER", "x-fedhead-another")
    with serving(kits) as link:
        connection = connect(link.port, kits / "here", beat=1000)
        connection.open()
        paths, grid = requests_of(connection), NetworkGrid(link)
        for _ in range(2):
            message_id = ask(grid)
            connection.send(answer(receive(connection)), 0.1)
            assert Payload.from_content(reply_to(grid, message_id).content).values == {"got": {"answer": 42}}
    if earlier:
        assert set(paths) == {
            "pull-messages",
            "pull-object",
            "confirm-message-received",
            "push-messages",
            "push-object",
        }
    else:
        assert paths == ["pull-messages", "push-messages"] * 2


def test_large_objects_take_requests_of_their_own(kits: Path, connect: Connect) -> None:
    large = Payload({}, {"array": np.random.default_rng(0).random(MOST_INLINE_BYTES // 8)})
    with serving(kits) as link:
        connection = connect(link.port, kits / "here", beat=1000)
        connection.open()
        paths, grid = requests_of(connection), NetworkGrid(link)
        (message_id,) = grid.push_messages([Message(large.to_content(), grid.link.online()["here"], "train")])
        message = receive(connection)
        np.testing.assert_array_equal(Payload.from_content(message.content).arrays["array"], large.arrays["array"])
        connection.send(Message(large.to_content(), reply_to=message), 0.1)
        reply = Payload.from_content(reply_to(grid, message_id).content)
        np.testing.assert_array_equal(reply.arrays["array"], large.arrays["array"])
    assert paths == ["pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object"]


def test_our_coordinator_is_asked_once_and_holds_the_pull_until_there_is_a_message(
    kits: Path, connect: Connect
) -> None:
    with serving(kits) as link:
        connection = connect(link.port, kits / "here", wait=20)
        connection.open()
        pulled: list[Message] = []
        waiting = threading.Thread(target=lambda: pulled.append(receive(connection)))
        waiting.start()
        until(lambda: connection._fleet.pulls == 1)  # type: ignore[attr-defined]
        time.sleep(0.3)
        ask(NetworkGrid(link))
        waiting.join(10)
        assert pulled
        assert connection._fleet.pulls == 1  # type: ignore[attr-defined]


def test_where_pulls_are_not_held_they_come_ever_more_seldom_until_a_message_comes(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_FOR", 0.0)
    with serving(kits) as link:
        connection = connect(link.port, kits / "here", wait=0)
        connection.open()
        pauses: list[float] = []
        monkeypatch.setattr(connection, "_wait", pauses.append)
        for _ in range(20):
            assert connection.receive() is None
        assert pauses[0] < 2 * PROMPT
        assert 0.75 * IDLE <= pauses[-1] <= 1.25 * IDLE
        ask(NetworkGrid(link))
        receive(connection)
        pauses.clear()
        assert connection.receive() is None
        assert pauses[0] < 2 * PROMPT


@pytest.mark.parametrize("counts", [True, False])
def test_a_held_pull_counts_as_a_heartbeat_where_the_coordinator_says_so(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, counts: bool
) -> None:
    if not counts:
        monkeypatch.setattr(api, "_COUNTS", (b"x-fedhead-another", b"1"))
    with serving(kits) as link:
        connection = connect(link.port, kits / "here", beat=0.05, wait=3)
        connection.open()
        assert connection.receive() is None
        fleet, site, beats = connection._fleet, link.sites["here"].link, list[bool]()
        monkeypatch.setattr(fleet, "heartbeat", lambda *_: beats.append(connection._pulling_since is not None) or True)
        before = site.online_until
        assert connection.receive() is None
        assert site.online_until > before
    # One may be decided on just before the pull begins.
    assert (sum(beats) <= 1) == counts


def test_a_pull_does_not_bring_back_a_site_that_left(kits: Path) -> None:
    with serving(kits) as link:
        client = FleetClient(f"{HOST}:{link.port}", Kit(kits / "here").key, Kit(kits / "here").root_certificates, 0)
        node = client.activate(20.0)
        client.deactivate(node)
        assert client.pull(node) is None
        assert link.online() == {}


def test_a_pull_brings_back_a_site_that_was_silent(kits: Path) -> None:
    """Its machine slept, or somebody held its packets up; where pulls count, it sends no other heartbeats."""
    with serving(kits) as link:
        client = FleetClient(f"{HOST}:{link.port}", Kit(kits / "here").key, Kit(kits / "here").root_certificates, 0)
        node = client.activate(20.0)
        known = link.sites["here"].link
        known._state.nodes[node].online_until = time.time() - 1
        assert known.online_until < time.time()
        assert link.online() == {}
        assert client.pull(node) is None
        assert link.online() == {"here": node}
        assert known.online_until > time.time() + 30


def test_a_coordinator_that_restarts_is_found_again_and_the_old_work_dropped(
    kits: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedhead")
    with serving(kits) as link:
        port = link.port
        connection = connect(port, kits / "here", wait=1)
        connection.open()
        ask(NetworkGrid(link))
        old = receive(connection)

    def send() -> None:
        with pytest.raises(WorkIsOverError):
            connection.send(answer(old), 0.1)

    sending = threading.Thread(target=send)
    sending.start()
    until(lambda: said(caplog, "Nothing listens at") == 1)
    time.sleep(1.0)
    with serving(kits, port) as link:
        sending.join(20)
        assert not sending.is_alive()
        until(lambda: "here" in link.online())
        grid = NetworkGrid(link)
        message_id = ask(grid)
        connection.send(answer(receive(connection)), 0.1)
        assert reply_to(grid, message_id).has_content()
    assert said(caplog, "Nothing listens at") == 1
    assert said(caplog, "Connected to") == said(caplog, "Connected again to") == 1


def test_a_site_is_alive_and_comes_back_while_it_works(kits: Path, connect: Connect) -> None:
    with serving(kits) as link:
        port = link.port
        connection = connect(port, kits / "here", beat=0.05)
        connection.open()
        before = link.sites["here"].last_seen
        until(lambda: link.sites["here"].last_seen > before)
    with serving(kits, port) as link:
        until(lambda: "here" in link.online())


def test_a_reply_survives_a_lost_connection(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(kits) as link:
        connection = connect(link.port, kits / "here")
        connection.open()
        grid = NetworkGrid(link)
        message_id = ask(grid)
        message = receive(connection)
        http = connection._fleet._client._client  # type: ignore[attr-defined]
        sound, failures = http.send, iter([httpx_error(), httpx_error()])

        def broken(*args: object, **options: object) -> object:
            for failure in failures:
                raise failure
            return sound(*args, **options)

        monkeypatch.setattr(http, "send", broken)
        connection.send(answer(message), 0.1)
        assert reply_to(grid, message_id).has_content()
    assert said(caplog, "cut off") == 1


def httpx_error() -> Exception:
    import httpx

    return httpx.ReadError("cut off")


# Refused for good, and in what words.


def test_a_key_that_is_not_registered_is_told_so(kits: Path, connect: Connect, tmp_path: Path) -> None:
    provision(tmp_path / "other", f"{HOST}:9092", ["here"])
    (tmp_path / "other" / "here" / "ca.pem").write_bytes((kits / "ca.pem").read_bytes())
    with (
        serving(kits) as link,
        pytest.raises(CannotHealError, match=r"is not registered\. Ask the coordinator's operator"),
    ):
        connect(link.port, tmp_path / "other" / "here").open()


def test_a_key_that_is_revoked_meanwhile_is_told_so(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "KEEP_SECONDS", 0.05)
    provision(tmp_path / "kit", f"{HOST}:9092", ["here", "there"])
    with serving(tmp_path / "kit") as link:
        connection = connect(link.port, tmp_path / "kit" / "here", wait=0)
        connection.open()
        revoke(tmp_path / "kit", ["here"])
        with pytest.raises(CannotHealError, match=r"its key is revoked\. Ask"):
            while True:
                connection.receive()


def test_a_site_that_is_registered_meanwhile_needs_no_restart_of_the_coordinator(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "KEEP_SECONDS", 0.05)
    provision(tmp_path / "kit", f"{HOST}:9092", ["there"])
    with serving(tmp_path / "kit") as link:
        add_sites(tmp_path / "kit", ["here"])
        until(lambda: "here" in link.sites)
        connect(link.port, tmp_path / "kit" / "here").open()


def test_the_kit_of_another_coordinator_is_told_so(kits: Path, connect: Connect, tmp_path: Path) -> None:
    provision(tmp_path / "other", f"{HOST}:9092", ["here"])
    with (
        serving(kits) as link,
        pytest.raises(CannotHealError, match=r"not the coordinator that made this kit.*CERTIFICATE_VERIFY_FAILED"),
    ):
        connect(link.port, tmp_path / "other" / "here").open()


def test_an_address_that_the_certificate_does_not_have_is_told_so(kits: Path, connect: Connect) -> None:
    with (
        serving(kits, host="127.0.0.2") as link,
        pytest.raises(CannotHealError, match=r"certificate of 127.0.0.2:[0-9]+ is for another name"),
    ):
        connect(link.port, kits / "here", host="127.0.0.2").open()


def test_a_client_without_tls_is_told_that_the_coordinator_has_it(kits: Path, connect: Connect) -> None:
    with serving(kits) as link, pytest.raises(CannotHealError, match=r"speaks TLS.*Start it with --kit"):
        connect(link.port, None).open()


def test_a_client_with_tls_is_told_that_the_coordinator_has_none(kits: Path, connect: Connect) -> None:
    with serving(None) as link, pytest.raises(CannotHealError, match="does not speak TLS"):
        connect(link.port, kits / "here").open()


def test_a_second_process_takes_over_and_the_first_ends(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(kits) as link:
        first, second = (connect(link.port, kits / "here", wait=0) for _ in range(2))
        first.open()
        first.receive()
        second.open()
        second.receive()
        with pytest.raises(TakenOverError, match=r"took over\. A site has one process") as caught:
            first.receive()
        # As systemd is told, so that two of them do not take turns.
        assert caught.value.exit_status == 2


class Page(http.server.BaseHTTPRequestHandler):
    status = 404

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"<html")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def web_server(status: int, port: int = 0) -> Iterator[int]:
    handler = type("Page", (Page,), {"status": status})
    with http.server.ThreadingHTTPServer((HOST, port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [404, 200, 501])
def test_a_web_server_is_no_coordinator(connect: Connect, status: int) -> None:
    with web_server(status) as port, pytest.raises(CannotHealError, match=r"is no coordinator.*check the address"):
        connect(port, None).open()


# What heals.


def test_what_fails_for_a_while_is_said_once_and_waited_for(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedhead")
    port = free_port()
    connection = connect(port, None)
    opening = threading.Thread(target=connection.open)
    opening.start()
    until(lambda: said(caplog, "Nothing listens at") == 1)
    with web_server(503, port):
        until(lambda: said(caplog, "fails with HTTP 503") == 1)
        time.sleep(0.5)
    assert not connection.connected
    with serving(None, port) as link:
        until(lambda: "here" in link.online())
        opening.join(20)
        assert connection.connected
    assert said(caplog, "fails with HTTP 503") == 1
    assert said(caplog, "Connected to") == 1


def test_an_expired_certificate_is_told_and_a_new_one_accepted(
    tmp_path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    from fedhead.server.provision import renew

    provision(tmp_path / "kit", f"{HOST}:9092", ["here"], days=-1)
    port = free_port()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    coordinator = tmp_path / "kit" / "coordinator"
    context.load_cert_chain(coordinator / "server.pem", coordinator / "server.key")
    connection = connect(port, tmp_path / "kit" / "here")
    opening = threading.Thread(target=connection.open)
    with http.server.ThreadingHTTPServer((HOST, port), Page) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        serving_expired = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving_expired.start()
        opening.start()
        until(lambda: said(caplog, "has expired") == 1)
        server.shutdown()
        serving_expired.join()
    renew(tmp_path / "kit")
    with serving(tmp_path / "kit", port):
        opening.join(20)
        assert connection.connected


def test_a_clock_that_is_wrong_is_told(
    kits: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datetime

    from flwr.supernode import node_auth_http_interceptor as interceptor

    ahead = datetime.timedelta(hours=1)
    with monkeypatch.context() as patch:
        patch.setattr(interceptor, "now", lambda: datetime.datetime.now(datetime.UTC) + ahead)
        patch.setattr(time, "time", lambda: datetime.datetime.now(datetime.UTC).timestamp() + ahead.total_seconds())
        with serving(kits) as link:
            connection = connect(link.port, kits / "here")
            opening = threading.Thread(target=connection.open)
            opening.start()
            until(lambda: said(caplog, "refuses this site's signature") == 1)
            patch.undo()
            opening.join(20)
            assert connection.connected
    assert "clock" in caplog.text


def test_closing_ends_what_waits_and_frees_the_node(kits: Path, connect: Connect, tmp_path: Path) -> None:
    with serving(kits) as link:
        connection = connect(link.port, kits / "here")
        connection.open()
        assert (tmp_path / "node.json").exists()
        grid = NetworkGrid(link)
        message_id = ask(grid)
        unfinished = receive(connection)
        connection.close(answer(unfinished))
        assert reply_to(grid, message_id).has_content()
        assert "here" not in link.online()
        assert not (tmp_path / "node.json").exists()
