"""The engine on Ray: workers own blocks of sites, and this process adds their sums.

What a site does depends on the site, the head, the seed and the round alone, and a worker keeps nothing that cannot be
made again. So a lost worker's blocks go to others, whose sums have the same bits, and results do not depend on the
number of workers.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedhead.config import RunConfig
from fedhead.data import IntArray
from fedhead.errors import FedheadError, UserError
from fedhead.features.store import FeatureStore
from fedhead.protocol.actions import DESCRIBE, INSTALL
from fedhead.server.runs.history import Outcome
from fedhead.simulations.grid import Asked, InProcessGrid
from fedhead.simulations.sites import SimulatedSite
from fedhead.simulations.worker import Block, Replies, Shared, State, Worker, keep_state, state_of

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""

START_SECONDS = 300.0
"""How long the first worker may take to start."""

LOCAL = frozenset({DESCRIBE, INSTALL})
"""Actions that this process answers: they rest on no features."""


def require_ray(engine: str, address: str = "") -> None:
    """Check that an engine that runs on Ray can run here.

    Args:
        engine: its name.
        address: of the cluster, `HOST:PORT` or `ray://HOST:PORT`; empty for this machine alone.

    Raises:
        UserError: if Ray is not installed, or nothing answers at the address.
    """
    if find_spec("ray") is None:
        raise UserError(f"The engine {engine!r} needs Ray: pip install 'fedhead[ray]'.")
    if address in ("", "auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"A Ray cluster's address is HOST:PORT, as `ray start` prints it, not {address!r}.")
    # Ray itself would try again for minutes.
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise UserError(
            f"There is no Ray cluster at {address} ({reason}). Start one with `ray start --head`, or leave the address "
            "out to use this machine's cores."
        ) from None


def call_nobody() -> None:
    """Set how processes of Ray that this one starts behave: they report no usage, and do not step back for others."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Otherwise Ray warns of a change to come that concerns no worker of ours.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine; leave a connection as it is if there is one.

    Raises:
        UserError: if there is no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    call_nobody()
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"There is no Ray cluster at {address!r}: {str(error).partition(chr(10))[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def resources(device: str) -> tuple[int, int]:
    """Return the number of CPUs of the connected cluster, and that of its GPUs that workers may use."""
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(there.get("CPU", 1)), int(there.get("GPU", 0)) if device in ("auto", "cuda") else 0


def losses() -> tuple[type[Exception], ...]:
    """Return the errors by which Ray says that a worker, or what it made, is lost."""
    import ray

    return ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError


class Workers:
    """The workers of a run: one for each GPU of the cluster if there are any, else one for each core.

    Args:
        shared: the data of all sites.
        store: the features, for machines that do not see them.
        blocks: of sites.

    Raises:
        FedheadError: if none starts.
    """

    def __init__(self, shared: Shared, store: FeatureStore, blocks: Sequence[Block]) -> None:
        import ray

        self._store = store
        self._told = ray.put(shared)
        self._blocks = [ray.put(block) for block in blocks]
        self._features: list[Any] = []
        self._states: list[tuple[State, Any]] = []
        cpus, gpus = resources(shared.device)
        self._options: dict[str, Any] = {"num_cpus": 0 if gpus else 1, "num_gpus": 1 if gpus else 0}
        self._alive = self._start(max(1, min(gpus or cpus, len(blocks))))
        logger.info("%d workers answer for %d blocks of sites.", len(self._alive), len(blocks))

    def _start(self, count: int) -> list[Any]:
        """Start workers, and return those that are ready: all, or those there is room for when time is up."""
        import ray

        remote: Any = ray.remote(Worker)
        remote = remote.options(**self._options)
        made = [remote.remote([self._told]) for _ in range(count)]
        started = {worker.start.remote(): worker for worker in made}
        ready, _ = ray.wait(list(started), num_returns=1, timeout=START_SECONDS)
        ready, late = ray.wait(list(started), num_returns=len(started), timeout=START_SECONDS if ready else 0)
        for reference in late:
            ray.kill(started[reference])
        alive = [started[one] for one in started if one in set(ready) and self._place(one, started[one])]
        if not alive:
            raise FedheadError(
                f"No worker of the Ray cluster was ready within {START_SECONDS:.0f} s. Check with `ray status` that "
                "it has free CPUs, and that fedhead is installed in the same version on its machines."
            )
        return alive

    def _place(self, started: Any, worker: Any) -> bool:
        """Give a worker the features if its machine does not see the store; return whether it has them."""
        import ray

        try:
            if not ray.get(started):
                if not self._features:
                    logger.info("Not every machine sees %s: the features are sent to it once.", self._store.path)
                    features = np.ascontiguousarray(self._store.features.numpy())
                    self._features = [ray.put(one) for one in (features, self._store.keys, self._store.contents)]
                ray.get(worker.take.remote(*self._features))
        except ray.exceptions.RayActorError as error:
            logger.warning("A worker did not start: %s", str(error).partition("\n")[0])
            return False
        return True

    def answer(self, requests: Sequence["Request"]) -> Iterator[Replies]:
        """Yield the replies to requests, in their order; the blocks of workers that are lost meanwhile go to others.

        Raises:
            FedheadError: if all workers are lost, and no other starts.
        """
        import ray

        sent: dict[int, Any] = {}
        for request in requests:
            if request.content not in sent:
                sent[request.content] = ray.put(request.asked.payload)
        given = [self._submit(request, sent[request.content]) for request in requests]
        lost = losses()
        for number in range(len(requests)):
            while True:
                worker, reference = given[number]
                try:
                    replies: Replies = ray.get(reference)
                    break
                except lost:
                    self._lose(worker)
                    for later, request in enumerate(requests[number:], number):
                        if given[later][0] is worker:
                            given[later] = self._submit(request, sent[request.content])
            yield replies

    def _submit(self, request: "Request", payload: Any) -> tuple[Any, Any]:
        """Send a request to the worker of its block; return the worker, and a reference to its replies."""
        worker, asked = self._alive[request.block % len(self._alive)], request.asked
        block, state = self._blocks[request.block], self._state(request.state)
        # References in lists are passed on as they are, and fetched by workers that lack their values.
        reference = worker.answer.remote(
            request.block, [block], [state], asked.action, request.positions, payload, asked.merged
        )
        return worker, reference

    def _lose(self, worker: Any) -> None:
        """Do without a worker whose process or machine is gone."""
        import ray

        # One that cannot be reached for a while must not come back beside its successor.
        ray.kill(worker)
        if worker in self._alive:
            self._alive = [one for one in self._alive if one is not worker]
            logger.warning("A worker is lost; %d are left, which answer for its sites.", len(self._alive))
        if not self._alive:
            self._alive = self._start(1)

    def _state(self, state: State) -> Any:
        """Return a reference to the state of a run at its sites; the same one for equal states."""
        import ray

        for known, reference in self._states:
            if known == state:
                return reference
        self._states = [(state, ray.put(state)), *self._states[:1]]
        return self._states[0][1]

    def stop(self) -> None:
        """End the workers' processes."""
        import ray

        for worker in self._alive:
            ray.kill(worker)
        self._alive = []


