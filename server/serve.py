"""A run on a network, from the socket to the run folder."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fedhead.config import RunConfig
from fedhead.health import Health
from fedhead.server.app import coordinate, with_classes
from fedhead.server.history import Outcome
from fedhead.server.network_grid import NetworkGrid
from fedhead.server.observer import Observer
from fedhead.server.provision import CoordinatorKit, expiry_warnings
from fedhead.server.run_folder import RunFolder
from fedhead.server.status import RunStatus
from fedhead.server.superlink import SuperLink

logger = logging.getLogger(__name__)


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
    # Before any site sees that there is a coordinator.
    config = with_classes(config)
    state = Health()
    with link, state.served(health) if health else nullcontext():
        status = RunStatus(link)
        state.serving(True)
        with shown(status):
            return coordinate(config, NetworkGrid(link), out, resume=resume, observers=[status, *observers])
