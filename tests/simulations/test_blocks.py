import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedhead.simulations.blocks import BLOCK_ROWS, MOST_BLOCKS, assign_blocks, count_blocks


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 12))
def test_blocks_are_consecutive_and_as_even_as_sites_allow(sizes: list[int], blocks: int) -> None:
    assigned = assign_blocks(sizes, blocks)
    assert set(np.diff(assigned).tolist()) <= {0, 1}
    assert assigned[0] == 0
    assert assigned[-1] < blocks
    rows = np.bincount(assigned, weights=sizes)
    assert rows.max() <= sum(sizes) / blocks + max(sizes)


def test_the_number_of_blocks_follows_from_the_data_unless_it_is_set() -> None:
    assert count_blocks(0, BLOCK_ROWS - 1, 100) == 1
    assert count_blocks(0, 3 * BLOCK_ROWS, 100) == 3
    assert count_blocks(0, 1000 * BLOCK_ROWS, 10**6) == MOST_BLOCKS
    assert count_blocks(7, 10, 100) == 7
    assert count_blocks(7, 10, 3) == 3
