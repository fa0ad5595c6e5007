"""Flower's Fleet API in the coordinator's process, and nothing else: what sites connect to.

A request is answered if it is a POST to one of the Fleet API's paths, says how long its body is, and is signed by a
registered key; all of that is decided by its headers, before any of the body is read. Each site has a link state of its
own, so that none can touch what is another's.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

import uvicorn
from flwr.app import Message

from fedhead.addresses import is_loopback
from fedhead.certificates import valid_until
from fedhead.errors import UserError
from fedhead.files import require_private
from fedhead.flower import (
    ACTIVATE,
    FLEET_PATH,
    MEDIA_TYPE,
    PROCESS_HEADER,
    PULL_MESSAGES,
    PUSH_OBJECT,
    SITE_HEADER,
    WAIT_HEADER,
    IdentityError,
    PackedContent,
    SiteLink,
    fleet_requests,
    in_process_identity,
    packing,
    proven_key,
    refusal,
)
from fedhead.server.provision import CoordinatorKit, check_site_name, expiry_warnings, fingerprint

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_BODY_BYTES = 2**20
MOST_OBJECT_BYTES = 2**28
"""Of a request, and of one that carries an object: the sums over 4,096 features take 2**26."""
MOST_HEAD_BYTES = 2**20
"""Of a request's line and headers, with what comes of the body in the same pieces."""
LONGEST_WAIT = 30.0
BODY_SECONDS = 120.0
"""How long a body may pause on its way."""
LARGE_OBJECT_BYTES = 2**20
"""From here on an object is checked in another thread, while others are answered."""
UNCONFIRMED_SECONDS = 10.0
"""After which a message that was pulled, and did not arrive, is delivered again to a site that asks for more."""
KEEP_SECONDS = 5.0
SAY_AGAIN_SECONDS = 60.0


@dataclass
class ConnectedSite:
    """A site as the network knows it.

    Attributes:
        link: its messages and state.
        address: it last came from.
        last_seen: when, by `time.time`; 0.0 before it was there.
        process: the id that its process gives itself, if it does.
        earlier_processes: those before.
    """

    link: SiteLink
    address: str = ""
    last_seen: float = 0.0
    process: bytes = b""
    earlier_processes: set[bytes] = field(default_factory=set)


