"""The minibatches of a round: the order of each site's rows in every epoch, at many sites at once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fedhead.client.labelled_features import Cohort, SiteRows, sizes_of
from fedhead.config import LocalConfig
from fedhead.data import mix

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffled(seed: int, name: str, round_number: int, epoch: int, count: int) -> IntArray:
    """Return the order `[count]` of a site's rows in one epoch.

    It depends only on the arguments and is the same in every process and under every version of numpy, whose own
    permutations may change.
    """
    site = SiteRows(name, np.arange(count))
    order: IntArray = orders(seed, [site], round_number, np.array([epoch]))[0]
    return order


def orders(seed: int, sites: Sequence[SiteRows], round_number: int, epochs: IntArray) -> IntArray:
    """Return `[S, n]`, the order of each site's rows in its current epoch, given as `[S]`.

    `n` is the largest number of rows; entries after a site's own rows are other places below `n`.
    """
    cohort = sites if isinstance(sites, Cohort) else Cohort(sites)
    sizes, keys = cohort.sizes, cohort.keys
    different = epochs[:1] if (epochs == epochs[0]).all() else epochs
    drawn = np.array([_stream(seed, round_number, epoch) for epoch in different.tolist()], dtype=np.uint64)
    columns = np.arange(sizes.max(initial=0), dtype=np.uint64)
    values = mix(np.add(mix(keys ^ drawn)[:, None], columns * _GOLDEN, dtype=np.uint64))
    if sizes.min(initial=len(columns)) < len(columns):
        values[columns >= sizes[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    # All values of a site differ, because `mix` is a bijection: no sort needs to be stable.
    drawn_orders: IntArray = values.argsort(axis=1)
    return drawn_orders


@cache
def _stream(seed: int, round_number: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"order {seed}/{round_number}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Batch:
    """One minibatch of `b` rows at each of the first `k` sites of a chunk.

    Attributes:
        places: `[k, b]`, indices into the site's rows; a shorter batch repeats its last one.
        weights: `[k, b]`, the inverse of the batch's true length, and 0 for repeated rows.
        share: `[k]`, the batch's share of the site's rows in the last epoch; 0 in earlier epochs.
    """

    places: IntArray
    weights: FloatArray
    share: FloatArray


def batches(
    sites: Sequence[SiteRows], settings: LocalConfig, seed: int, round_number: int, min_batch: int = 1
) -> Iterator[Batch]:
    """Yield the minibatches of all epochs of sites sorted by descending number of rows.

    The sites that still have batches are always the first of `sites`. A last minibatch of an epoch with fewer than
    `min_batch` rows is merged with the previous one.
    """
    sizes = sizes_of(sites)
    per_epoch = batches_per_epoch(sizes, settings.batch_size, min_batch)
    steps = per_epoch * settings.epochs
    order = np.zeros((len(sites), sizes.max(initial=0)), dtype=np.int64)
    for step in range(steps[0]):
        count = np.count_nonzero(steps > step)
        epoch, within = np.divmod(step, per_epoch[:count])
        if len(starting := np.flatnonzero(within == 0)):
            some = sites if len(starting) == len(sites) else [sites[i] for i in starting.tolist()]
            drawn = orders(seed, some, round_number, epoch[starting])
            order[starting, : drawn.shape[1]] = drawn
        first = within * settings.batch_size
        last = within == per_epoch[:count] - 1
        lengths = np.where(last, sizes[:count] - first, settings.batch_size)
        columns = np.arange(lengths.max())
        places = np.take_along_axis(
            order[:count], np.minimum(first[:, None] + columns, sizes[:count, None] - 1), axis=1
        )
        weights = (columns < lengths[:, None]) / lengths[:, None]
        share = (epoch == settings.epochs - 1) * lengths / sizes[:count]
        yield Batch(places, weights, share)


@dataclass(frozen=True)
class Columns:
    """The columns of one minibatch in the row orders of an epoch, at each of the first `k` sites.

    Attributes:
        count: `k`.
        start: the first column.
        stop: the one after the last, at the site with the longest minibatch.
        weights: `[k, 1, b]`, the inverse of the minibatch's length, and 0 for rows that are not in it.
    """

    count: int
    start: int
    stop: int
    weights: FloatArray


def columns_of(sizes: IntArray, batch_size: int, min_batch: int = 1) -> Iterator[Columns]:
    """Yield the minibatches of one epoch of sites of descending `sizes`, as `batches` makes them."""
    per_epoch = batches_per_epoch(sizes, batch_size, min_batch)
    for step in range(per_epoch.max(initial=0)):
        count = int(np.count_nonzero(per_epoch > step))
        start = step * batch_size
        lengths = np.where(per_epoch[:count] == step + 1, sizes[:count] - start, batch_size)[:, None]
        weights = (np.arange(lengths.max()) < lengths) / lengths
        yield Columns(count, start, start + weights.shape[1], weights[:, None])


def batches_per_epoch(sizes: IntArray, batch_size: int, min_batch: int) -> IntArray:
    """Return `[S]`, the number of minibatches; a last one below `min_batch` rows is merged with the previous one."""
    count: IntArray = -(-sizes // batch_size)
    count -= (count > 1) & (sizes - (count - 1) * batch_size < min_batch)
    return count
