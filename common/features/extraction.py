"""Efficient feature extraction: a backbone optimised for many rows, with rows read ahead."""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import islice
from os import cpu_count
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from fedhead.backbones import Backbone
from fedhead.backbones.preprocessing import Batch
from fedhead.devices import Precision, half_type, multiplies_halves, multiplying

logger = logging.getLogger(__name__)

COMPILED_FROM = 100_000
"""Number of rows from which compiling pays on a GPU. On the CPU, it saves 4 % of a pass and takes half a minute."""

CPU_BATCH = 16
"""Batch size on the CPU. Activations stay in the processor's caches: 1.1 to 1.4 times as fast as 64."""

CPU_TOKENS = 1024
"""Most tokens of a batch of texts on the CPU, padding included, and the reason for larger batches of short texts."""

CUDA_BATCHES = (64, 128, 256, 512, 1024)
TEXT_BATCH = 64
AUDIO_BATCH = 32
TABLE_BATCH = 1024
MOST_READERS = 16
MOST_LANES = 8
"""Most batches that pass through a backbone at once; each holds the activations of one batch."""

QUEUED_ON_GPU = 2
"""Batches in a GPU's queue while the processor reads the features of the one before them."""

SHARED_SOURCES = ("bundled", "features", "hf", "identity", "timm", "torchvision", "vectors")
"""Sources whose modules keep nothing between forward passes, so that several threads may share one."""

MIXED_TOLERANCE = 0.02
"""Largest difference that mixed precision may make to the probe's features, relative to their norm."""

GAIN = 1.05
"""Smallest speed-up for which a larger batch is worth its memory."""

T = TypeVar("T")
S = TypeVar("S")


def arranged(
    backbone: Backbone, rows: int, *, precision: Precision = "float32", compiled: bool | None = None
) -> Backbone:
    """Return a backbone with the same features, to 1e-4 relative, that is faster over many rows.

    Batch norms are folded into the preceding convolutions (Jacob et al., 2018, section 3.2), weights use the
    channels-last layout, and the module is compiled if `rows` makes that worthwhile. The digests remain those of the
    given backbone.

    Args:
        backbone: the backbone; it is not modified.
        rows: the expected number of rows.
        precision: under `mixed`, weights of convolutions and linear layers are converted once, not in every pass.
        compiled: whether to compile; None decides by device and `rows`.
    """
    if backbone.kind == "image":
        module = _folded(backbone.module).to(memory_format=torch.channels_last)
    elif precision == "mixed":
        module = copy.deepcopy(backbone.module)
    else:
        return backbone
    if precision == "mixed":
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                layer.to(half_type(backbone.device))
    if compiled if compiled is not None else backbone.device.type == "cuda" and rows >= COMPILED_FROM:
        module = _Compiled(module)
    return backbone.running(module)


def usable(precision: Precision, backbone: Backbone) -> Precision:
    """Return `precision`, or float32 with a warning where `mixed` is slower, or changes the probe's features by 2 %."""
    if precision == "float32":
        return precision
    if not multiplies_halves(backbone.device):
        logger.warning("This processor has no products in half precision: features are extracted in float32.")
        return "float32"
    exact = backbone.probe()
    with multiplying(precision, backbone.device):
        rounded = arranged(backbone, 1, precision=precision, compiled=False).probe()
    difference = float((rounded - exact).norm() / exact.norm().clamp_min(1e-12))
    if not difference <= MIXED_TOLERANCE:
        logger.warning(
            "Mixed precision changes the features of %s by %.1f %% of their norm on the probe, where %.0f %% is "
            "allowed: they are extracted in float32.",
            backbone.spec,
            100 * difference,
            100 * MIXED_TOLERANCE,
        )
        return "float32"
    return precision


def _folded(module: nn.Module) -> nn.Module:
    # A copied graph is in training mode again.
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        return fuse(copied, inplace=True).eval().requires_grad_(False)
    # Modules with data-dependent control flow cannot be traced, and fail in various ways.
    except Exception as error:
        logger.debug("Batch norms are not folded: %s", error)
        return copy.deepcopy(module).eval().requires_grad_(False)


class _Compiled(nn.Module):
    """A compiled module, as long as compilation works; short last batches are padded, so that one shape is compiled."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.plain = module
        self.compiled: Callable[[Tensor], Any] | None = torch.compile(module, dynamic=False, options={"freezing": True})
        self.rows = 0

    def forward(self, batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.compiled is not None:
            self.rows = max(self.rows, len(batch))
            filled = torch.cat([batch, batch.new_zeros(self.rows - len(batch), *batch.shape[1:])])
            try:
                made = self.compiled(filled)
                return made[: len(batch)] if isinstance(made, Tensor) else tuple(one[: len(batch)] for one in made)
            # Whatever failed, such as a missing C++ compiler, the uncompiled module does not need it.
            except Exception as error:
                logger.warning("The backbone is not compiled (%s).", str(error).strip().partition("\n")[0])
                self.compiled = None
        output: Tensor | tuple[Tensor, ...] = self.plain(batch)
        return output


def batch_size_for(backbone: Backbone) -> int:
    """Return the batch size for `backbone`: on CUDA the fastest one that fits, by measurement.

    On the CPU it is fixed, so that the last bits of features do not depend on the machine's load.
    """
    if backbone.kind == "table":
        return TABLE_BATCH
    if backbone.device.type != "cuda":
        return CPU_BATCH
    if backbone.kind in ("text", "audio"):
        return TEXT_BATCH if backbone.kind == "text" else AUDIO_BATCH
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
    """Return the first of increasing batch sizes after which a larger one gains less than 5 % or does not fit.

    Args:
        seconds: measures a batch of a given size; raises `torch.OutOfMemoryError` if it does not fit.
        candidates: batch sizes, increasing.
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


