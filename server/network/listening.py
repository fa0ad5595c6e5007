"""The coordinator's listening socket, its acceptance of connections, and the protocol that parses their requests."""

import asyncio
import errno
import logging
import socket
import ssl
from typing import Any

import uvicorn

from fedhead.addresses import listening_socket
from fedhead.errors import UserError
from fedhead.server.network.connections import Connection, Connections

logger = logging.getLogger(__name__)

CONNECTION = "connection"
"""Key of a request's `Connection` in the state of its ASGI scope."""
RETRY_SECONDS = 0.2
"""Time before the next connection is accepted, after one that could not be."""
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

MAX_HEAD_BYTES = 2**20
"""Limit on a request's line and headers, together with the parts of the body that arrive in the same pieces."""


def protocol() -> type[asyncio.Protocol]:
    """Return a protocol that parses requests, bounds their heads, and notes the end of its connection.

    httptools is used where it is installed, with a limit on a request's head; h11 has its own.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        class Counted(H11Protocol):
            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                self.app_state[CONNECTION].leave()

        return Counted

    class BoundedHead(HttpToolsProtocol):
        """Hangs up on a request whose head does not end; the parser would keep all of it."""

        head: int | None = 0

        def on_message_begin(self) -> None:
            self.head = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.head = None
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self.head is not None:
                self.head += len(data)
                if self.head > MAX_HEAD_BYTES:
                    self.transport.abort()
                    return
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.app_state[CONNECTION].leave()

    return BoundedHead


class Listener(uvicorn.Server):
    """Uvicorn's server, but it knows each connection from the moment of its acceptance, before the TLS handshake.

    Args:
        config: of the server.
        context: for TLS; None is plain HTTP.
        connections: counts them, and chooses those that give way.
    """

    def __init__(self, config: uvicorn.Config, context: ssl.SSLContext | None, connections: Connections) -> None:
        super().__init__(config)
        self.servers: list[Any] = []
        self._context = context
        self._connections = connections
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        for listening in sockets or []:
            listening.setblocking(False)
            self._begin(self._accept(listening))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and close those that are open."""
        for task in list(self._opening):
            task.cancel()
        await super().shutdown(sockets)

    def _begin(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listening)
            except ConnectionError:
                # The peer closed the connection before it was accepted.
                await asyncio.sleep(0)
                continue
            except OSError as error:
                logger.debug("A connection cannot be accepted: %s.", error)
                if error.errno in _NO_RESOURCES:
                    self._connections.make_room()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            connection = self._connections.open(str(address[0]))
            if connection is None:
                accepted.close()
            else:
                opening = self._begin(self._open(accepted, connection))
                connection.hang_up = opening.cancel
                loop.call_later(self._connections.limits.first_request_seconds, self._connections.late, connection)
            # Handshakes continue while others connect.
            await asyncio.sleep(0)

    async def _open(self, accepted: socket.socket, connection: Connection) -> None:
        """Complete the handshake of a connection, from then on its protocol answers requests."""

        def speak() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state={CONNECTION: connection}
            )
            return made

        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                speak,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._connections.limits.handshake_seconds if self._context else None,
            )
        # The peer is gone, was too slow, speaks no TLS, or gave way to another.
        except (Exception, asyncio.CancelledError):
            connection.leave()
            return
        connection.hang_up = transport.abort


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: if it cannot.
    """
    try:
        return listening_socket(host, port, 2048)
    except OSError as error:
        raise UserError(
            f"The coordinator cannot listen on {host}:{port}: {error.strerror}. Is another one running there? --port, "
            "or listen in coordinator.toml, names another."
        ) from None
