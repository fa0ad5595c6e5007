"""Rows of a file that can only be read sequentially, for readers that request them almost in order."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

KEPT = 64
"""Number of recent rows kept in memory; threads that read ahead overtake each other by fewer."""


class SequentialRows:
    """Rows that are read once if any number of threads requests them almost in order.

    Args:
        start_of: returns the last possible start of reading up to a given row.
        rows_from: yields the rows from such a start, at least up to the next one.
    """

    def __init__(self, start_of: Callable[[int], int], rows_from: Callable[[int], Iterator[Any]]) -> None:
        self._start_of = start_of
        self._rows_from = rows_from
        self._recent: OrderedDict[int, Any] = OrderedDict()
        self._following: Iterator[Any] = iter(())
        self._next = -1
        self._lock = Lock()

    def read(self, row: int) -> Any:
        """Return a row; going back by more than `KEPT` rows restarts reading."""
        with self._lock:
            if row in self._recent:
                return self._recent[row]
            start = self._start_of(row)
            # A row that begins before `start` may end there.
            if not start < self._next <= row:
                self._next, self._following = start, self._rows_from(start)
            try:
                while self._next <= row:
                    self._recent[self._next] = next(self._following)
                    self._next += 1
                    if len(self._recent) > KEPT:
                        self._recent.popitem(last=False)
            except BaseException:
                self._next = -1
                raise
            return self._recent[row]
