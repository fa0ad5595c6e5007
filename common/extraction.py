"""The one expensive pass, made cheap: a forward pass arranged for many rows, fed by rows that are read ahead of it."""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from itertools import islice
from os import cpu_count
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from fedhead.backbones import Backbone

logger = logging.getLogger(__name__)

COMPILED_FROM = 100_000
"""Rows from which compiling repays itself: it takes 5 to 20 s and then saves 5 to 15 % of the folded pass."""

CPU_BATCH = 16
"""Small enough that activations stay in the processor's caches: 1.1 to 1.4 times as fast as 64. Of texts, fewer are
padded to the longest of their batch: 4 % of the tokens of short ones are padding, with 64 it is 19 %."""

CUDA_BATCHES = (64, 128, 256, 512, 1024)
TEXT_BATCH = 64
MOST_WORKERS = 16
GAIN = 1.05
"""What a larger batch must bring to be worth its memory."""

T = TypeVar("T")


def arranged(backbone: Backbone, rows: int, *, compiled: bool | None = None) -> Backbone:
    """Return a backbone with the same features, to 1e-4 relative, that is faster over many rows.

    Batch norms are folded into the convolutions before them (Jacob et al., 2018, section 3.2), weights are laid out
    channels last, and the module is compiled where `rows` repays that. The digests remain the given backbone's.

    Args:
        backbone: which is left as it is.
        rows: how many will go through it.
        compiled: whether to compile; None decides from `rows`.
    """
    if backbone.kind != "image":
        return backbone
    module = _folded(backbone.module).to(memory_format=torch.channels_last)
    if compiled if compiled is not None else rows >= COMPILED_FROM:
        module = _Compiled(module)
    return backbone.running(module)


def _folded(module: nn.Module) -> nn.Module:
    # A copied graph is back in training mode.
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        return fuse(copied, inplace=True).eval().requires_grad_(False)
    # Modules whose forward depends on data cannot be traced, each in its own way of failing.
    except Exception as error:
        logger.debug("Batch norms stay as they are: %s", error)
        return copy.deepcopy(module).eval().requires_grad_(False)


class _Compiled(nn.Module):
    """A compiled module, for as long as it compiles here; last batches are filled up, so that one shape is compiled."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.plain = module
        self.compiled: Callable[[Tensor], Tensor] | None = torch.compile(
            module, dynamic=False, options={"freezing": True}
        )
        self.rows = 0

    def forward(self, batch: Tensor) -> Tensor:
        if self.compiled is not None:
            self.rows = max(self.rows, len(batch))
            filled = torch.cat([batch, batch.new_zeros(self.rows - len(batch), *batch.shape[1:])])
            try:
                return self.compiled(filled)[: len(batch)]
            # A missing C++ compiler, an operation without a kernel: whatever it is, the plain module does not need it.
            except Exception as error:
                logger.warning("The backbone is not compiled (%s).", str(error).strip().partition("\n")[0])
                self.compiled = None
        output: Tensor = self.plain(batch)
        return output


def batch_size_for(backbone: Backbone) -> int:
    """Return how many rows should go through `backbone` at once: on CUDA the fastest that fits, found by trying.

    On the CPU it is fixed, so that features do not depend, to the last bit, on how busy the machine was.
    """
    if backbone.device.type != "cuda":
        return CPU_BATCH
    if backbone.kind == "text":
        return TEXT_BATCH
    image = backbone.preprocessing(backbone.preprocessing.probes()[0])

    def seconds(rows: int) -> float:
        batch = image.expand(rows, *image.shape).to(backbone.device)
        backbone.features(batch)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        backbone.features(batch)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    return fastest_batch(seconds, CUDA_BATCHES)


def fastest_batch(seconds: Callable[[int], float], candidates: Iterable[int]) -> int:
    """Return the first of rising batch sizes after which a larger one gains less than 5 % or does not fit.

    Args:
        seconds: what a batch of so many rows takes; raises `torch.OutOfMemoryError` where it does not fit.
        candidates: batch sizes, rising.
    """
    best, best_rate = 1, 0.0
    for rows in candidates:
        try:
            rate = rows / seconds(rows)
        except torch.OutOfMemoryError:
            break
        if rate < GAIN * best_rate:
            break
        best, best_rate = rows, rate
    return best


def read_ahead(read: Callable[[int], T], rows: Iterable[int], *, ahead: int) -> Generator[T]:
    """Yield `read(row)` for each row, in order, while threads read up to `ahead` rows further.

    Threads do, and processes are not needed: decoding, resizing and hashing release the interpreter's lock. Close the
    iterator to stop early.

    Raises:
        Exception: whatever `read` raises, at its row's turn.
    """
    remaining = iter(rows)
    # The readers take one thread of torch's each, as they share the processor with the forward pass already. A caller
    # that has not said how many it takes itself would take on theirs, for good.
    torch.set_num_threads(torch.get_num_threads())
    tasks: SimpleQueue[tuple[Future[T], int] | None] = SimpleQueue()

    def submit(row: int) -> Future[T]:
        future: Future[T] = Future()
        tasks.put((future, row))
        return future

    # Threads that nobody waits for: a read that hangs must not hold up Ctrl-C, as an executor's would.
    readers = [
        Thread(target=_serve, args=(tasks, read), name="read-ahead", daemon=True)
        for _ in range(min(MOST_WORKERS, cpu_count() or 1))
    ]
    for reader in readers:
        reader.start()
    waiting: deque[Future[T]] = deque(map(submit, islice(remaining, ahead)))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(map(submit, islice(remaining, 1)))
    finally:
        for future in waiting:
            future.cancel()
        for _ in readers:
            tasks.put(None)


def _serve(tasks: "SimpleQueue[tuple[Future[T], int] | None]", read: Callable[[int], T]) -> None:
    """Do what comes, until there is nothing more to come."""
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        future, row = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(row))
            # Whatever it is, it is raised again where the row is taken.
            except BaseException as error:
                future.set_exception(error)