@dataclass(frozen=True)
class Request:
    """A request to some sites of a block.

    Attributes:
        asked: the messages.
        block: the number of the block.
        positions: of the sites in the block; None for all, in order.
        state: of the run at the sites.
    """

    asked: Asked
    block: int
    positions: Sequence[int] | None
    state: State

    @property
    def content(self) -> int:
        """Tells the contents of messages apart."""
        return id(self.asked.messages[0].content)


class ClusterGrid(InProcessGrid):
    """Flower's Grid over simulated sites on a Ray cluster.

    Sites describe themselves in this process; all that rests on features is answered by workers.

    Args:
        sites: the simulated sites.
        rows: of each site, by name.
        store: the features of all rows.
        shared: the data of all sites.
        blocks: how many blocks of sites are answered for separately.
    """

    def __init__(
        self,
        sites: Sequence[SimulatedSite],
        rows: Mapping[str, IntArray],
        store: FeatureStore,
        shared: Shared,
        blocks: int,
    ) -> None:
        super().__init__(sites, run_id=shared.run_id, blocks=blocks)
        owned: dict[int, dict[str, IntArray]] = {}
        self._positions: dict[int, int] = {}
        for node, site in self._sites.items():
            own = owned.setdefault(self._blocks[node], {})
            self._positions[node] = len(own)
            own[site.name] = rows[site.name]
        self._sizes = {block: len(own) for block, own in owned.items()}
        self.workers = Workers(shared, store, [Block.of(owned[block]) for block in sorted(owned)])

    def _answer(self, asked: Sequence[Asked]) -> Iterator[Message]:
        here = [one for one in asked if one.action in LOCAL]
        yield from super()._answer(here)
        requests = [self._request(one) for one in asked if one.action not in LOCAL]
        for request, replies in zip(requests, self.workers.answer(requests), strict=True):
            if replies.state is not None:
                keep_state(replies.state, self._contexts[request.asked.nodes[0]])
            for position, reply in replies.replies:
                yield request.asked.reply(position, reply)

    def _request(self, asked: Asked) -> Request:
        block = self._blocks[asked.nodes[0]]
        positions = [self._positions[node] for node in asked.nodes]
        whole = positions == list(range(self._sizes[block]))
        return Request(asked, block, None if whole else positions, state_of(self._contexts[asked.nodes[0]]))


def run_on_ray(
    config: RunConfig,
    sites: Sequence[SimulatedSite],
    rows: Mapping[str, IntArray],
    store: FeatureStore,
    shared: Shared,
    blocks: int,
    coordinate: Callable[[Grid], Outcome],
) -> Outcome:
    """Run a coordinator over sites on Ray, here or on the cluster that `config` names.

    Args:
        config: of the run.
        sites: the simulated sites.
        rows: of each site, by name.
        store: the features of all rows.
        shared: the data of all sites.
        blocks: how many blocks of sites are answered for separately.
        coordinate: runs the coordinator over a Grid.

    Raises:
        FedheadError: if the run fails.
    """
    with connected(config.simulation.cluster):
        grid = ClusterGrid(sites, rows, store, shared, blocks)
        try:
            return coordinate(grid)
        finally:
            grid.workers.stop()
