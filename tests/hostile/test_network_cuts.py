"""Networks that fail: every message is answered in the end, whatever is lost on the way."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedhead.client.connection import Connection, WorkIsOverError
from fedhead.client.settings import Kit, insecure_key
from fedhead.flower.fleet_client import FleetClient
from fedhead.protocol.messages import Payload
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.server.provision import provision
from fedhead.simulations.benchmarks.cutting_proxy import Cut, CuttingProxy

DEADLINE = 60.0
ARRAYS = {name: np.arange(40_000, dtype=np.float32) for name in "abc"}


class Site:
    """A site that answers in a thread, through a proxy."""

    def __init__(self, folder: Path, port: int, kit: Path | None = None) -> None:
        opened = None if kit is None else Kit(kit)
        key = insecure_key(folder) if opened is None else opened.key
        address = f"127.0.0.1:{port}"
        fleet = FleetClient(address, key, opened and opened.root_certificates, 25, "here")
        self.connection = Connection(fleet, address, folder / "node.json", insecure=kit is None)
        self.handled: list[str] = []
        self._ending = False
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        self.connection.open()
        self._thread.start()

    def _serve(self) -> None:
        while not self._ending:
            try:
                message = self.connection.receive()
                if message is not None:
                    self.handled.append(message.metadata.message_id)
                    values = Payload.from_content(message.content).values
                    self.connection.send(Message(Payload({"got": values}, ARRAYS).to_content(), reply_to=message), 0.1)
            except WorkIsOverError:
                continue

    def stop(self) -> None:
        self._ending = True
        self.connection.close()
        self._thread.join()


@contextmanager
def site_behind_proxy(folder: Path, kits: Path | None = None) -> Iterator[tuple[NetworkGrid, CuttingProxy, Site]]:
    kit = None if kits is None else CoordinatorKit.read(kits / "coordinator")
    with SuperLink("127.0.0.1", 0, kit) as link, CuttingProxy(link.port) as proxy:
        site = Site(folder, proxy.port, None if kits is None else kits / "here")
        site.start()
        try:
            yield NetworkGrid(link), proxy, site
        finally:
            proxy.heal()
            site.stop()


def exchange(grid: NetworkGrid, number: int, meanwhile: Callable[[], object] = lambda: None) -> dict[str, object]:
    """Ask the site, and return its answer's values; they have to come before the deadline."""
    content = Payload({"number": number}, ARRAYS).to_content()
    (message_id,) = grid.push_messages([Message(content, grid.link.online()["here"], "train")])
    meanwhile()
    stop = time.monotonic() + DEADLINE
    while time.monotonic() < stop:
        grid.wait(0.5)
        for reply in grid.pull_messages([message_id]):
            assert not reply.has_error(), reply.error.reason
            payload = Payload.from_content(reply.content)
            assert set(payload.arrays) == set(ARRAYS)
            return dict(payload.values)
    raise AssertionError(f"message {number} was not answered within {DEADLINE:.0f} s")


@pytest.mark.parametrize("first", range(1, 25, 8))
def test_any_lost_answer_costs_a_retry(tmp_path: Path, first: int) -> None:
    """Each block of the coordinator's answers is lost in turn: of pulls, objects, confirmations and pushes."""
    with site_behind_proxy(tmp_path) as (grid, proxy, _):
        for lost in range(first, first + 8):
            proxy.withhold = proxy.answers + lost
            assert exchange(grid, lost) == {"got": {"number": lost}}


@pytest.mark.parametrize("how", ["reset", "stall", "drop"])
def test_short_cuts_at_random_moments_lose_nothing(tmp_path: Path, how: Cut) -> None:
    kits = tmp_path / "kit"
    provision(kits, "127.0.0.1:9092", ["here"])
    generator = random.Random(3)
    with site_behind_proxy(tmp_path, kits) as (grid, proxy, _):

        def cut() -> None:
            time.sleep(generator.uniform(0.0, 0.06))
            proxy.cut(how)
            time.sleep(generator.uniform(0.0, 0.3))
            proxy.heal()

        for number in range(6):
            assert exchange(grid, number, cut) == {"got": {"number": number}}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seconds"), [("stall", 10.0), ("drop", 10.0), ("reset", 20.0)])
def test_long_cuts_lose_nothing(tmp_path: Path, how: Cut, seconds: float) -> None:
    with site_behind_proxy(tmp_path) as (grid, proxy, _):

        def cut() -> None:
            time.sleep(0.02)
            proxy.cut(how)
            time.sleep(seconds)
            proxy.heal()

        assert exchange(grid, 1, cut) == {"got": {"number": 1}}
        assert exchange(grid, 2) == {"got": {"number": 2}}
