"""Threads for work that lasts as long as the process."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0
"""Time before failed work starts again."""


class LastingThread(threading.Thread):
    """A daemon thread whose work starts again after a pause if it fails.

    A failure is logged once, until another kind of failure follows.

    Args:
        work: returns once it is done.
        name: of the thread, and in the log.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._ending = threading.Event()

    def run(self) -> None:
        logged = ""
        while not self._ending.is_set():
            try:
                self._work()
                return
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                if said != logged:
                    logger.warning("The thread %r failed and starts again (%s).", self.name, said)
                logged = said
            self._ending.wait(PAUSE_SECONDS)

    def end(self) -> None:
        """Start the work no more; call it before asking the work to return."""
        self._ending.set()
