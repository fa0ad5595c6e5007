"""A run on a network, from the socket to the run folder."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.health import Health
from fedhead.server.app import coordinate
from fedhead.server.history import Outcome
from fedhead.server.network_grid import NetworkGrid
from fedhead.server.observer import Observer
from fedhead.server.provision import CoordinatorKit, expiry_warnings
from fedhead.server.run_folder import RunFolder
from fedhead.server.status import RunStatus
from fedhead.server.superlink import SuperLink

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.2


def serve(
    config: RunConfig,
    link: SuperLink,
    *,
    kit: CoordinatorKit | None = None,
    out: Path | None = None,
    resume: bool = False,
    health: str = "",
    shown: Callable[[RunStatus], AbstractContextManager[object]] = lambda status: nullcontext(),
    observers: Sequence[Observer] = (),
) -> tuple[Outcome, RunFolder]:
    """Run `config` over the sites that connect to `link`.

    Args:
        config: the run.
        link: not entered yet.
        kit: whose certificates are warned about before they expire.
        out: the run folder; by default a new one under `runs/`.
        resume: whether to go on with the run in `out`.
        health: `HOST:PORT` of a gRPC health service, if any.
        shown: shows how the run stands, while it is entered.
        observers: are told of what happens.

    Raises:
        UserError: if something asked for does not exist or does not fit.
        FedheadError: if the run fails.
    """
    for sentence in expiry_warnings(kit) if kit is not None else ():
        logger.warning("%s", sentence)
    state = Health()
    with link, state.served(health) if health else nullcontext():
        status = RunStatus(link)
        gathering = Gathering(link, status)
        state.serving(True)
        with shown(status):
            return coordinate(config, NetworkGrid(link), out, resume=resume, observers=[status, gathering, *observers])


class Gathering(Observer):
    """Holds a run back at its start until enough sites are connected.

    Args:
        link: what they connect to.
        told: is told of the wait.
    """

    def __init__(self, link: SuperLink, told: Observer) -> None:
        self._link = link
        self._told = told

    def on_started(self, config: RunConfig, run_dir: Path | None) -> None:
        """Wait for the sites.

        Raises:
            FedheadError: if they do not come within the deadline of an exchange.
        """
        stop = time.monotonic() + config.round_deadline
        said = -1
        while len(online := self._link.online()) < config.min_sites:
            if time.monotonic() > stop:
                raise FedheadError(f"{_so_far(online, config)} after {config.round_deadline:.0f} s.")
            if len(online) != said:
                self._told.on_waiting(f"{_so_far(online, config)} so far.")
                logger.info("%s so far.", _so_far(online, config))
                said = len(online)
            time.sleep(GATHER_SECONDS)


def _so_far(online: Mapping[str, int], config: RunConfig) -> str:
    names = f" ({', '.join(online)})" if online else ""
    return f"{len(online)} of the {config.min_sites} sites that the run needs are connected{names}"
