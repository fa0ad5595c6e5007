import socket

import pytest

from fedhead.errors import FedheadError, UserError
from fedhead.health import Health, ask


def test_a_process_says_whether_it_serves() -> None:
    health = Health()
    with health.served("127.0.0.1:0") as port:
        assert ask(f"127.0.0.1:{port}") == "NOT_SERVING"
        health.serving(True)
        assert ask(f"127.0.0.1:{port}") == "SERVING"
        health.serving(False)
        assert ask(f"127.0.0.1:{port}") == "NOT_SERVING"
    with pytest.raises(FedheadError, match=r"No health service answers at .*UNAVAILABLE"):
        ask(f"127.0.0.1:{port}")


def test_addresses_that_cannot_be_listened_on_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "nowhere"):
            with pytest.raises(UserError, match="cannot listen on"), Health().served(address):
                pass
