"""Flower's Fleet API in the coordinator's process, and nothing else: the server that sites connect to.

Each site has a link state of its own, so that none can touch what belongs to another.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Self

import uvicorn
from flwr.app import Message

from fedhead.addresses import is_loopback
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.flower.messages import PackedContent, packing
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.api import FleetApi
from fedhead.server.network.connections import Connections
from fedhead.server.network.limits import ConnectionLimits, raise_file_limit
from fedhead.server.network.listening import Listener, listen, protocol
from fedhead.server.network.site_registry import ConnectedSite, SiteRegistry
from fedhead.server.network.tls import server_context
from fedhead.threads import LastingThread

KEEP_SECONDS = 5.0
"""Time between looks at the register of sites."""


class SuperLink:
    """Serves the Fleet API from a thread, while it is entered.

    Args:
        host: to listen on.
        port: to listen on; 0 for a free one.
        kit: the coordinator's keys and registered sites; without it, connections are neither encrypted nor
            authenticated, and only this machine may make them.

    Raises:
        UserError: if it cannot listen there, or the kit's certificate cannot be used.
    """

    def __init__(self, host: str, port: int, kit: CoordinatorKit | None = None) -> None:
        if kit is None and not is_loopback(host):
            raise UserError(
                f"Without a kit the coordinator listens on this machine alone (127.0.0.1 or ::1), not on {host!r}: "
                "nothing would be encrypted, and anyone could take part. fedhead provision makes a kit."
            )
        self._registry = SiteRegistry(kit)
        self._context = server_context(kit, self._registry.log_refusal) if kit is not None else None
        self._limits = kit.connections if kit is not None else ConnectionLimits()
        self._socket = listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        self._changed = threading.Condition()
        self._answers = 0
        self._complete: set[str] = set()
        self._ending = threading.Event()
        self._api = FleetApi(self._registry, self._note_replies)
        self._server: Listener | None = None
        self._threads = [LastingThread(self._serve, "superlink"), LastingThread(self._keep, "superlink-keeper")]
        self._closing = contextlib.ExitStack()

    def _listener(self) -> Listener:
        files = raise_file_limit()
        config = uvicorn.Config(
            self._api,
            interface="asgi3",
            http=protocol(),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        connections = Connections(self._limits.within(files), files * 3 // 4, self._registry.log_refusal)
        return Listener(config, self._context, connections)

    def __enter__(self) -> Self:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._closing.enter_context(in_process_identity(run_id=1))
        for thread in self._threads:
            thread.start()
        while self._server is None or not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.end()
        self._ending.set()
        self._api.ending = True
        self._api.release(self.sites)
        if self._server is not None:
            self._server.should_exit = True
        for thread in self._threads:
            thread.join()
        self._socket.close()
        self._closing.close()

    @property
    def sites(self) -> Mapping[str, ConnectedSite]:
        """Every registered site by name; without a kit, every site that ever connected."""
        return self._registry.sites

    def online(self) -> dict[str, int]:
        """Return the node ids of the connected sites, by name."""
        return {name: site.link.node_id for name, site in sorted(self.sites.items()) if site.link.online}

    def named(self, node_id: int) -> ConnectedSite | None:
        """Return the site with a node id."""
        return self._registry.with_node(node_id)

    def send(self, messages: list[Message]) -> list[str]:
        """Hold messages for their sites to pull; return an id for each, empty for an unknown site."""
        packed: dict[int, PackedContent] = {}
        ids = []
        with packing():
            for message in messages:
                site = self.named(message.metadata.dst_node_id)
                key = id(message.content)
                if key not in packed:
                    packed[key] = PackedContent.of(message.content)
                ids.append((site and site.link.send(message, packed[key])) or "")
                if site is not None:
                    self._api.release([site.link.name])
        return ids

    @property
    def answers(self) -> int:
        """Number of complete replies from all sites."""
        return self._answers

    def wait_for_answer(self, seen: int, seconds: float) -> None:
        """Return once more than `seen` complete replies have come, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._answers > seen, seconds)

    def replied(self, message_ids: Iterable[str]) -> list[str]:
        """Return those of these messages whose replies are complete."""
        with self._changed:
            return [message_id for message_id in message_ids if message_id in self._complete]

    def take(self, node_id: int, message_id: str) -> Message | None:
        """Return the complete reply to a message, and forget both; None if there is none."""
        # Before the look: a reply that becomes complete meanwhile is noted again.
        self._complete.discard(message_id)
        site = self.named(node_id)
        return site.link.take(message_id) if site is not None else None

    def forget(self, node_id: int, message_id: str) -> None:
        """Drop a message and its reply."""
        site = self.named(node_id)
        if site is not None:
            site.link.forget(message_id)
        self._complete.discard(message_id)

    def _note_replies(self, message_ids: list[str]) -> None:
        with self._changed:
            self._complete.update(message_ids)
            self._answers += len(message_ids)
            self._changed.notify_all()

    def _serve(self) -> None:
        # The server closes its socket at its end, and another one may have to take over.
        self._server = self._listener()
        if self._ending.is_set():
            return
        self._server.run(sockets=[self._socket.dup()])

    def _keep(self) -> None:
        while not self._ending.wait(KEEP_SECONDS):
            for site in list(self.sites.values()):
                site.link.keep_running()
            try:
                self._registry.refresh()
            except (UserError, OSError) as error:
                self._registry.log_refusal(f"The register of sites cannot be read, so the last one stays: {error}")
