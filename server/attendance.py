"""Waiting for sites: until enough are connected, after too few answers, and for the earlier sites of a resumed run."""

import time
from collections.abc import Collection

from fedhead.errors import FedheadError
from fedhead.server.exchange import Exchange
from fedhead.server.latecomers import Latecomers
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer
from fedhead.server.roster import Roster
from fedhead.server.timeout import Timeout

RETURN_SECONDS = 60.0
"""Time that a resumed run waits for the sites that it had; sites that come later join later."""


class Attendance:
    """Keeps a run waiting until enough sites are connected.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        latecomers: admits sites that come.
        observer: notified of waiting.
        needed: the number of sites that the run needs.
        deadline: of waiting, in seconds.
        hint: advice if the run ends for lack of sites; may be empty.

    Attributes:
        joined: sites that came since the last round.
    """

    def __init__(
        self,
        messenger: Messenger,
        roster: Roster,
        latecomers: Latecomers,
        observer: Observer,
        needed: int,
        deadline: float,
        hint: str = "",
    ) -> None:
        self.needed = needed
        self.joined: list[str] = []
        self._messenger = messenger
        self._roster = roster
        self._latecomers = latecomers
        self._observer = observer
        self._deadline = deadline
        self._hint = f" {hint}" if hint else ""

    @property
    def shortage(self) -> str:
        """A sentence on the lack of sites; empty if there are enough."""
        return self._roster.shortage(self.needed)

    def timeout(self) -> Timeout:
        """Return a timeout of the deadline from now on."""
        return Timeout(self._deadline)

    def take_joined(self) -> list[str]:
        """Return the sites that came since the last call, in the order of names."""
        joined, self.joined = sorted(set(self.joined)), []
        return joined

    def await_sites(self, number: int, timeout: Timeout | None = None) -> Exchange:
        """Continue without sites that are gone, admit those that came, and wait until they are enough.

        Args:
            number: the next round.
            timeout: for waiting; by default the deadline from now on.

        Returns:
            The traffic of sites that came.

        Raises:
            FedheadError: if they are not within the deadline; time in which sites receive weights does not count.
        """
        timeout = timeout or self.timeout()
        received, exchange = self._latecomers.received, Exchange()
        while True:
            if not self._messenger.in_process:
                self._messenger.poll()
                arrivals = self._latecomers.welcome(number)
                exchange.add_traffic(arrivals)
                self.joined += arrivals.joined
            if self._latecomers.received > received:
                received = self._latecomers.received
                timeout.restart()
            if not (shortage := self.shortage):
                return exchange
            self._wait_for_more(timeout, shortage)

    def await_return(self, known: Collection[str], number: int) -> Exchange:
        """Wait for the sites that a resumed run had, for `RETURN_SECONDS` at most; other sites count as joined.

        Args:
            known: their names.
            number: the next round.

        Returns:
            The traffic of sites that came.
        """
        exchange, joined = Exchange(), set(self._roster.nodes) - set(known)
        timeout = Timeout(min(RETURN_SECONDS, self._deadline))
        while not self._messenger.in_process and not timeout.over:
            if not set(known) - self._roster.nodes.keys() - self._roster.refused.keys():
                break
            self._messenger.rest()
            self._messenger.poll()
            arrivals = self._latecomers.welcome(number)
            exchange.add_traffic(arrivals)
            joined |= set(arrivals.joined) - set(known)
        self.joined = sorted(joined)
        return exchange

    def skip_late(self, exchange: Exchange) -> None:
        """Continue without sites that were late or lost; they take part again once they return."""
        for site in sorted(exchange.late):
            self._roster.lose(site, exchange.dropped[site])
        self._roster.tell()

    def pause_before_repeat(self, timeout: Timeout, shortage: str) -> None:
        """Wait before sites are asked the same again, longer each time.

        One site that never answers usably would otherwise use up the other sites' budgets of releases.

        Raises:
            FedheadError: if the time is over, or waiting cannot help.
        """
        self._wait_for_more(timeout, shortage)
        stop = time.monotonic() + timeout.next_pause()
        while time.monotonic() < stop and not timeout.over:
            self._messenger.rest()
            self._messenger.poll()

    def wait_to_sum_again(self, failed: Exchange, timeout: Timeout) -> Exchange:
        """Wait for enough sites after a secure sum that too few finished; return the traffic of those that came.

        Raises:
            FedheadError: if they are not there until the deadline has passed.
        """
        self.skip_late(failed)
        self.pause_before_repeat(
            timeout,
            f"Too few sites finished a secure sum, which revealed nothing; it is done again.{failed.first_reasons()}",
        )
        return self.await_sites(0, timeout)

    def _wait_for_more(self, timeout: Timeout, shortage: str) -> None:
        """Wait a little for more sites, and say why.

        Raises:
            FedheadError: if the time is over, or waiting cannot help.
        """
        if self._messenger.in_process:
            raise FedheadError(shortage)
        if timeout.over:
            raise FedheadError(f"{shortage} This did not change within {timeout.seconds:.0f} s.{self._hint}")
        if shortage != timeout.reason:
            timeout.reason = shortage
            self._observer.on_waiting(shortage)
        self._messenger.rest()
