"""A TCP proxy on this machine that cuts the network between a coordinator and a site."""

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from typing import Literal, Self

Cut = Literal["reset", "stall", "drop"]
_BLOCK = 2**16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing the socket resets the connection."""


class CuttingProxy:
    """Forwards connections to a port of this machine while it is entered, until the network is cut.

    Args:
        target: the port to forward to.

    Attributes:
        port: the port that it listens on.
        answers: number of blocks that came from the target, including withheld ones.
        withhold: the number of the block of an answer, from 1, at which the connection is reset instead; 0 for none.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.answers = 0
        self.withhold = 0
        self._cut: Cut | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="cutting-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._socket.close()

    def cut(self, how: Cut) -> None:
        """Cut the network.

        Args:
            how: `reset` closes all connections and refuses new ones; `stall` keeps everything that is sent until the
                network is whole again, as a short outage does; `drop` loses it, as a longer one does.
        """
        asyncio.run_coroutine_threadsafe(self._cut_now(how), self._loop).result()

    def heal(self) -> None:
        """Make the network whole again."""
        asyncio.run_coroutine_threadsafe(self._heal_now(), self._loop).result()

    async def _cut_now(self, how: Cut) -> None:
        self._cut = how
        self._whole.clear()
        if how == "reset":
            self._reset_all()

    async def _heal_now(self) -> None:
        if self._cut == "drop":
            self._reset_all()
        self._cut = None
        self._whole.set()

    def _reset_all(self) -> None:
        for connection in list(self._connections):
            _reset(connection)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._whole.set()
        self._loop.run_until_complete(asyncio.start_server(self._accept, sock=self._socket))
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut == "reset":
            _reset(writer)
            return
        self._connections.add(writer)
        await self._whole.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self._connections.discard(writer)
            _reset(writer)
            return
        self._connections.add(back)
        both = (asyncio.ensure_future(self._copy(reader, back)), asyncio.ensure_future(self._copy(there, writer, True)))
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for each in (writer, back):
                self._connections.discard(each)
                each.close()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool = False) -> None:
        with suppress(OSError):
            while block := await source.read(_BLOCK):
                if answers:
                    self.answers += 1
                    if self.answers == self.withhold:
                        _reset(sink)
                        return
                await self._whole.wait()
                sink.write(block)
                await sink.drain()


def _reset(connection: asyncio.StreamWriter) -> None:
    opened = connection.get_extra_info("socket")
    if opened is not None:
        with suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.transport.abort()
