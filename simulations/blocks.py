"""Blocks of sites: the unit that one worker answers for, the same on one machine and on a cluster."""

from collections.abc import Sequence

import numpy as np

from fedhead.data import IntArray

BLOCK_ROWS = 50_000
"""Rows of the data per block, if the number of blocks is not set."""

MOST_BLOCKS = 64
"""Blocks, if their number is not set: each costs a few milliseconds in every exchange."""


def count_blocks(asked: int, rows: int, sites: int) -> int:
    """Return the number of blocks.

    It follows from the data alone, because the last bits of a result depend on it: sums are rounded block by block.

    Args:
        asked: as in the settings; 0 to choose by the rows.
        rows: of the data, those that sites share counted once.
        sites: of the run.
    """
    return max(1, min(asked or min(rows // BLOCK_ROWS, MOST_BLOCKS), sites))


def assign_blocks(sizes: Sequence[int], blocks: int) -> IntArray:
    """Return `[S]`, the block of each site: consecutive sites, with rows as equal as sites allow."""
    rows = np.asarray(sizes, dtype=np.int64)
    middles = np.cumsum(rows) - rows / 2
    places = np.minimum(middles * blocks // max(int(rows.sum()), 1), blocks - 1)
    # One large site can leave a place empty.
    return np.unique(places, return_inverse=True)[1].astype(np.int64)
