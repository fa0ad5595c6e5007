import asyncio
import errno
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fedhead.errors import UserError
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.connections import Connection, Connections
from fedhead.server.network.limits import ConnectionLimits
from fedhead.server.network.listening import Listener, listen, protocol
from fedhead.server.provision import provision

LIMITS = ConnectionLimits(unproven=8, unproven_per_address=5, per_site=4)


class Door:
    """Connections, and those that were hung up on."""

    def __init__(self, limits: ConnectionLimits = LIMITS, most: int = 100) -> None:
        self.said: list[str] = []
        self.connections = Connections(limits, most, self.said.append)
        self.gone: list[Connection] = []

    def open(self, address: str) -> Connection | None:
        connection = self.connections.open(address)
        if connection is not None:
            connection.hang_up = lambda: self.gone.append(connection)
        return connection

    def opened(self, address: str) -> Connection:
        connection = self.open(address)
        assert connection is not None
        return connection


def test_the_oldest_connection_of_a_full_address_gives_way() -> None:
    door = Door()
    elsewhere = door.opened("10.0.0.1")
    opened = [door.opened("10.0.0.2") for _ in range(7)]
    assert door.gone == opened[:2]
    assert elsewhere not in door.gone
    assert "10.0.0.2" in door.said[0]


def test_a_crowded_network_gives_way_before_others() -> None:
    door = Door()
    crowd = [door.opened(f"2001:db8:0:1::{number}") for number in range(5)]
    others = [door.opened(f"2001:db8:0:{number}::1") for number in range(2, 6)]
    assert door.gone == crowd[:1]
    assert door.opened("::ffff:10.0.0.1").network == "10.0.0.1"
    assert door.gone == crowd[:2]
    assert not set(others) & set(door.gone)


def test_sites_behind_one_address_are_not_limited_by_it() -> None:
    door = Door()
    for number in range(50):
        door.opened("10.0.0.1").proves(f"site-{number}")
    assert not door.gone


def test_a_site_keeps_its_most_recently_used_connections() -> None:
    door = Door()
    opened = [door.opened("10.0.0.1") for _ in range(4)]
    for connection in [*opened, opened[0]]:
        connection.proves("a")
    fresh = door.opened("10.0.0.9")
    fresh.proves("a")
    assert door.gone == [opened[1]]
    assert not door.connections._unproven_number


def test_no_room_is_left_only_if_sites_take_all_of_it() -> None:
    door = Door(most=6)
    stranger = door.opened("10.0.0.1")
    for number in range(6):
        door.opened("10.0.0.2").proves(f"site-{number}")
    assert door.gone == [stranger]
    assert door.open("10.0.0.3") is None
    assert "as many as it can hold" in door.said[-1]


def test_a_connection_without_a_request_is_hung_up_on_once() -> None:
    door = Door()
    silent, working, left = (door.opened("10.0.0.1") for _ in range(3))
    working.proves("a")
    left.leave()
    for connection in (silent, working, left, silent):
        door.connections.late(connection)
    assert door.gone == [silent]


def test_numbers_are_right_after_any_history() -> None:
    generator = random.Random(5)
    for _ in range(30):
        door, alive = Door(most=20), []
        for _ in range(300):
            step = generator.randrange(4)
            if step < 2:
                connection = door.open(f"10.0.0.{generator.randrange(6)}")
                alive += [connection] if connection else []
            elif alive and step == 2:
                generator.choice(alive).proves(f"site-{generator.randrange(5)}")
            elif alive:
                alive.pop(generator.randrange(len(alive))).leave()
            alive = [one for one in alive if one not in door.gone]
            counted = door.connections
            assert counted._number == len(alive) <= 20
            assert counted._unproven_number == sum(not one.site for one in alive) <= LIMITS.unproven
            for network in {one.network for one in alive}:
                crowd = [one for one in alive if one.network == network and not one.site]
                assert len(crowd) <= LIMITS.unproven_per_address
            for site in {one.site for one in alive} - {""}:
                assert sum(one.site == site for one in alive) <= LIMITS.per_site


def test_limits_leave_files_to_the_coordinator() -> None:
    assert ConnectionLimits().within(128).unproven == 32
    assert ConnectionLimits().within(10**6) == ConnectionLimits()


def test_a_kit_sets_limits_and_wrong_ones_are_named(tmp_path: Path) -> None:
    provision(tmp_path / "kit", "localhost:9092", ["a"])
    folder = tmp_path / "kit" / "coordinator"
    assert CoordinatorKit.read(folder).connections == ConnectionLimits()
    settings = folder / "coordinator.toml"
    before = settings.read_text()
    settings.write_text(before + "\n[connections]\nunproven = 7\n")
    assert CoordinatorKit.read(folder).connections.unproven == 7
    settings.write_text(before + "\n[connections]\nunproven = 0\nwaiting = 3\n")
    with pytest.raises(UserError, match="unproven, waiting"):
        CoordinatorKit.read(folder)


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def status_after_failed_accept(failure: OSError, connections: Connections) -> bytes:
    """Return the first line of the reply to a request that comes after a connection could not be accepted."""
    loop, failures = asyncio.get_running_loop(), [failure]
    accept = loop.sock_accept

    async def failing(listening: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return await accept(listening)

    config = uvicorn.Config(nothing, log_config=None, lifespan="off", ws="none", http=protocol())
    config.load()
    listener, listening = Listener(config, None, connections), listen("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch, listening:
        patch.setattr(loop, "sock_accept", failing)
        await listener.startup([listening])
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        line = await reader.readline()
        writer.close()
        listener.force_exit = True
        await listener.shutdown()
    return line


@pytest.mark.parametrize(("code", "lowers"), [(errno.ECONNABORTED, False), (errno.EPROTO, False), (errno.EMFILE, True)])
def test_only_a_lack_of_files_lowers_the_number_of_connections(code: int, lowers: bool) -> None:
    door = Door()
    line = asyncio.run(status_after_failed_accept(OSError(code, "cannot accept"), door.connections))
    assert line.startswith(b"HTTP/1.1 204")
    assert bool(door.said) == lowers
