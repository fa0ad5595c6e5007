"""Extraction on a Ray cluster: workers turn blocks of rows into features, and this process alone writes the store."""

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from fedhead.backbones import Backbone
from fedhead.data import Samples
from fedhead.devices import Precision, pick_device
from fedhead.errors import FedheadError
from fedhead.features.blocks import Block, extract_blocks
from fedhead.simulations.cluster import START_SECONDS, losses, resources

logger = logging.getLogger(__name__)

AHEAD = 2
"""Blocks that a worker is given at a time, so that it never waits for the next."""


class Extractor:
    """A backbone and a data set in a worker's process.

    Args:
        told: references to the backbone and the data set.
        device: of the backbone.
    """

    def __init__(self, told: Sequence[Any], device: str) -> None:
        import ray

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        backbone, samples = ray.get(list(told))
        self._backbone: Backbone = backbone.to(pick_device(device))
        self._samples: Samples = samples

    def ready(self) -> None:
        """Return once the worker has started."""

    def extract(self, rows: Sequence[int], precision: Precision, batch_size: int | None) -> Block:
        """Return the features of a block of rows."""
        blocks = extract_blocks(self._backbone, self._samples, [rows], precision=precision, batch_size=batch_size)
        with closing(blocks) as made:
            return next(made)


def extract_on_ray(
    backbone: Backbone,
    samples: Samples,
    blocks: Sequence[Sequence[int]],
    *,
    precision: Precision = "float32",
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Generator[Block]:
    """Yield the features of blocks of rows, in order, as `extract_blocks` does, from the workers of a Ray cluster.

    The backbone and what the data set holds in memory are sent once. Files are read by the workers; a block with a row
    that a worker cannot read for a possibly temporary reason, such as a file that its machine does not have, is made
    here. So are the blocks of lost workers.
    """
    import ray

    workers = _start(backbone, samples, len(blocks))
    if not workers:
        yield from extract_blocks(
            backbone, samples, blocks, precision=precision, batch_size=batch_size, progress=progress
        )
        return
    logger.info("%d workers extract %d blocks of rows.", len(workers), len(blocks))
    given: deque[Any] = deque()
    here, done = 0, 0
    try:
        for number, rows in enumerate(blocks):
            while len(given) < AHEAD * len(workers) and number + len(given) < len(blocks):
                later = number + len(given)
                given.append(workers[later % len(workers)].extract.remote(blocks[later], precision, batch_size))
            try:
                block: Block | None = ray.get(given.popleft())
            except losses():
                block = None
            except ray.exceptions.RayTaskError as error:
                reason = str(error).strip().splitlines()[-1]
                raise FedheadError(f"A worker of the Ray cluster cannot extract features: {reason}") from None
            if block is None or any(not error.lasting for error in block.unreadable.values()):
                here += 1
                with closing(
                    extract_blocks(backbone, samples, [rows], precision=precision, batch_size=batch_size)
                ) as made:
                    block = next(made)
            done += len(rows)
            progress(done)
            yield block
    finally:
        for worker in workers:
            ray.kill(worker)
        if here:
            logger.warning("%d of %d blocks were extracted in this process instead of a worker.", here, len(blocks))


def _start(backbone: Backbone, samples: Samples, blocks: int) -> list[Any]:
    """Return the workers that are ready; none, with a warning, if the cluster cannot make any."""
    import ray

    device = backbone.device.type
    cpus, gpus = resources(device)
    remote: Any = ray.remote(Extractor)
    remote = remote.options(num_cpus=0 if gpus else 1, num_gpus=1 if gpus else 0)
    try:
        told = [ray.put(backbone), ray.put(samples)]
    # Functions of the user's own may hold anything, and each fails in its own way.
    except Exception as error:
        logger.warning("Features are extracted in this process, since its data cannot be sent (%s).", error)
        return []
    started = [remote.remote(told, device) for _ in range(max(1, min(gpus or cpus, blocks)))]
    waiting = {worker.ready.remote(): worker for worker in started}
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=START_SECONDS)
    for one in late:
        ray.kill(waiting[one])
    if not ready:
        logger.warning("Features are extracted in this process: no worker was ready in %.0f s.", START_SECONDS)
    return [waiting[one] for one in ready]
