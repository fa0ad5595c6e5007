import pytest

from fedhead.addresses import is_loopback, split_address
from fedhead.errors import UserError


@pytest.mark.parametrize("address", ["coord:9092", "127.0.0.1:0", "[::1]:65535", "a-b.example.org:80"])
def test_addresses_are_taken_apart(address: str) -> None:
    host, port = split_address(address)
    assert address in (f"{host}:{port}", f"[{host}]:{port}")


@pytest.mark.parametrize("address", ["coord", ":9092", "coord:", "coord:-1", "coord:65536", "http://coord:1", "::1:80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
