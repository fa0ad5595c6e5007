"""A run on a network, from the socket to the run folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.health import Health
from fedhead.monitoring import Monitoring
from fedhead.server.app import coordinate, with_classes
from fedhead.server.kit import CoordinatorKit, expiry_warnings
from fedhead.server.metrics import RunMetrics
from fedhead.server.network.grid import NetworkGrid
from fedhead.server.network.superlink import SuperLink
from fedhead.server.observer import Observer
from fedhead.server.queue import RunQueue
from fedhead.server.runs.result import CompletedRun
from fedhead.server.status import RunStatus
from fedhead.wording import counted

logger = logging.getLogger(__name__)

Shown = Callable[[RunStatus], AbstractContextManager[object]]
"""Shows how a run stands, while it is entered."""


def serve(
    config: RunConfig,
    link: SuperLink,
    *,
    kit: CoordinatorKit | None = None,
    out: Path | None = None,
    resume: bool = False,
    monitoring: Monitoring | None = None,
    shown: Shown = lambda status: nullcontext(),
    observers: Sequence[Observer] = (),
) -> CompletedRun:
    """Run `config` over the sites that connect to `link`.

    Args:
        config: the run.
        link: not entered yet.
        kit: whose certificates are warned about before they expire.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to resume the run in `out`.
        monitoring: its endpoints, if any.
        shown: a context that shows the state of the run.
        observers: notified of the run's events.

    Raises:
        UserError: if something asked for does not exist or does not fit.
        FedheadError: if the run fails.
    """
    # Before any site sees that there is a coordinator.
    config = with_classes(config if kit is None else kit.completed(config))
    with NetworkRuns(link, kit, monitoring) as runs:
        return runs.run(config, out, resume=resume, shown=shown, observers=observers)


class NetworkRuns:
    """Runs configurations one after another over the sites that connect to a SuperLink, while it is entered.

    Args:
        link: not entered yet.
        kit: whose certificates are warned about before they expire.
        monitoring: the process's endpoints, if any.
    """

    def __init__(
        self, link: SuperLink, kit: CoordinatorKit | None = None, monitoring: Monitoring | None = None
    ) -> None:
        self._link = link
        self._kit = kit
        self._monitoring = monitoring or Monitoring()
        self._status: RunStatus | None = None
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        for sentence in expiry_warnings(self._kit) if self._kit is not None else ():
            logger.warning("%s", sentence)
        state = Health()
        with ExitStack() as opened:
            opened.enter_context(self._link)
            opened.enter_context(self._monitoring.served(state, RunMetrics(self._snapshot)))
            self._closing = opened.pop_all()
        state.serving(True)
        known = counted(len(self._kit.sites), "registered site") if self._kit is not None else "sites of this machine"
        logger.info("Listening on %s:%d for %s.", self._link.host, self._link.port, known)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def run(
        self,
        config: RunConfig,
        out: Path | None = None,
        *,
        resume: bool = False,
        shown: Shown = lambda status: nullcontext(),
        observers: Sequence[Observer] = (),
    ) -> CompletedRun:
        """Run a configuration; see `serve`."""
        config = with_classes(config if self._kit is None else self._kit.completed(config))
        grid = NetworkGrid(self._link)
        status = self._status = RunStatus(self._link, grid.outstanding)
        try:
            with shown(status):
                members = self._kit.members if self._kit is not None else None
                return coordinate(config, grid, out, resume=resume, observers=[status, *observers], members=members)
        finally:
            grid.forget_all()

    def run_queue(
        self,
        queue: RunQueue,
        read: Callable[[Path], RunConfig],
        *,
        shown: Shown = lambda status: nullcontext(),
        observers: Sequence[Observer] = (),
    ) -> None:
        """Run every file that is in a queue or comes there, until the process is asked to end.

        Args:
            queue: of files.
            read: returns the configuration in a file.
            shown: a context that shows the state of a run.
            observers: notified of each run's events.
        """

        def one(config: RunConfig, out: Path, resume: bool) -> None:
            try:
                self.run(config, out, resume=resume, shown=shown, observers=observers)
            except SystemExit:
                if self._status is None or not self._status.stop_asked:
                    raise
                raise FedheadError("It was stopped; moved back into the queue, it is resumed.") from None

        queue.serve(read, one)

    def _snapshot(self) -> Mapping[str, Any] | None:
        return self._status.snapshot() if self._status is not None else None
