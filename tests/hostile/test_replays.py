"""A request that someone recorded on the way: neither repeated nor changed does it count."""

import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.flower.fleet_client import FleetClient
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import provision


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kits") / "kit"
    provision(out, "127.0.0.1:9092", ["a"])
    return out


@pytest.fixture
def link(kits: Path) -> Iterator[SuperLink]:
    with SuperLink("127.0.0.1", 0, CoordinatorKit.read(kits / "coordinator")) as link:
        yield link


class Recorder:
    """A site whose requests someone records, and can send again."""

    def __init__(self, link: SuperLink, kits: Path) -> None:
        key = serialization.load_pem_private_key((kits / "a" / "key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._authority = kits / "a" / "ca.pem"
        self._port = link.port
        self.site = FleetClient(f"127.0.0.1:{link.port}", key, self._authority.read_bytes(), 0, "a")
        self.requests: list[httpx.Request] = []
        self.site._client._client.event_hooks["request"].append(self.requests.append)

    def send(self, path: str = "", body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Send the last request again, with changes; return the status and the answer."""
        recorded = self.requests[-1]
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, context=ssl.create_default_context(cafile=str(self._authority)), timeout=30
        )
        body = recorded.content if body is None else body
        changed = dict(recorded.headers) | {name.replace("_", "-"): value for name, value in headers.items()}
        changed["content-length"] = str(len(body))
        connection.request("POST", path or recorded.url.path, body, changed)
        response = connection.getresponse()
        return response.status, response.read().decode("latin1")


@pytest.fixture
def recorder(link: SuperLink, kits: Path) -> Recorder:
    return Recorder(link, kits)


def test_a_repeated_request_is_refused(recorder: Recorder, link: SuperLink) -> None:
    node = recorder.site.activate(20.0)
    status, said = recorder.send()
    assert (status, "it came before" in said) == (401, True)
    recorder.site.deactivate(node)
    assert recorder.send()[0] == 401
    assert recorder.site.activate(20.0) == node
    assert link.online() == {"a": node}


def test_a_changed_request_is_refused_and_what_it_asks_is_not_done(recorder: Recorder, link: SuperLink) -> None:
    node = recorder.site.activate(20.0)
    recorder.site.heartbeat(node, 20.0)
    fresh = {"x_fedhead_nonce": "0" * 32}
    assert recorder.send("/v1/fleet/deactivate-node")[0] == 401
    assert recorder.send("/v1/fleet/deactivate-node", **fresh)[0] == 401
    assert recorder.send(**fresh)[0] == 401
    assert recorder.send(x_fedhead_process="another", **fresh)[0] == 401
    assert link.online() == {"a": node}
    assert recorder.site.heartbeat(node, 20.0)


def test_the_body_is_the_one_that_was_signed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way the body is changed and the request has not arrived before."""
    node = recorder.site.activate(20.0)
    client = recorder.site._client._client
    with monkeypatch.context() as patch:
        patch.setattr(client, "send", lambda request: recorder.requests.append(request) or httpx.Response(500))
        with pytest.raises(RuntimeError):
            recorder.site.deactivate(node)
    status, said = recorder.send(body=recorder.requests[-1].content + b"\x10\x01")
    assert (status, "not the one that was signed" in said) == (400, True)
    assert recorder.site.heartbeat(node, 20.0)


def test_a_request_that_signs_only_the_time_is_refused(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower's own SuperNode signs."""
    monkeypatch.setattr(FleetClient, "intercept", lambda self, context, call_next: call_next(context))
    with pytest.raises(httpx.HTTPStatusError) as caught:
        recorder.site.activate(20.0)
    assert caught.value.response.status_code == 401
    assert "it signs only the time" in caught.value.response.text
