"""The coordinator's door, over loopback TLS: who gets in, what is answered, and what a site can reach."""

import base64
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedhead.errors import UserError
from fedhead.flower import set_message_id, site_link
from fedhead.flower.fleet_api import REQUESTS
from fedhead.flower.fleet_client import FleetClient
from fedhead.flower.messages import Delivery, assemble, disassemble
from fedhead.protocol.messages import Payload
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network import superlink, tls
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.site_registry import SiteRegistry
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import add_sites, provision, renew, revoke

FLEET = [f"/v1/fleet/{name}" for name in REQUESTS]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kits") / "kit"
    provision(out, "localhost:9092", ["a", "b"])
    return out


@pytest.fixture
def own_kits(kits: Path, tmp_path: Path) -> Path:
    shutil.copytree(kits, tmp_path / "kit")
    return tmp_path / "kit"


@pytest.fixture
def link(kits: Path) -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0, CoordinatorKit.read(kits / "coordinator")) as link:
        yield link


@contextmanager
def listening(kits: Path) -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0, CoordinatorKit.read(kits / "coordinator")) as link:
        yield link


def key_of(folder: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def connect(link: SuperLink, kits: Path, site: str, *, wait: int = 0) -> FleetClient:
    key, authority = key_of(kits / site), (kits / site / "ca.pem").read_bytes()
    return FleetClient(f"127.0.0.1:{link.port}", key, authority, wait, site)


def fetch(client: FleetClient, node: int) -> tuple[Delivery, Message]:
    """Pull a message with all its parts, and confirm it."""
    delivery = client.pull(node)
    assert delivery is not None
    message = with_parts(client, delivery)
    client.confirm(delivery.message)
    return delivery, message


def with_parts(client: FleetClient, delivery: Delivery) -> Message:
    contents = {}
    for object_id in delivery.objects:
        blob = client.pull_object(delivery.message, object_id)
        assert blob is not None
        contents[object_id] = blob
    return assemble(delivery, contents)


def answer(client: FleetClient, reply: Message) -> None:
    tree, objects = disassemble(reply)
    session, wanted = client.push(reply, tree, 0.1)
    for object_id in wanted:
        client.push_object(reply, session, object_id, objects[object_id])


def content(**values: object) -> RecordDict:
    return Payload(values, {"array": np.arange(5, dtype=np.float32)}).to_content()


def ask(grid: NetworkGrid, node: int, **values: object) -> str:
    (message_id,) = grid.push_messages([Message(content(**values), node, "query.describe")])
    return message_id


def replies(grid: NetworkGrid, *message_ids: str) -> dict[str, Message]:
    """Wait for the answers, whatever the machine is doing besides."""
    found: dict[str, Message] = {}
    stop = time.monotonic() + 60
    while len(found) < len(message_ids) and time.monotonic() < stop:
        for reply in grid.pull_messages([each for each in message_ids if each not in found]):
            found[reply.metadata.reply_to_message_id] = reply
    return found


def refused(call: Callable[[], object]) -> httpx.Response:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call()
    return caught.value.response


def until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < stop, "it never came about"
        time.sleep(0.02)


# What it is for.


def test_messages_reach_their_site_and_its_answers_come_back(link: SuperLink, kits: Path) -> None:
    grid = NetworkGrid(link)
    sites = {name: connect(link, kits, name) for name in "ab"}
    assert list(grid.get_node_ids()) == []
    nodes = {name: client.activate(20.0) for name, client in sites.items()}
    assert {grid.site_name(node): node for node in grid.get_node_ids()} == nodes
    shared = content(number=7)
    asked = dict(zip("ab", grid.push_messages([Message(shared, nodes[name], "train") for name in "ab"]), strict=True))
    assert list(grid.pull_messages(list(asked.values()))) == []
    for name, client in sites.items():
        _, message = fetch(client, nodes[name])
        assert Payload.from_content(message.content).values == {"number": 7}
        answer(client, Message(content(site=name), reply_to=message))
        assert client.pull(nodes[name]) is None
    found = replies(grid, *asked.values())
    for name, message_id in asked.items():
        payload = Payload.from_content(found[message_id].content)
        assert payload.values == {"site": name}
        np.testing.assert_array_equal(payload.arrays["array"], np.arange(5, dtype=np.float32))
        assert found[message_id].metadata.src_node_id == nodes[name]
    assert list(grid.pull_messages(list(asked.values()))) == []


def test_an_error_is_an_answer(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    message_id = ask(grid, node)
    _, message = fetch(client, node)
    answer(client, Message(Error(2, "the disk is gone"), reply_to=message))
    found = replies(grid, message_id)[message_id]
    assert found.has_error()
    assert found.error.reason == "the disk is gone"


def test_a_pull_is_held_until_there_is_a_message(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a", wait=30)
    node = client.activate(20.0)
    pulled: list[Delivery | None] = []
    thread = threading.Thread(target=lambda: pulled.append(client.pull(node)))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    message_id = ask(grid, node)
    thread.join(20)
    assert pulled[0] is not None
    assert pulled[0].message.metadata.message_id == message_id


def test_a_message_is_not_handed_to_a_connection_that_is_gone(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a", wait=30)
    node = client.activate(20.0)
    hanging = connect(link, kits, "a", wait=30)
    hanging._headers = client._headers
    thread = threading.Thread(target=lambda: _ignoring(lambda: hanging.pull(node)))
    thread.start()
    time.sleep(0.3)
    (held,) = hanging._client._client._transport._pool.connections
    held._connection._network_stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    thread.join(20)
    ask(grid, node)
    assert client.pull(node) is not None


def _ignoring(call: Callable[[], object]) -> None:
    with suppress(Exception):
        call()


def test_a_site_that_leaves_is_answered_for(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    message_id = ask(grid, node)
    client.deactivate(node)
    found = replies(grid, message_id)[message_id]
    assert "it is not connected, last heard of" in found.error.reason
    (never,) = grid.push_messages([Message(content(), 12345, "train")])
    assert "no longer registered" in replies(grid, never)[never].error.reason


def test_a_reply_that_came_before_its_site_left_counts(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    message_id = ask(grid, node)
    _, message = fetch(client, node)
    answer(client, Message(content(), reply_to=message))
    client.deactivate(node)
    assert not replies(grid, message_id)[message_id].has_error()


def test_a_forgotten_message_is_not_delivered_and_its_reply_not_kept(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    first, second = ask(grid, node, number=1), ask(grid, node, number=2)
    grid.forget([first])
    _, message = fetch(client, node)
    assert message.metadata.message_id == second
    grid.forget([second])
    answer(client, Message(content(), reply_to=message))
    assert list(grid.pull_messages([second])) == []
    kept = ask(grid, node, number=3)
    _, message = fetch(client, node)
    answer(client, Message(content(), reply_to=message))
    assert link.replied([first, second, kept]) == [kept]
    assert not replies(grid, kept)[kept].has_error()
    assert link.replied([kept]) == []


# Sites that come back.


def test_a_new_process_is_given_what_the_one_before_took_with_it(link: SuperLink, kits: Path) -> None:
    grid, killed = NetworkGrid(link), connect(link, kits, "a")
    node = killed.activate(20.0)
    message_id = ask(grid, node)
    _, message = fetch(killed, node)
    half = Message(content(), reply_to=message)
    killed.push(half, disassemble(half)[0], 0.1)
    restarted = connect(link, kits, "a")
    assert restarted.activate(20.0) == node
    _, again = fetch(restarted, node)
    assert again.metadata.message_id == message_id
    answer(restarted, Message(content(second="try"), reply_to=again))
    assert Payload.from_content(replies(grid, message_id)[message_id].content).values == {"second": "try"}
    response = refused(lambda: killed.pull(node))
    assert (response.status_code, "took over" in response.text) == (409, True)


def test_a_message_that_was_lost_on_the_way_is_delivered_again(
    link: SuperLink, kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    message_id = ask(grid, node)
    assert client.pull(node) is not None
    assert client.pull(node) is None
    with monkeypatch.context() as patch:
        patch.setattr(site_link, "FIRST_REDELIVERY", 0.0)
        delivery, _ = fetch(client, node)
    assert delivery.message.metadata.message_id == message_id
    assert client.pull(node) is None


# Who gets in.


def test_a_key_that_is_not_registered_is_refused_and_named(
    link: SuperLink, own_kits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_sites(own_kits, ["stranger"])
    response = refused(lambda: connect(link, own_kits, "stranger").activate(20.0))
    assert response.status_code == 412
    assert "is not registered" in response.json()["detail"]
    assert "a site from 127.0.0.1" in caplog.text


def test_refusals_of_ever_new_keys_do_not_fill_the_log(kits: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = SiteRegistry(CoordinatorKit.read(kits / "coordinator"))
    for number in range(5000):
        registry.log_refusal(f"Refused: a site, since its key ({number}) is not registered.")
    assert 0 < len(caplog.records) <= 1000


def test_a_key_that_comes_under_another_sites_name_is_refused(
    link: SuperLink, kits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impostor = FleetClient(f"127.0.0.1:{link.port}", key_of(kits / "a"), (kits / "ca.pem").read_bytes(), 0, "b")
    response = refused(lambda: impostor.activate(20.0))
    assert response.status_code == 412
    assert "registered as 'a', and its site.toml calls it 'b'" in response.json()["detail"]
    assert "registered as 'a'" in caplog.text
    assert not link.online()


def test_a_site_is_revoked_and_another_added_while_the_coordinator_runs(
    own_kits: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "KEEP_SECONDS", 0.05)
    with listening(own_kits) as link:
        client = connect(link, own_kits, "a")
        node = client.activate(20.0)
        assert client.heartbeat(node, 20.0)
        revoke(own_kits, ["a"])
        add_sites(own_kits, ["late"])
        until(lambda: set(link.sites) == {"b", "late"})
        assert refused(lambda: client.heartbeat(node, 20.0)).status_code == 401
        assert "its key is revoked" in refused(lambda: client.activate(20.0)).text
        assert connect(link, own_kits, "late").activate(20.0)
    assert "Refused: a (127.0.0.1), since its key is revoked" in caplog.text


def test_a_site_with_the_kit_of_another_coordinator_is_told_of(
    link: SuperLink, kits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provision(tmp_path / "other", "localhost:9092", ["a"])
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        connect(link, tmp_path / "other", "a").activate(20.0)
    until(lambda: "the kit of another coordinator" in caplog.text)
    stranger = FleetClient(
        f"127.0.0.1:{link.port}", key_of(tmp_path / "other" / "a"), (kits / "ca.pem").read_bytes(), 0, "a"
    )
    assert refused(lambda: stranger.activate(20.0)).status_code == 412


def test_plain_http_is_told_of(link: SuperLink, kits: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = FleetClient(f"127.0.0.1:{link.port}", key_of(kits / "a"), None, 0, "a")
    with pytest.raises(httpx.TransportError):
        plain.activate(20.0)
    until(lambda: "it spoke plain HTTP" in caplog.text)


def test_an_expired_certificate_stops_the_coordinator_and_is_told_of_by_sites(
    own_kits: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew(own_kits, days=-2)
    with pytest.raises(UserError, match=r"expired on .* fedhead provision --renew"):
        SuperLink("127.0.0.1", 0, CoordinatorKit.read(own_kits / "coordinator"))
    # As if it expired while the coordinator ran.
    monkeypatch.setattr(tls, "valid_until", lambda path: tls.datetime.max.replace(tzinfo=tls.UTC))
    with listening(own_kits) as link:
        with pytest.raises(httpx.ConnectError, match="expired"):
            connect(link, own_kits, "a").activate(20.0)
        until(lambda: "finds this coordinator's certificate expired" in caplog.text)


def test_a_clock_that_is_wrong_is_named(
    link: SuperLink, kits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from datetime import UTC, datetime, timedelta

    import flwr.supernode.node_auth_http_interceptor as interceptor

    monkeypatch.setattr(interceptor, "now", lambda: datetime.now(UTC) - timedelta(hours=2))
    response = refused(lambda: connect(link, kits, "a").activate(20.0))
    assert (response.status_code, "clocks differ" in response.text) == (401, True)
    assert "clocks differ" in caplog.text


def test_a_signature_of_another_key_is_refused(link: SuperLink, kits: Path) -> None:
    client = connect(link, kits, "a")
    shown = base64.b64encode((kits / "b" / "key.pub").read_bytes()).decode()
    client._client._client.event_hooks["request"].append(
        lambda request: request.headers.update({FLEET_HTTP_PUBLIC_KEY_HEADER: shown})
    )
    response = refused(lambda: client.activate(20.0))
    assert (response.status_code, "not of the key that it shows" in response.text) == (401, True)


def test_without_a_kit_only_this_machine_may_connect_and_each_name_once(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7", "localhost.example.org"):
        with pytest.raises(UserError, match="on this machine alone"):
            SuperLink(host, 0)
    with SuperLink("127.0.0.1", 0) as link:

        def site(name: str) -> FleetClient:
            key = ec.generate_private_key(ec.SECP384R1())
            return FleetClient(f"127.0.0.1:{link.port}", key, None, 0, name)

        first = site("ward")
        node = first.activate(20.0)
        assert link.online() == {"ward": node}
        assert "connected already" in refused(lambda: site("ward").activate(20.0)).text
        assert "no name that can be used" in refused(lambda: site("../ward").activate(20.0)).text
        assert "not know this site" in refused(lambda: site("other").heartbeat(node, 20.0)).text
        first.deactivate(node)
        assert site("ward").activate(20.0)


def test_a_port_in_use_and_a_broken_kit_are_told_before_anything_starts(link: SuperLink, own_kits: Path) -> None:
    with pytest.raises(UserError, match=r"cannot listen on .*in use"):
        SuperLink("127.0.0.1", link.port)
    (own_kits / "coordinator" / "server.key").chmod(0o644)
    with pytest.raises(UserError, match=r"server.key can be read by others on this machine \(mode 0644\): chmod 600"):
        SuperLink("127.0.0.1", 0, CoordinatorKit.read(own_kits / "coordinator"))
    shutil.copy(own_kits / "a" / "key.pem", own_kits / "coordinator" / "server.key")
    with pytest.raises(UserError, match="cannot be used together"):
        SuperLink("127.0.0.1", 0, CoordinatorKit.read(own_kits / "coordinator"))


# What a site can reach.


def test_a_site_reaches_nothing_of_another(link: SuperLink, kits: Path) -> None:
    grid = NetworkGrid(link)
    a, b = connect(link, kits, "a"), connect(link, kits, "b")
    node, other = a.activate(20.0), b.activate(20.0)
    message_id = ask(grid, node, secret="of a")
    delivery = a.pull(node)
    assert delivery is not None
    # Everything that a knows, in b's hands: as if b had guessed the ids.
    asked = with_parts(a, delivery)
    forged = Message(content(forged=True), reply_to=asked)
    tree, objects = disassemble(forged)
    for attempt in (
        lambda: b.pull(node),
        lambda: b.heartbeat(node, 20.0),
        lambda: b.deactivate(node),
        lambda: b.push(forged, tree, 0.1),
        lambda: b.pull_object(delivery.message, delivery.objects[0]),
        lambda: b.confirm(delivery.message),
        lambda: b.push_object(forged, "", next(iter(objects)), objects[next(iter(objects))]),
    ):
        assert refused(attempt).status_code == 401
    # The same under b's own node id, which the coordinator believes.
    for message in (delivery.message, forged):
        message.metadata.__dict__["_dst_node_id"] = other
    for object_id in delivery.objects:
        assert refused(lambda object_id=object_id: b.pull_object(delivery.message, object_id)).status_code == 403
    assert refused(lambda: b.confirm(delivery.message)).status_code == 403
    forged.metadata.__dict__["_src_node_id"] = other
    assert refused(lambda: b.push(forged, disassemble(forged)[0], 0.1)).status_code == 403
    assert list(grid.pull_messages([message_id])) == []
    assert b.pull(other) is None
    # And a is not disturbed.
    delivery.message.metadata.__dict__["_dst_node_id"] = node
    assert Payload.from_content(with_parts(a, delivery).content).values == {"secret": "of a"}
    answer(a, Message(content(genuine=True), reply_to=asked))
    assert Payload.from_content(replies(grid, message_id)[message_id].content).values == {"genuine": True}


def test_a_sites_own_run_does_not_open_anothers(link: SuperLink, kits: Path) -> None:
    grid = NetworkGrid(link)
    a, b = connect(link, kits, "a"), connect(link, kits, "b")
    nodes = [client.activate(20.0) for client in (a, b)]
    first, second = (ask(grid, node, number=number) for number, node in enumerate(nodes))
    seen, own = a.pull(nodes[0]), b.pull(nodes[1])
    assert seen is not None
    assert own is not None
    reaching = replace(own, message=own.message)
    for object_id in set(seen.objects) - set(own.objects):
        with pytest.raises(ValueError, match="gone"):
            b.pull_object(reaching.message, object_id)
    mine = with_parts(b, own)
    claim = Message(content(forged=True), reply_to=mine)
    claim.metadata.__dict__["_reply_to_message_id"] = first
    answer(b, claim)
    assert list(grid.pull_messages([first])) == []
    answer(b, Message(content(), reply_to=mine))
    assert set(replies(grid, second)) == {second}


def test_what_a_reply_says_of_itself_counts_for_nothing(link: SuperLink, kits: Path) -> None:
    grid = NetworkGrid(link)
    a, b = connect(link, kits, "a"), connect(link, kits, "b")
    nodes = [client.activate(20.0) for client in (a, b)]
    first, second = (ask(grid, node) for node in nodes)
    _, mine = fetch(b, nodes[1])
    reply = Message(content(), reply_to=mine)
    about = reply.metadata.__dict__
    truth = dict(about)
    about["_reply_to_message_id"], about["_src_node_id"] = first, nodes[0]
    tree, objects = disassemble(reply)
    about.update(truth)
    set_message_id(reply, tree.object_id)
    session, wanted = b.push(reply, tree, 0.1)
    for object_id in wanted:
        b.push_object(reply, session, object_id, objects[object_id])
    found = replies(grid, second)[second]
    assert (found.metadata.reply_to_message_id, found.metadata.src_node_id) == (second, nodes[1])
    assert list(grid.pull_messages([first])) == []


def test_a_reply_that_cannot_be_read_is_an_error_of_its_site(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    message_id = ask(grid, node)
    _, message = fetch(client, node)
    reply = Message(RecordDict({"a": ConfigRecord({"b": b"c"})}), reply_to=message)
    tree, objects = disassemble(reply)
    del tree.children[:]
    session, _ = client.push(reply, tree, 0.1)
    client.push_object(reply, session, tree.object_id, objects[tree.object_id])
    found = replies(grid, message_id)[message_id]
    assert "its reply cannot be read" in found.error.reason


def test_replies_have_a_limit(link: SuperLink, kits: Path) -> None:
    grid, client = NetworkGrid(link), connect(link, kits, "a")
    node = client.activate(20.0)
    link.sites["a"].link.most_reply_bytes = 10_000
    ask(grid, node)
    _, message = fetch(client, node)
    reply = Message(RecordDict({"a": ConfigRecord({"b": bytes(20_000)})}), reply_to=message)
    response = refused(lambda: answer(client, reply))
    assert (response.status_code, "more than 10000 bytes" in response.text) == (413, True)


# What is answered at all.


@contextmanager
def raw(link: SuperLink, kits: Path) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(kits / "ca.pem"))
    with (
        socket.create_connection(("127.0.0.1", link.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        yield wrapped


def status_of(link: SuperLink, kits: Path, request: str) -> int:
    with raw(link, kits) as connection:
        connection.sendall(request.encode("latin1"))
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status


POST = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/%70ull-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages/..%2f..%2fcontrol/start-run",
        "http://localhost/v1/control/start-run",
        "/V1/FLEET/PULL-MESSAGES",
    ],
)
def test_nothing_but_the_fleet_api_is_there(link: SuperLink, kits: Path, path: str) -> None:
    assert status_of(link, kits, POST.format(path)) == 404


def test_the_fleet_api_is_there_for_those_who_sign(link: SuperLink, kits: Path) -> None:
    assert {status_of(link, kits, POST.format(path)) for path in FLEET} == {401}
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert status_of(link, kits, POST.format(FLEET[0]).replace("POST", method)) == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: application/protobuf\r\nContent-Length: 300000000\r\n", 413),
        ("Content-Type: application/protobuf\r\nTransfer-Encoding: chunked\r\n", 413),
        ("Content-Type: application/protobuf\r\n", 413),
        ("Content-Type: text/plain\r\nContent-Length: 3\r\n", 415),
        (
            "Content-Type: application/protobuf\r\nflwr-public-key: x\r\nflwr-public-key: y\r\nContent-Length: 3\r\n",
            400,
        ),
        ("Content-Type: application/protobuf\r\nX-Forwarded-For: 10.0.0.1\r\nContent-Length: 3\r\n", 401),
    ],
)
def test_headers_decide_before_any_body_is_read(link: SuperLink, kits: Path, headers: str, status: int) -> None:
    request = f"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"
    assert status_of(link, kits, request) == status


def test_a_request_that_is_no_request_is_refused_not_crashed_on(link: SuperLink, kits: Path) -> None:
    client = connect(link, kits, "a")
    node = client.activate(20.0)
    for blob in (b"\xff\xff\xff", b"\x0a", bytes(1000)):
        status, body = link.sites["a"].link.answer("push-messages", blob)
        assert status in (400, 401), body
    assert client.heartbeat(node, 20.0)


SERVE = """
import sys, time
from pathlib import Path
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.superlink import SuperLink
host, port, kit = sys.argv[1:]
with SuperLink(host, int(port), CoordinatorKit.read(Path(kit))) as link:
    print(link.port, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def process(kits: Path, host: str = "127.0.0.1") -> Iterator[tuple[int, int]]:
    """Run a coordinator's door in a process of its own; give its port and process id."""
    command = [sys.executable, "-c", SERVE, host, "0", str(kits / "coordinator")]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert running.stdout is not None
        yield int(running.stdout.readline()), running.pid
    finally:
        with suppress(OSError):
            running.communicate(b"\n", timeout=30)
        running.kill()
        running.wait()


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see another process's memory")
@pytest.mark.parametrize("framing", ["Content-Length: 300000000\r\n", "Transfer-Encoding: chunked\r\n"])
def test_a_strangers_body_of_300_megabytes_takes_no_memory(kits: Path, framing: str) -> None:
    context = ssl.create_default_context(cafile=str(kits / "ca.pem"))
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n{framing}\r\n"
    block = bytes(1_000_000)
    if "chunked" in framing:
        block = b"f4240\r\n" + block + b"\r\n"
    with process(kits) as (port, pid):
        before = peak_bytes(pid)
        sent = 0
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
            suppress(OSError),
        ):
            connection.sendall(head.encode())
            while sent < 300:
                connection.sendall(block)
                sent += 1
        assert peak_bytes(pid) - before < 20_000_000


@pytest.mark.parametrize("head", ["POST /v1/fleet/push-object HTTP/1.1\r\nX: ", "POST /", "POST / HTTP/1.1\r\n"])
def test_a_head_that_does_not_end_is_hung_up_on(link: SuperLink, kits: Path, head: str) -> None:
    context = ssl.create_default_context(cafile=str(kits / "ca.pem"))
    block = b"a: b\r\n" * 20_000 if head.endswith("\n") else b"a" * 100_000
    with (
        socket.create_connection(("127.0.0.1", link.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(head.encode())
        with suppress(ConnectionError, ssl.SSLError):
            for _ in range(30):
                connection.sendall(block)
            assert connection.recv(1) == b""


# From another machine, as far as one machine can be two.


def run_in_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def other_machine() -> Iterator[tuple[str, str]]:
    """A network namespace with a wire to this one; gives its name, and the address of this end."""
    if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs Linux, iproute2 and the right to make network namespaces")
    name = f"fh{uuid4().hex[:6]}"
    here, there = f"{name}a", f"{name}b"
    number = int(name[2:4], 16)
    commands = [
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there} netns {name}",
        f"ip addr add 10.231.{number}.1/24 dev {here}",
        f"ip link set {here} up",
        f"ip -n {name} addr add 10.231.{number}.2/24 dev {there}",
        f"ip -n {name} link set {there} up",
    ]
    try:
        for command in commands:
            done = run_in_namespace(*command.split())
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        yield name, f"10.231.{number}.1"
    finally:
        run_in_namespace("ip", "link", "del", here)
        run_in_namespace("ip", "netns", "del", name)


PROBE = """
import socket, ssl, sys
address, port, ca = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=ca)
headers = "HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/protobuf\\r\\nContent-Length: 0\\r\\n\\r\\n"
for path in sys.argv[4:]:
    with socket.create_connection((address, port), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(f"POST {path} {headers}".encode())
            print(path, tls.recv(100).split()[1].decode())
"""


@pytest.mark.slow
def test_from_another_network_nothing_but_the_fleet_api_is_reachable(
    kits: Path, other_machine: tuple[str, str]
) -> None:
    namespace, address = other_machine
    paths = [*FLEET, "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"]
    with process(kits, address) as (port, pid):
        done = run_in_namespace(
            "ip", "netns", "exec", namespace, sys.executable, "-c", PROBE,
            address, str(port), str(kits / "ca.pem"), *paths,
        )  # fmt: skip
        listens = listening_ports(pid)
    answers = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("/"))
    assert answers == {path: "401" if path in FLEET else "404" for path in paths}, done.stderr
    assert listens == {port}


def listening_ports(pid: int) -> set[int]:
    """Return the TCP ports that a process listens on."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
