import base64
import random
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedhead.flower import signing
from fedhead.flower.signing import IdentityError, Nonces, Proof, proof, signed_headers

KEY = ec.generate_private_key(ec.SECP256R1())
PATH, BODY = "/v1/fleet/pull-messages", b"body"
SENT = {"x-fedhead-site": "a", "x-fedhead-process": "0123", "content-type": "application/protobuf"}


def received(**changes: str) -> dict[bytes, bytes]:
    headers = SENT | signed_headers(KEY, PATH, BODY, SENT) | changes
    return {name.encode(): value.encode() for name, value in headers.items()}


def test_a_signed_request_proves_its_sender() -> None:
    sent = proof(PATH, received())
    assert sent.covers(BODY)
    assert not sent.covers(b"")
    assert sent.key.startswith(b"-----BEGIN PUBLIC KEY")


@pytest.mark.parametrize("name", [name for name in received() if name.startswith(b"x-fedhead-")])
def test_every_header_of_ours_is_signed(name: bytes) -> None:
    headers = received()
    headers[name] = headers[name][:-1] + (b"0" if headers[name][-1:] != b"0" else b"1")
    with pytest.raises(IdentityError, match=r"forged|partly"):
        proof(PATH, headers)
    del headers[name]
    with pytest.raises(IdentityError, match=r"forged|partly"):
        proof(PATH, headers)


def test_a_header_that_was_added_or_another_path_is_refused() -> None:
    with pytest.raises(IdentityError, match="forged"):
        proof(PATH, received(**{"x-fedhead-wait": "30"}))
    with pytest.raises(IdentityError, match="forged"):
        proof("/v1/fleet/deactivate-node", received())


def test_a_request_that_signs_only_the_time_is_told_apart() -> None:
    headers = received()
    for name in list(headers):
        if name.startswith(b"x-fedhead-"):
            del headers[name]
    with pytest.raises(IdentityError, match="partly"):
        proof(PATH, headers)


@pytest.mark.parametrize(("seconds", "recent"), [(0, True), (290, True), (320, False), (-3, True), (-20, False)])
def test_only_recent_requests_count(seconds: float, recent: bool) -> None:
    now = datetime.now(UTC) + timedelta(seconds=seconds)
    if recent:
        assert proof(PATH, received(), now)
    else:
        with pytest.raises(IdentityError, match="clock"):
            proof(PATH, received(), now)


def request(nonce: int, signed: float) -> Proof:
    return Proof(b"key", str(nonce).encode(), signed, "")


def test_no_request_counts_twice_within_bounded_memory() -> None:
    """Requests come in the order of signing but for a little, are repeated at any time, and outnumber the memory."""
    generator = random.Random(1)
    nonces, sent, refused = Nonces(most=50), [], 0
    for number in range(2000):
        now = 1000.0 + number
        sent.append(request(number, now - generator.uniform(0, 5)))
        refused += not nonces.is_new(sent[-1], now)
        assert not nonces.is_new(generator.choice(sent[-600:]), now)
        assert len(nonces._seen) <= 50
    assert refused == 0


def test_nonces_are_forgotten_once_their_time_is_over() -> None:
    nonces = Nonces()
    for number in range(100):
        assert nonces.is_new(request(number, float(number)), float(number))
    assert nonces.is_new(request(100, 1000.0), 1000.0)
    assert len(nonces._seen) == 1


def test_a_key_within_a_long_text_is_not_kept() -> None:
    name, headers = FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), received()
    before = signing._public_key.cache_info().currsize
    headers[name] = base64.b64encode(base64.b64decode(headers[name]) + b"x" * 500_000)
    with pytest.raises(IdentityError, match="unsigned"):
        proof(PATH, headers)
    assert signing._public_key.cache_info().currsize == before
