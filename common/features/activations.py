"""Activations at the boundary for training a tail: stored once, or computed again for each batch."""

import functools
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones.split import Tail, Trunk
from fedhead.data import IntArray, Samples, UnreadableSampleError
from fedhead.features.blocks import prepare
from fedhead.features.boundary import (
    BoundaryStore,
    Kind,
    activations_of,
    as_number,
    number_for,
    padded,
    store_path,
)
from fedhead.features.extraction import arranged, batch_size_for, read_ahead
from fedhead.features.store import Progress
from fedhead.files import home
from fedhead.tuning import ActivationsFrom
from fedhead.wording import size

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.5
"""Largest share of the free disk that activations take if `auto` decides."""

ESTIMATED_ROWS = 32
"""Rows whose lengths estimate the size of all."""

TIMED_PASSES = 3


class Activations(Protocol):
    """The activations of a data set, by row."""

    @property
    def sequences(self) -> bool:
        """Whether rows have any number of elements."""

    @property
    def device(self) -> torch.device:
        """The device on which `take` returns them."""

    def take(self, rows: IntArray) -> Tensor:
        """Return the activations `[n, *shape]` of rows `[n]`; see `BoundaryStore.take`."""


@dataclass(frozen=True)
class Recomputed:
    """Activations that the frozen layers compute again whenever they are taken, rounded as a store would round them.

    Attributes:
        trunk: as it is arranged for many rows.
        samples: the data set.
        number: the type of a store's values.
        sequences: whether rows have any number of elements.
    """

    trunk: Trunk
    samples: Samples
    number: Kind
    sequences: bool

    @classmethod
    def of(cls, trunk: Trunk, tail: Tail, samples: Samples, number: Kind | None = None) -> "Recomputed":
        """Return the activations of a data set before a tail."""
        forward = arranged(trunk, len(samples))
        assert isinstance(forward, Trunk)
        return cls(forward, samples, number or number_for(trunk, tail), trunk.kind == "text")

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    def take(self, rows: IntArray) -> Tensor:
        """Return the activations `[n, *shape]` of rows `[n]`; see `BoundaryStore.take`.

        Raises:
            FedheadError: if a row can no longer be read.
        """
        distinct, place = np.unique(rows, return_inverse=True)
        numbers = distinct.tolist()
        read_row = functools.partial(prepare, self.samples, self.trunk)
        with closing(read_ahead(read_row, numbers, ahead=2 * batch_size_for(self.trunk))) as read:
            made = activations_of(
                self.trunk, dict(zip(numbers, read, strict=True)), batch_size_for(self.trunk), as_error=True
            )
        parts: list[npt.NDArray[Any]] = [as_number(made[row], self.number) for row in numbers]
        if self.sequences:
            return padded([parts[at] for at in place.tolist()]).to(self.device)
        stacked = np.concatenate(parts)[place].astype(np.float32)
        return torch.from_numpy(stacked).to(self.device)


def open_activations(
    trunk: Trunk,
    tail: Tail,
    samples: Samples,
    rows: IntArray,
    how: ActivationsFrom = "auto",
    *,
    root: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> BoundaryStore | Recomputed:
    """Return the activations of some rows before a tail, and log whether they are stored.

    Args:
        trunk: see `BoundaryStore.open`.
        tail: see `BoundaryStore.open`.
        samples: the data set.
        rows: `[k]`, the rows that can be read, ascending.
        how: `store`, `recompute`, or `auto` to store what takes at most half of the free disk.
        root: the folder of all stores; by default in `fedhead.files.home()`.
        progress: called as rows are stored.

    Raises:
        FedheadError: if the disk is too small for a store that was asked for.
    """
    number = number_for(trunk, tail)
    folder = root or home() / "features"
    if how == "auto":
        how = "store"
        if not store_path(trunk, samples, rows, number, folder).exists():
            needed, free = stored_bytes(trunk, samples, rows, number), _free_bytes(folder)
            if needed > LARGEST_SHARE * free:
                how = "recompute"
                logger.warning(
                    "Activations of %d rows below the tuned layers would take %s, and the disk of %s has %s free: they "
                    "are computed again for each batch, which makes rounds slower. With activations = 'store' they "
                    "are stored.",
                    len(rows),
                    size(needed),
                    folder,
                    size(free),
                )
    if how == "recompute":
        logger.info("Activations below the tuned layers are computed for each batch, and not stored.")
        return Recomputed.of(trunk, tail, samples, number)
    logger.info("Activations below the tuned layers are computed once; each round then runs these layers alone.")
    return BoundaryStore.open(trunk, tail, samples, rows, root=root, number=number, progress=progress)


def stored_bytes(trunk: Trunk, samples: Samples, rows: IntArray, number: Kind) -> int:
    """Return the size of the stored activations of some rows; of texts, an estimate from the lengths of a few."""
    values, mask = trunk.boundary(trunk.probe_batch())
    width = {"float16": 2, "float32": 4}[number]
    if mask is None:
        return width * values[0].numel() * len(rows)
    few = rows[np.linspace(0, len(rows) - 1, min(ESTIMATED_ROWS, len(rows))).astype(np.int64)]
    read = [prepare(samples, trunk, row) for row in few.tolist()]
    lengths = [len(one[1]) for one in read if not isinstance(one, UnreadableSampleError)]
    return int(width * values.shape[-1] * len(rows) * float(np.mean(lengths or [0])))


def time_recomputing(trunk: Trunk) -> float:
    """Return processor seconds of the frozen layers for a row, on the probe, preprocessing included."""
    probes: Sequence[Any] = trunk.preprocessing.probes()
    forward = arranged(trunk, 1)
    assert isinstance(forward, Trunk)

    def once() -> float:
        started = time.process_time()
        forward.boundary(trunk.preprocessing.collate([trunk.preprocessing(one) for one in probes]))
        return (time.process_time() - started) / len(probes)

    once()
    return min(once() for _ in range(TIMED_PASSES))


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