def batches_of(
    backbone: Backbone, lengths: Sequence[int], batch_size: int, *, by_tokens: bool = True
) -> list[list[int]]:
    """Divide prepared inputs into batches, by length, and return their positions.

    Images have one length; texts and clips are padded to the longest of their batch. On the CPU, a batch of texts is
    limited by its tokens instead of its rows: short texts would leave a small batch's products too thin.

    Args:
        backbone: the backbone.
        lengths: of the inputs.
        batch_size: most rows of a batch.
        by_tokens: whether batches of texts may have more rows, up to `TEXT_BATCH`, and fewer.
    """
    by_tokens = by_tokens and backbone.kind == "text" and backbone.device.type == "cpu"
    most = TEXT_BATCH if by_tokens else batch_size
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = batches[-1] if batches else []
        fits = not by_tokens or (len(last) + 1) * lengths[position] <= CPU_TOKENS
        if last and len(last) < most and fits:
            last.append(position)
        else:
            batches.append([position])
    return batches


def lanes_of(backbone: Backbone) -> int:
    """Return how many batches may pass through `backbone` at once: on the CPU one for each of torch's threads.

    A pass on one thread never waits for others. Modules of unknown sources may not be shared by threads.
    """
    if backbone.device.type != "cpu" or backbone.spec.partition(":")[0] not in SHARED_SOURCES:
        return 1
    return min(torch.get_num_threads(), MOST_LANES)


def in_lanes(backbone: Backbone, work: Callable[[S], T], batches: Iterable[S]) -> Generator[T]:
    """Yield `work(batch)` for each batch, in order, with as many at once as `lanes_of` says."""
    lanes = lanes_of(backbone)
    if lanes == 1:
        yield from map(work, batches)
        return
    own = max(1, torch.get_num_threads() // lanes)
    with closing(read_ahead(work, batches, ahead=2 * lanes, threads=lanes, torch_threads=own)) as done:
        yield from done


def queued_by(backbone: Backbone) -> int:
    """Return how many batches the device of `backbone` computes while the processor reads earlier features."""
    return QUEUED_ON_GPU if backbone.device.type == "cuda" else 0


def delayed(made: Iterable[T], by: int) -> Generator[T]:
    """Yield the items in order, each only after `by` further ones are made.

    A GPU computes a batch whose features are a tensor of its own while the processor collates the next batches, and
    waits for it only when its values are read.
    """
    waiting: deque[T] = deque()
    for one in made:
        waiting.append(one)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting


def page_locked(batch: Batch) -> Batch:
    """Return a batch in page-locked memory of the host, which a GPU copies without a wait.

    Torch caches this memory and reuses it after the copy.
    """
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def read_ahead(
    read: Callable[[S], T], rows: Iterable[S], *, ahead: int, threads: int | None = None, torch_threads: int = 1
) -> Generator[T]:
    """Yield `read(row)` for each row, in order, while threads read up to `ahead` rows further.

    Threads are sufficient: decoding, resizing, hashing and torch's operators release the interpreter's lock. Close the
    iterator to stop early.

    Args:
        read: makes something of a row.
        rows: taken as they are needed.
        ahead: the number of rows ahead.
        threads: the number of threads; None for one per core, at most `MOST_READERS`.
        torch_threads: torch's threads in each of them.

    Raises:
        Exception: any error of `read`, at its row's turn.
    """
    remaining = iter(rows)
    # Readers take one torch thread each, since they share the processor with the forward pass. A caller that never
    # set its own number of threads would inherit theirs permanently.
    torch.set_num_threads(torch.get_num_threads())
    tasks: SimpleQueue[tuple[Future[T], S] | None] = SimpleQueue()

    def submit(row: S) -> Future[T]:
        future: Future[T] = Future()
        tasks.put((future, row))
        return future

    # Daemon threads: a hanging read must not delay Ctrl-C, as an executor's threads would.
    readers = [
        Thread(target=_serve, args=(tasks, read, torch_threads), name="read-ahead", daemon=True)
        for _ in range(threads or min(MOST_READERS, cpu_count() or 1))
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


def _serve(tasks: "SimpleQueue[tuple[Future[T], S] | None]", read: Callable[[S], T], torch_threads: int) -> None:
    """Process queued tasks until the end marker."""
    torch.set_num_threads(torch_threads)
    while (task := tasks.get()) is not None:
        future, row = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(row))
            # Any error is raised again when the row is consumed.
            except BaseException as error:
                future.set_exception(error)
