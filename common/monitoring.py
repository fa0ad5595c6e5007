"""Endpoints for monitoring a process: gRPC's health service, and Prometheus metrics over HTTP."""

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector, make_asgi_app
from prometheus_client.registry import Collector

from fedhead.addresses import is_loopback, listening_socket, split_address
from fedhead.errors import UserError
from fedhead.health import Health

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JOIN_SECONDS = 5.0
MOST_CONNECTIONS = 64


@dataclass(frozen=True)
class Monitoring:
    """Addresses of a process's endpoints.

    Attributes:
        health: `HOST:PORT` of gRPC's health service; empty for none.
        metrics: `HOST:PORT` of Prometheus metrics; empty for none.
        metrics_anywhere: whether other machines may read the metrics.
    """

    health: str = ""
    metrics: str = ""
    metrics_anywhere: bool = False

    @contextmanager
    def served(self, health: Health, metrics: Collector) -> Iterator[None]:
        """Serve both until the block ends.

        Raises:
            UserError: if an address cannot be used.
        """
        with (
            health.served(self.health) if self.health else nullcontext(),
            served_metrics(self.metrics, metrics, anywhere=self.metrics_anywhere) if self.metrics else nullcontext(),
        ):
            yield


@contextmanager
def served_metrics(address: str, collector: Collector, *, anywhere: bool = False) -> Iterator[int]:
    """Serve a collector's metrics and those of this process until the block ends; gives the port.

    Args:
        address: `HOST:PORT`; a loopback address unless `anywhere`.
        collector: gives the metrics at each request.
        anywhere: whether other machines may read them: they name sites and give scores.

    Raises:
        UserError: if the address is malformed, is not loopback, or is taken.
    """
    host, port = split_address(address)
    if not anywhere and not is_loopback(host):
        raise UserError(
            f"Other machines reach {host}, and could read the metrics, which name sites and give scores. Use "
            f"127.0.0.1:{port}, or add --metrics-anywhere."
        )
    try:
        listening = listening_socket(host, port, MOST_CONNECTIONS)
    except OSError as error:
        raise UserError(f"Metrics cannot be served on {host}:{port}: {error.strerror or error}.") from None
    port = listening.getsockname()[1]
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    config = uvicorn.Config(
        _MetricsApp(registry, anywhere=anywhere),
        interface="asgi3",
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="metrics", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(JOIN_SECONDS)
        listening.close()


class _MetricsApp:
    """Answers `GET /metrics`, under this machine's own names only: a web page cannot read it by a name that it chose.

    Args:
        registry: of the metrics.
        anywhere: whether any name will do.
    """

    def __init__(self, registry: CollectorRegistry, *, anywhere: bool) -> None:
        self._metrics = make_asgi_app(registry)
        self._anywhere = anywhere

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin1").rpartition(":")[0].strip("[]")
        if self._anywhere or is_loopback(host):
            if scope["path"] == "/metrics" and scope["method"] == "GET":
                await self._metrics(scope, receive, send)
                return
            status, text = 404, b"See /metrics.\n"
        else:
            status, text = 421, b"Metrics are served to this machine by its own names only.\n"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})
