"""Checks of an HTTP request before anything is done for its sender."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from fedhead.flower.fleet_api import refusal
from fedhead.flower.fleet_client import EXTRACTED_HEADER, WAIT_HEADER
from fedhead.flower.inline import INLINE_HEADER, MOST_INLINE_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 2**20
"""Limit on the body of a request that carries no object."""
MAX_OBJECT_BYTES = 2**28
"""Limit on the body of a request that carries an object; the sums over 4,096 features take 2**26 bytes."""
MAX_HOLD_SECONDS = 30.0
"""Longest time for which a pull is held."""
BODY_SECONDS = 120.0
"""Longest pause within a body."""


class RefusedError(Exception):
    """A request is refused, with an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.body = refusal(status, sentence)


def single_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name.

    Raises:
        RefusedError: if one comes twice; proxies disagree on which of them counts.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found:
            raise RefusedError(400, f"The header {name.decode('latin1')} comes twice.")
        found[name] = value
    return found


def body_length(headers: Mapping[bytes, bytes], limit: int) -> int:
    """Return the announced length of the body.

    Raises:
        RefusedError: if none is announced, or it is above `limit`.
    """
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not (length.isdigit() and len(length) < 16):
        raise RefusedError(413, "The body must say how long it is.")
    if int(length) > limit:
        raise RefusedError(413, f"The body must not be longer than {limit} bytes.")
    return int(length)


def hold_seconds(headers: Mapping[bytes, bytes]) -> float:
    """Return for how long a pull may be held."""
    asked = headers.get(WAIT_HEADER.encode(), b"")
    return min(float(asked), MAX_HOLD_SECONDS) if asked.isdigit() and len(asked) < 6 else 0.0


def inline_bytes(headers: Mapping[bytes, bytes]) -> int:
    """Return how many bytes of objects the answer to a pull may carry."""
    asked = headers.get(INLINE_HEADER.encode(), b"")
    return min(int(asked), MOST_INLINE_BYTES) if asked.isdigit() and len(asked) < 10 else 0


def extracted_rows(headers: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    """Return how many of how many rows a site has extracted features of, as it says; None if it says nothing valid."""
    said = re.fullmatch(rb"([0-9]{1,12})/([0-9]{1,12})", headers.get(EXTRACTED_HEADER.encode(), b""))
    done, rows = (int(said[1]), int(said[2])) if said else (1, 0)
    return (done, rows) if done <= rows else None


async def read_body(receive: Receive, length: int) -> bytes:
    """Read a body of the announced length.

    Raises:
        RefusedError: if it does not arrive, or is longer.
    """
    body = bytearray()
    more = True
    while more:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                event = await receive()
        except TimeoutError:
            raise RefusedError(408, "The body did not come in time.") from None
        if event["type"] == "http.disconnect":
            raise RefusedError(400, "The connection was closed before all of the body had come.")
        body += event.get("body", b"")
        more = event.get("more_body", False)
        if len(body) > length:
            raise RefusedError(413, "The body is longer than it said.")
    return bytes(body)


async def disconnected(receive: Receive) -> None:
    """Return once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
