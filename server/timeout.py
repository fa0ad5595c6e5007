"""A timeout that can be restarted."""

import time

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 30.0
"""Seconds before the first repetition, and the most before any."""


class Timeout:
    """A limit on one wait.

    Args:
        seconds: from now.

    Attributes:
        reason: the reason for the wait that was given last.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reason = ""
        self._pause = FIRST_PAUSE
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self._stop = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._stop

    def next_pause(self) -> float:
        """Return the seconds to wait before the next repetition: twice as long each time."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause
