"""The ASGI application that answers sites: the Fleet API's paths, and 404 for everything else.

A request is answered if it is a POST to one of the Fleet API's paths, announces its length, and is signed by a
registered key. Its headers decide all of that before any of the body is read.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping

from fedhead.flower.fleet_api import ACTIVATE, DEACTIVATE, FLEET_PATH, MEDIA_TYPE, PULL_MESSAGES, PUSH_OBJECT, REQUESTS
from fedhead.flower.fleet_client import COUNTS_HEADER, PROCESS_HEADER
from fedhead.server.network.listening import CONNECTION
from fedhead.server.network.requests import (
    MAX_BODY_BYTES,
    MAX_OBJECT_BYTES,
    Receive,
    RefusedError,
    Scope,
    Send,
    body_length,
    disconnected,
    hold_seconds,
    inline_bytes,
    read_body,
    single_headers,
)
from fedhead.server.network.site_registry import ConnectedSite, SiteRegistry

LARGE_OBJECT_BYTES = 2**20
"""From this size on an object is checked in another thread, while other requests are answered."""


_COUNTS = (COUNTS_HEADER.encode(), b"1")


class FleetApi:
    """The ASGI application.

    Args:
        registry: the sites that may connect.
        on_replies: called with the ids of messages whose replies became complete.
    """

    def __init__(self, registry: SiteRegistry, on_replies: Callable[[list[str]], None]) -> None:
        self._registry = registry
        self._on_replies = on_replies
        self._paths = {f"{FLEET_PATH}{name}".encode(): name for name in REQUESTS}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: dict[str, asyncio.Event] = {}
        self._uploads: dict[str, asyncio.Future[bytes]] = {}
        self.ending = False

    def release(self, names: Iterable[str]) -> None:
        """Let the held pulls of these sites look for messages again; callable from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._release, list(names))

    def _release(self, names: list[str]) -> None:
        for name in names:
            if (held := self._held.get(name)) is not None:
                held.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self._loop = asyncio.get_running_loop()
        try:
            status, body = await self._answer(scope, receive)
        except RefusedError as error:
            status, body = error.status, error.body
        media_type = MEDIA_TYPE if status == 200 else b"application/json"
        headers = [(b"content-type", media_type), (b"content-length", str(len(body)).encode()), _COUNTS]
        if status != 200:
            # An unread body may follow on this connection.
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes]:
        name = self._paths.get(scope["raw_path"])
        if name is None or scope["method"] != "POST" or scope["query_string"]:
            raise RefusedError(404, "There is nothing here.")
        headers = single_headers(scope["headers"])
        address = scope["client"][0] if scope["client"] else "?"
        length = body_length(headers, MAX_OBJECT_BYTES if name == PUSH_OBJECT else MAX_BODY_BYTES)
        if headers.get(b"content-type") != MEDIA_TYPE:
            raise RefusedError(415, f"The body must be {MEDIA_TYPE.decode()}.")
        site, sent = self._registry.identify(headers, scope["raw_path"].decode("latin1"), name, address)
        scope["state"][CONNECTION].proves(site.link.name)
        reading = read_body(receive, length)
        body = await (self._newest_upload(site, reading) if name == PUSH_OBJECT else reading)
        if not (await asyncio.to_thread(sent.covers, body) if len(body) > LARGE_OBJECT_BYTES else sent.covers(body)):
            raise RefusedError(400, "The body is not the one that was signed.")
        answered = await self._dispatch(site, name, headers, body, receive)
        if completed := site.link.take_completed():
            self._on_replies(completed)
        return answered

    async def _newest_upload(self, site: ConnectedSite, reading: Coroutine[None, None, bytes]) -> bytes:
        """Read an object and give up an earlier one of the site that is still being read.

        A site pushes one object at a time, so the connection of the earlier one is lost. Holding one body for each
        site also keeps bodies that never end from filling the memory.

        Raises:
            RefusedError: if a newer one comes before all of this one has arrived.
        """
        name, this = site.link.name, asyncio.ensure_future(reading)
        if (earlier := self._uploads.get(name)) is not None:
            earlier.cancel()
        self._uploads[name] = this
        try:
            await asyncio.wait({this})
            if this.cancelled():
                raise RefusedError(408, "The site has pushed another object since.")
            return this.result()
        finally:
            this.cancel()
            if self._uploads.get(name) is this:
                del self._uploads[name]

    async def _dispatch(
        self, site: ConnectedSite, name: str, headers: Mapping[bytes, bytes], body: bytes, receive: Receive
    ) -> tuple[int, bytes]:
        link = site.link
        if name == ACTIVATE:
            link.take_over()
        if name == PULL_MESSAGES:
            process = headers.get(PROCESS_HEADER.encode(), b"")[:64]
            self._note_process(site, process)
            link.note_alive()
            return await self._pull(site, headers, body, receive, sequential=bool(process))
        if name == DEACTIVATE and (held := self._held.pop(link.name, None)) is not None:
            held.set()
        if len(body) > LARGE_OBJECT_BYTES:
            return await asyncio.to_thread(link.answer, name, body)
        return link.answer(name, body)

    def _note_process(self, site: ConnectedSite, process: bytes) -> None:
        """Hold messages again that an earlier process of the site took with it.

        Raises:
            RefusedError: if the process is an earlier one itself.
        """
        if process == site.process:
            return
        if process in site.earlier_processes:
            raise RefusedError(409, "Another process with this site's key has connected since, and took over.")
        if site.process:
            site.earlier_processes.append(site.process)
        site.process = process
        site.link.deliver_again()

    async def _pull(
        self, site: ConnectedSite, headers: Mapping[bytes, bytes], body: bytes, receive: Receive, *, sequential: bool
    ) -> tuple[int, bytes]:
        """Answer a pull once there is a message, or after the time it names, or when the site pulls again."""
        loop = asyncio.get_running_loop()
        stop, room = loop.time() + hold_seconds(headers), inline_bytes(headers)
        gone = asyncio.ensure_future(disconnected(receive))
        look = asyncio.Event()
        gone.add_done_callback(lambda _: look.set())
        if (earlier := self._held.get(site.link.name)) is not None:
            earlier.set()
        self._held[site.link.name] = look
        try:
            while not gone.done() and self._held.get(site.link.name) is look:
                look.clear()
                due = site.link.deliver_due(sequential)
                status, answer = site.link.answer(PULL_MESSAGES, body, room)
                left = stop - loop.time()
                if (answer or left <= 0) and site.link.online:
                    site.link.note_alive()
                if status != 200 or answer or left <= 0 or self.ending:
                    return status, answer
                timer = loop.call_later(min(left, due), look.set)
                await look.wait()
                timer.cancel()
                site.last_seen = time.time()
            return 200, b""
        finally:
            if self._held.get(site.link.name) is look:
                del self._held[site.link.name]
            gone.cancel()
