"""The minibatches of a round: the order of each site's rows in every epoch, at many sites at once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fedhead.client.labelled_features import SiteRows, sizes_of
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

    `n` is the largest number of rows; entries after a site's own rows are not valid rows.
    """
    sizes = sizes_of(sites)
    keys = np.array([site.key for site in sites], dtype=np.uint64)
    different = epochs[:1] if (epochs == epochs[0]).all() else epochs
    drawn = np.array([_stream(seed, round_number, epoch) for epoch in different.tolist()], dtype=np.uint64)
    columns = np.arange(sizes.max(initial=0), dtype=np.uint64)
    values = mix(np.add(mix(keys ^ drawn)[:, None], columns * _GOLDEN, dtype=np.uint64))
    values[columns >= sizes[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    drawn_orders: IntArray = values.argsort(axis=1, kind="stable")
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
    per_epoch = -(-sizes // settings.batch_size)
    per_epoch -= (per_epoch > 1) & (sizes - (per_epoch - 1) * settings.batch_size < min_batch)
    steps = per_epoch * settings.epochs
    order = np.zeros((len(sites), sizes.max(initial=0)), dtype=np.int64)
    for step in range(steps[0]):
        count = np.count_nonzero(steps > step)
        epoch, within = np.divmod(step, per_epoch[:count])
        if len(starting := np.flatnonzero(within == 0)):
            drawn = orders(seed, [sites[i] for i in starting.tolist()], round_number, epoch[starting])
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


def table_of(sites: Sequence[SiteRows]) -> IntArray:
    """Return `[S, n]`, the rows of each site, padded with the site's first row."""
    sizes = sizes_of(sites)
    columns = np.arange(sizes.max(initial=0))
    # One row more, for sites without rows.
    rows = np.concatenate([*(site.rows for site in sites), np.zeros(1, dtype=np.int64)])
    places = np.where(columns < sizes[:, None], columns, 0) + (np.cumsum(sizes) - sizes)[:, None]
    table: IntArray = rows[places]
    table[sizes == 0] = 0
    return table
