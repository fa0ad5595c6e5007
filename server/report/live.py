"""The report during a run: served on this machine, and kept up to date in the browser."""

import logging
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedhead.addresses import is_loopback, listening_socket, split_address
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.server.observer import Observer, Phase, SiteState, Step
from fedhead.server.report.page import render, resource
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.runs.record import RunRecord

FAREWELL_SECONDS = 4.0
"""Longest wait at the end of a run for open pages to show it."""

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


class LivePage(Observer):
    """Serves a run's report while entered, in a separate thread.

    A page is rendered from the run folder only when a browser requests it, so that a run without viewers loses no
    time. When the run ends, open pages show its end; then the server stops.

    Args:
        address: `HOST:PORT`; a loopback address unless `anywhere`.
        anywhere: whether other machines may read the page, which shows everything in the run folder except the sums.

    Raises:
        UserError: if the address is invalid, not loopback, or in use.
        UserError: if the address is none, is not loopback, or is taken.
    """

    def __init__(self, address: str, *, anywhere: bool = False) -> None:
        host, port = split_address(address)
        if not anywhere and not is_loopback(host):
            raise UserError(
                f"{host} can be reached from other machines, and anyone there could read the page. Serve it on "
                f"127.0.0.1:{port} (from elsewhere: ssh -L {port}:127.0.0.1:{port} HOST), or add --dashboard-anywhere."
            )
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._hosts = None if anywhere else {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self._run_dir: Path | None = None
        self._version = 0
        self._ended = False
        self._asked = 0.0
        self._shown = 0
        routes = [Route("/", self._page), Route("/live.js", self._script), Route("/state", self._state)]
        options = uvicorn.Config(
            Starlette(routes=routes), log_config=None, access_log=False, lifespan="off", ws="none", server_header=False
        )
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="dashboard", daemon=True
        )

    @property
    def url(self) -> str:
        """The page's URL on this machine."""
        return f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        self._version += 1
        stop = time.monotonic() + FAREWELL_SECONDS
        watched = time.monotonic() - self._asked < FAREWELL_SECONDS
        while watched and self._shown < self._version and time.monotonic() < stop:
            time.sleep(0.05)
        self._server.should_exit = True
        self._thread.join(FAREWELL_SECONDS)
        self._socket.close()

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._version += 1

    def on_step(self, step: Step, server_round: int) -> None:
        self._version += 1

    def on_phase(self, phase: Phase) -> None:
        self._version += 1

    def on_sites(self, sites: Mapping[str, SiteState]) -> None:
        self._version += 1

    def on_round(self, finished: Round) -> None:
        self._version += 1

    def on_finished(self, outcome: Outcome) -> None:
        self._version += 1

    def on_failed(self, error: BaseException) -> None:
        self._version += 1

    def _refused(self, request: Request) -> Response | None:
        """Reject host names that a foreign page resolved to this machine."""
        self._asked = time.monotonic()
        if self._hosts is None or request.headers.get("host", "") in self._hosts:
            return None
        return PlainTextResponse(
            "This page is served to this machine under its own name only.\n", status_code=421, headers=_HEADERS
        )

    def _page(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        version = self._version
        try:
            record = RunRecord.read(self._run_dir) if self._run_dir else _NOT_STARTED
            page = render(record, live=True)
        except FedheadError as error:
            return PlainTextResponse(f"{error}\n", status_code=503, headers=_HEADERS)
        self._shown = version
        return HTMLResponse(page, headers=_HEADERS)

    def _script(self, request: Request) -> Response:
        script = Response(resource("live.js"), media_type="text/javascript", headers=_HEADERS)
        return self._refused(request) or script

    def _state(self, request: Request) -> Response:
        state: dict[str, Any] = {"version": self._version, "ended": self._ended}
        return self._refused(request) or JSONResponse(state, headers=_HEADERS)


_NOT_STARTED = RunRecord(name="not started", config={}, toml="")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listening_socket(host, port, 64)
    except OSError as error:
        raise UserError(
            f"The page cannot be served on {host}:{port}: {error.strerror or error}. Choose another port, or stop "
            "the process that uses it."
        ) from None
