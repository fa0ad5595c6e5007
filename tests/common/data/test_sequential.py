from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from fedhead.data.sequential import KEPT, SequentialRows

ROWS = 1000
GROUP = 300


class Stream:
    """Numbers in groups, that counts how many were read."""

    def __init__(self) -> None:
        self.read = 0
        self.rows = SequentialRows(lambda row: row // GROUP * GROUP, self.rows_from)

    def rows_from(self, start: int) -> Iterator[int]:
        for row in range(start, min(start + GROUP, ROWS)):
            self.read += 1
            yield row


@given(st.lists(st.integers(0, ROWS - 1), max_size=30))
def test_any_row_is_read_in_any_order(rows: list[int]) -> None:
    stream = Stream()
    assert [stream.rows.read(row) for row in rows] == rows


def test_rows_that_are_nearly_in_order_are_read_once() -> None:
    stream = Stream()
    swapped = [row + (KEPT // 2 if row // (KEPT // 2) % 2 == 0 else -KEPT // 2) for row in range(KEPT, GROUP)]
    assert [stream.rows.read(row) for row in range(KEPT)] == list(range(KEPT))
    assert [stream.rows.read(row) for row in swapped if row < GROUP] == [row for row in swapped if row < GROUP]
    assert stream.read == GROUP
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(Stream().rows.read, range(ROWS))) == list(range(ROWS))


def test_failure_does_not_affect_later_rows() -> None:
    def rows_from(start: int) -> Iterator[int]:
        for row in range(start, 10):
            if row == 5:
                raise ValueError("damaged")
            yield row

    rows = SequentialRows(lambda row: row // 6 * 6, rows_from)
    assert rows.read(4) == 4
    for row in (5, 5):
        try:
            rows.read(row)
        except ValueError:
            continue
        raise AssertionError("a damaged row was read")
    assert (rows.read(6), rows.read(3)) == (6, 3)