class SuperLink:
    """Serves the Fleet API from a thread, while it is entered.

    Args:
        host: to listen on.
        port: to listen on; 0 for one that is free.
        kit: the coordinator's keys and registered sites; without it, connections are neither encrypted nor known, and
            only this machine may make them.

    Raises:
        UserError: if it cannot listen there, or the kit's certificate cannot be used.
    """

    def __init__(self, host: str, port: int, kit: CoordinatorKit | None = None) -> None:
        if kit is None and not is_loopback(host):
            raise UserError(
                f"Without a kit the coordinator listens on this machine alone (127.0.0.1 or ::1), not on {host!r}: "
                "nothing would be encrypted, and anyone could take part. fedhead provision makes a kit."
            )
        self._kit = kit
        context = _tls(kit, self._refused) if kit is not None else None
        self._socket = _listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        self._sites: dict[str, ConnectedSite] = {}
        self._by_key: dict[bytes, ConnectedSite] = {}
        self._by_node: dict[int, ConnectedSite] = {}
        self._revoked: Mapping[bytes, str] = {}
        self._changed = threading.Condition()
        self._answers = 0
        self._said: dict[str, float] = {}
        self._ending = threading.Event()
        self._failed: BaseException | None = None
        self._api = FleetApi(self)
        config = uvicorn.Config(
            self._api,
            interface="asgi3",
            http=_protocol(),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
        self._server = uvicorn.Server(config)
        self._threads = [
            threading.Thread(target=self._serve, name="superlink", daemon=True),
            threading.Thread(target=self._keep, name="superlink-keeper", daemon=True),
        ]
        self._closing = contextlib.ExitStack()
        self._registry_read = 0
        self._register()

    def __enter__(self) -> Self:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._closing.enter_context(in_process_identity(run_id=1))
        for thread in self._threads:
            thread.start()
        while not self._server.started and self._threads[0].is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._api.release(self._sites)
        self._server.should_exit = True
        for thread in self._threads:
            thread.join()
        self._socket.close()
        self._closing.close()

    @property
    def sites(self) -> Mapping[str, ConnectedSite]:
        """Every registered site, by name; without a kit, every one that came."""
        return dict(self._sites)

    def online(self) -> dict[str, int]:
        """Return the node ids of the sites that are there, by name."""
        return {name: site.link.node_id for name, site in sorted(self._sites.items()) if site.link.online}

    def named(self, node_id: int) -> ConnectedSite | None:
        """Return the site with a node id."""
        return self._by_node.get(node_id)

    def send(self, messages: list[Message]) -> list[str]:
        """Hold messages for their sites to pull; return an id for each, empty for a site that is not known."""
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
        """How many complete replies have come, of all sites."""
        return self._answers

    def wait_for_answer(self, seen: int, seconds: float) -> None:
        """Return once more than `seen` complete replies have come, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._answers > seen or self._failed is not None, seconds)

    def answered(self) -> None:
        """Take note of a complete reply."""
        with self._changed:
            self._answers += 1
            self._changed.notify_all()

    @property
    def ending(self) -> bool:
        """Whether it is being left."""
        return self._ending.is_set()

    # Who may connect.

    def identify(self, headers: Mapping[bytes, bytes], request_name: str, address: str) -> ConnectedSite:
        """Return the site that a request proves to be of.

        Raises:
            RefusedError: if it proves nothing, or nobody who is registered.
        """
        try:
            key = proven_key(headers)
        except IdentityError as error:
            raise self._refuse(401, f"a request from {address}", _IDENTITY[error.reason]) from None
        if self._kit is None and request_name == ACTIVATE:
            self._admit(headers.get(SITE_HEADER.encode(), b"").decode("latin1"), key)
        site = self._by_key.get(key)
        if site is None and self._kit is None:
            raise RefusedError(401, "The coordinator does not know this site yet; it has to activate its node.")
        if site is None:
            who = f"{self._revoked[key]} ({address})" if key in self._revoked else f"a site from {address}"
            why = "its key is revoked" if key in self._revoked else f"its key ({fingerprint(key)}) is not registered"
            raise self._refuse(412 if request_name == ACTIVATE else 401, who, why)
        claimed = headers.get(SITE_HEADER.encode(), b"").decode("latin1")
        if claimed not in ("", site.link.name):
            why = f"its key is registered as {site.link.name!r}, and its site.toml calls it {claimed[:64]!r}"
            raise self._refuse(412 if request_name == ACTIVATE else 401, f"a site from {address}", why)
        site.address = address
        site.last_seen = time.time()
        return site

    def _admit(self, name: str, key: bytes) -> None:
        """Let a site in that made its own key."""
        try:
            check_site_name(name)
        except UserError as error:
            raise self._refuse(412, "a site", f"it gives no name that can be used ({error})") from None
        known = self._sites.get(name)
        if known is not None and known.link.public_key != key:
            if known.link.online and time.time() - known.last_seen < LONGEST_WAIT:
                raise self._refuse(412, f"a second {name}", "a process that calls itself so is connected already")
            self._drop(known)
            known = None
        if known is None:
            self._add(name, key)

    def _add(self, name: str, key: bytes) -> None:
        site = ConnectedSite(SiteLink(key, name))
        self._sites[name] = self._by_key[key] = self._by_node[site.link.node_id] = site

    def _drop(self, site: ConnectedSite) -> None:
        del self._sites[site.link.name], self._by_key[site.link.public_key], self._by_node[site.link.node_id]

    def _register(self) -> None:
        """Read who is registered, where that has changed."""
        if self._kit is None:
            return
        changed = self._kit.registry.stat().st_mtime_ns
        if changed == self._registry_read:
            return
        kit = CoordinatorKit.read(self._kit.folder)
        self._registry_read = changed
        self._revoked = kit.revoked
        for name, site in list(self._sites.items()):
            if kit.sites.get(name) != site.link.public_key:
                logger.warning("%s is no longer registered, and is disconnected.", name)
                self._drop(site)
        for name, key in kit.sites.items():
            if name not in self._sites:
                self._add(name, key)

    def _refuse(self, status: int, who: str, why: str) -> "RefusedError":
        self._refused(f"Refused: {who}, since {why}.")
        return RefusedError(status, f"The coordinator refuses this site, since {why}.")

    def _refused(self, sentence: str) -> None:
        """Say once a minute, of each kind, who was refused."""
        now = time.monotonic()
        if len(self._said) > 1000:
            self._said.clear()
        if now - self._said.get(sentence, float("-inf")) > SAY_AGAIN_SECONDS:
            self._said[sentence] = now
            logger.warning("%s", sentence)

    # Threads.

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as error:
            self._failed = error
            raise

    def _keep(self) -> None:
        while not self._ending.wait(KEEP_SECONDS):
            for site in self.sites.values():
                site.link.keep_running()
            try:
                self._register()
            except (UserError, OSError) as error:
                self._refused(f"The register of sites cannot be read, so the last one stays: {error}")


class RefusedError(Exception):
    """A request is not answered."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.body = refusal(status, sentence)


class FleetApi:
    """The ASGI application: the Fleet API's paths, and 404 for everything else."""

    def __init__(self, link: SuperLink) -> None:
        self._link = link
        self._paths = {f"{FLEET_PATH}{name}".encode(): name for name in fleet_requests()}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: dict[str, set[asyncio.Event]] = {}
        self._uploads: dict[str, asyncio.Lock] = {}

    def release(self, names: Iterable[str]) -> None:
        """Let the pulls of these sites that are held look again; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._release, list(names))

    def _release(self, names: list[str]) -> None:
        for name in names:
            for held in self._held.get(name, ()):
                held.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self._loop = asyncio.get_running_loop()
        try:
            status, body = await self._answer(scope, receive)
        except RefusedError as error:
            status, body = error.status, error.body
        media_type = MEDIA_TYPE if status == 200 else b"application/json"
        headers = [(b"content-type", media_type), (b"content-length", str(len(body)).encode())]
        if status != 200:
            # What follows on this connection is perhaps a body that nobody reads.
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes]:
        name = self._paths.get(scope["raw_path"])
        if name is None or scope["method"] != "POST" or scope["query_string"]:
            raise RefusedError(404, "There is nothing here.")
        headers = _single(scope["headers"])
        address = scope["client"][0] if scope["client"] else "?"
        length = _length(headers, MOST_OBJECT_BYTES if name == PUSH_OBJECT else MOST_BODY_BYTES)
        if headers.get(b"content-type") != MEDIA_TYPE:
            raise RefusedError(415, f"The body must be {MEDIA_TYPE.decode()}.")
        site = self._link.identify(headers, name, address)
        # One large body at a time, so that a site cannot fill the memory with bodies that never end.
        turn = self._uploads.setdefault(site.link.name, asyncio.Lock()) if name == PUSH_OBJECT else _anyone()
        async with turn:
            body = await _read(receive, length)
            before = site.link.replies
            answered = await self._dispatch(site, name, headers, body, receive)
        if site.link.replies > before:
            self._link.answered()
        return answered

    async def _dispatch(
        self, site: ConnectedSite, name: str, headers: Mapping[bytes, bytes], body: bytes, receive: Receive
    ) -> tuple[int, bytes]:
        link = site.link
        if name == ACTIVATE:
            link.take_over()
        if name == PULL_MESSAGES:
            self._redeliver(site, headers.get(PROCESS_HEADER.encode(), b"")[:64])
            return await self._pull(site, body, _seconds(headers), receive)
        if len(body) > LARGE_OBJECT_BYTES:
            return await asyncio.to_thread(link.answer, name, body)
        return link.answer(name, body)

    def _redeliver(self, site: ConnectedSite, process: bytes) -> None:
        """Hold messages again that an earlier process of the site took with it, or that were lost on the way."""
        if process == site.process:
            site.link.deliver_again(UNCONFIRMED_SECONDS)
            return
        if process in site.earlier_processes:
            raise RefusedError(409, "Another process with this site's key has connected since, and took over.")
        if site.process:
            site.earlier_processes.add(site.process)
        site.process = process
        site.link.deliver_again()

    async def _pull(self, site: ConnectedSite, body: bytes, seconds: float, receive: Receive) -> tuple[int, bytes]:
        """Answer a pull once there is a message, or after `seconds`."""
        loop = asyncio.get_running_loop()
        stop = loop.time() + seconds
        gone = asyncio.ensure_future(_disconnected(receive))
        events = self._held.setdefault(site.link.name, set())
        try:
            while not gone.done():
                event = asyncio.Event()
                events.add(event)
                status, answer = site.link.answer(PULL_MESSAGES, body)
                left = stop - loop.time()
                if status != 200 or answer or left <= 0 or self._link.ending:
                    return status, answer
                released = asyncio.ensure_future(event.wait())
                await asyncio.wait({gone, released}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                released.cancel()
                events.discard(event)
                site.last_seen = time.time()
            return 200, b""
        finally:
            events.discard(event)
            gone.cancel()


@contextlib.asynccontextmanager
async def _anyone() -> AsyncIterator[None]:
    yield


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive, length: int) -> bytes:
    """Read a body of the length that was announced.

    Raises:
        RefusedError: if it does not come.
    """
    body = bytearray()
    more = True
    while more:
        try:
            event = await asyncio.wait_for(receive(), BODY_SECONDS)
        except TimeoutError:
            raise RefusedError(408, "The body did not come in time.") from None
        if event["type"] == "http.disconnect":
            raise RefusedError(400, "The connection was closed before all of the body had come.")
        body += event.get("body", b"")
        more = event.get("more_body", False)
        if len(body) > length:
            raise RefusedError(413, "The body is longer than it said.")
    return bytes(body)


def _single(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name.

    Raises:
        RefusedError: if one comes twice: which of them counts is a matter of taste, and proxies differ.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found:
            raise RefusedError(400, f"The header {name.decode('latin1')} comes twice.")
        found[name] = value
    return found


def _length(headers: Mapping[bytes, bytes], most: int) -> int:
    """Return how long the body is going to be.

    Raises:
        RefusedError: if it does not say, or is too long.
    """
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not (length.isdigit() and len(length) < 16):
        raise RefusedError(413, "The body must say how long it is.")
    if int(length) > most:
        raise RefusedError(413, f"The body must not be longer than {most} bytes.")
    return int(length)


def _seconds(headers: Mapping[bytes, bytes]) -> float:
    """Return for how long a pull may be held."""
    asked = headers.get(WAIT_HEADER.encode(), b"")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() and len(asked) < 6 else 0.0


_IDENTITY = {
    "unsigned": "it is not signed by a site's key",
    "clock": "it was signed at another time: the two clocks differ by minutes; set them (NTP)",
    "forged": "its signature is not of the key that it shows",
}
_HANDSHAKES = {
    "HTTP_REQUEST": "it spoke plain HTTP; sites connect with TLS, with the kit that fedhead provision made for them",
    "UNKNOWN_CA": "it does not trust this coordinator's certificate: the site has the kit of another coordinator",
    "CERTIFICATE_EXPIRED": "it finds this coordinator's certificate expired, or its clock is wrong; "
    "fedhead provision --renew makes a new one",
    "BAD_CERTIFICATE": "it does not accept this coordinator's certificate, perhaps since it connects to another name "
    "than the certificate has; fedhead provision --renew --also NAME adds one",
}


def _tls(kit: CoordinatorKit, say: Callable[[str], None]) -> ssl.SSLContext:
    """Return a context that shows the kit's certificate, and tells why handshakes fail.

    Raises:
        UserError: if the certificate has expired, or cannot be used.
    """

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except ssl.SSLError as error:
                reason = next((why for part, why in _HANDSHAKES.items() if part in (error.reason or "")), None)
                if reason is not None:
                    say(f"Refused: a connection, since {reason}.")
                raise

    if valid_until(kit.certificate) < datetime.now(UTC):
        raise UserError(" ".join(expiry_warnings(kit)))
    require_private(kit.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(kit.certificate, kit.key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{kit.certificate} and {kit.key} cannot be used together ({error}).") from None
    context.sslobject_class = Handshake
    return context


def _protocol() -> "type[asyncio.Protocol] | Literal['h11']":
    """Return what parses requests: httptools with a limit on a request's head, where it is there; h11 has its own."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

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
                if self.head > MOST_HEAD_BYTES:
                    self.transport.abort()
                    return
            super().data_received(data)

    return BoundedHead


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: if it cannot.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        opened = socket.socket(family, kind)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(2048)
        except BaseException:
            opened.close()
            raise
    except OSError as error:
        raise UserError(
            f"The coordinator cannot listen on {host}:{port}: {error.strerror}. Is another one running there? --port, "
            "or listen in coordinator.toml, names another."
        ) from None
    return opened
