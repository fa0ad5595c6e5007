"""Blocks of rows turned into features: read, prepared and passed through a backbone on all cores at once."""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.preprocessing import TextPreprocessing
from fedhead.data import KeyArray, RowError, Samples, UnreadableSampleError
from fedhead.devices import Precision, multiplying
from fedhead.features.extraction import (
    batch_size_for,
    batches_of,
    delayed,
    in_lanes,
    page_locked,
    queued_by,
    read_ahead,
)

WORD_BATCH = 256
"""Words per forward pass, of a number of texts."""

FloatRows = npt.NDArray[np.float32]

Prepared = tuple[tuple[int, int], Tensor] | UnreadableSampleError
"""A row's two keys and prepared input, or the reason why it cannot be read."""


@dataclass(frozen=True)
class Block:
    """The features of some rows.

    Attributes:
        rows: the numbers of the rows.
        features: `[n, V]`; zeros for unreadable rows.
        keys: `[n, 2]`, the key that decides whether a row is held out, and its content's.
        unreadable: the reason for each unreadable row.
    """

    rows: Sequence[int]
    features: FloatRows
    keys: KeyArray
    unreadable: dict[int, UnreadableSampleError] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: Sequence[int], num_values: int) -> "Block":
        """Return the block before any row is done."""
        return cls(rows, np.zeros((len(rows), num_values), "<f4"), np.zeros((len(rows), 2), "<u8"))


class Extract(Protocol):
    """A way to extract blocks, here or elsewhere; see `extract_blocks`."""

    def __call__(
        self,
        backbone: Backbone,
        samples: Samples,
        blocks: Sequence[Sequence[int]],
        *,
        precision: Precision,
        batch_size: int | None,
        progress: Callable[[int], None],
    ) -> Generator[Block]:
        """Yield the features of blocks of rows, in order."""


@dataclass(frozen=True)
class _Batch:
    """Readable rows of one forward pass, by their positions in the block, and the unreadable rows read with them."""

    positions: list[int]
    keys: list[tuple[int, int]]
    inputs: list[Tensor]
    unreadable: dict[int, UnreadableSampleError]


def prepare(samples: Samples, backbone: Backbone, row: int) -> Prepared:
    """Read one row, and prepare it for the backbone."""
    try:
        item = samples.read(row)
        return samples.keys(row, item), backbone.preprocessing(item)
    except UnreadableSampleError as error:
        return error
    except RowError as error:
        return UnreadableSampleError(f"{samples.name(row)}: {error}")


def extract_blocks(
    backbone: Backbone,
    samples: Samples,
    blocks: Sequence[Sequence[int]],
    *,
    precision: Precision = "float32",
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Generator[Block]:
    """Yield the features of blocks of rows, in order.

    Batches are decided by the rows of a block alone, never by the number of threads, and several pass through the
    backbone at once. Rows with features that are not finite become unreadable. Close the iterator to stop early.

    Args:
        backbone: on the device for extraction, perhaps `arranged`.
        samples: the data set.
        blocks: numbers of rows.
        precision: of the backbone's products.
        batch_size: rows per forward pass; None chooses by backbone and device.
        progress: called with the number of rows done.
    """
    with multiplying(precision, backbone.device):
        rows_a_batch = batch_size or batch_size_for(backbone)
    # Texts are small: a whole block is read at once, so that texts of similar length share a batch; of clips, a few.
    longest = max(map(len, blocks), default=1)
    chunk = {"image": rows_a_batch, "audio": 4 * rows_a_batch}.get(backbone.kind, longest)
    chunk = min(chunk, longest)

    on_gpu = backbone.device.type == "cuda"

    def passed(batch: _Batch) -> tuple[_Batch, Tensor]:
        if not batch.inputs:
            return batch, torch.zeros(0, backbone.num_values)
        inputs = backbone.preprocessing.collate(batch.inputs)
        with multiplying(precision, backbone.device):
            return batch, backbone.features(page_locked(inputs) if on_gpu else inputs)

    read_row = functools.partial(prepare, samples, backbone)
    with closing(read_ahead(read_row, chain.from_iterable(blocks), ahead=2 * chunk)) as prepared:
        batches = _batches(backbone, blocks, prepared, chunk, rows_a_batch, batch_size is not None)
        with closing(in_lanes(backbone, passed, batches)) as lanes:
            done, total = delayed(lanes, queued_by(backbone)), 0
            for rows in blocks:
                block, before = Block.empty(rows, backbone.num_values), total
                while total < before + len(rows):
                    batch, features = next(done)
                    _fill(block, batch, features.cpu().numpy(), backbone, samples)
                    total += len(batch.positions) + len(batch.unreadable)
                    progress(total)
                yield block


def _batches(
    backbone: Backbone,
    blocks: Iterable[Sequence[int]],
    prepared: Iterator[Prepared],
    chunk: int,
    batch_size: int,
    fixed: bool,
) -> Iterator[_Batch]:
    """Yield the batches of each chunk of a block; the first one has the chunk's unreadable rows, if only them."""
    for rows in blocks:
        for first in range(0, len(rows), chunk):
            unreadable, positions, read = {}, [], []
            for position in range(first, min(first + chunk, len(rows))):
                if isinstance(one := next(prepared), UnreadableSampleError):
                    unreadable[rows[position]] = one
                else:
                    positions.append(position)
                    read.append(one)
            # Words of one text share its forward pass.
            texts = isinstance(backbone.preprocessing, TextPreprocessing)
            words = texts and any(inputs.ndim == 2 for _, inputs in read)
            size = max(batch_size, WORD_BATCH) if words else batch_size
            divided = batches_of(backbone, [len(inputs) for _, inputs in read], size, by_tokens=not (words or fixed))
            for places in divided or [[]]:
                keys, inputs = [read[place][0] for place in places], [read[place][1] for place in places]
                yield _Batch([positions[place] for place in places], keys, inputs, unreadable)
                unreadable = {}


def _fill(block: Block, batch: _Batch, features: FloatRows, backbone: Backbone, samples: Samples) -> None:
    block.unreadable.update(batch.unreadable)
    finite = np.all(np.isfinite(features), axis=1)
    for position, keys, values, good in zip(batch.positions, batch.keys, features, finite, strict=True):
        if good:
            block.features[position], block.keys[position] = values, keys
        else:
            row = block.rows[position]
            block.unreadable[row] = UnreadableSampleError(
                f"{samples.name(row)}: {backbone.spec} produces features that are not finite (NaN or infinity)."
            )
