"""Sends the backbone's weights to several sites at once, each at its own pace."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flwr.app import Message

from fedhead.protocol.actions import INSTALL
from fedhead.protocol.messages import Description
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger, Reply
from fedhead.server.timeout import Timeout

if TYPE_CHECKING:
    from fedhead.server.roster import Roster

INSTALLING = 16
"""Number of sites that receive weights at the same time."""


class Installation:
    """Sends the weights to sites that lack them, from the byte where each was interrupted, and admits those that fit.

    A site's next chunk leaves once it has confirmed the last one, whatever the others do. A site that does not answer
    a chunk within the deadline counts as late. So do those that still lack weights once other sites have waited that
    long since the last one was completed; they receive the rest as sites that come late do.

    Args:
        messenger: reaches the sites.
        roster: admits the sites.
        lacking: the nodes of the sites, by name.
    """

    def __init__(self, messenger: Messenger, roster: "Roster", lacking: Mapping[str, int]) -> None:
        self._messenger = messenger
        self._roster = roster
        self._nodes = lacking
        self._waiting = list(lacking)
        self._active: dict[str, tuple[str, Timeout]] = {}
        self._exchange = Exchange()
        self._timeout = Timeout(messenger.deadline)
        self._answered = 0

    def run(self) -> Exchange:
        """Send until no site is left; return the traffic, and the sites that were dropped or late."""
        while self._waiting or self._active:
            while self._waiting and len(self._active) < INSTALLING:
                self._send(self._waiting.pop(0), None)
            answered = self._answered
            self._messenger.poll()
            if not self._roster.nodes:
                # Nobody waits for these sites yet.
                self._timeout.restart()
            if self._active and self._answered == answered:
                self._messenger.rest()
            for site, (_, timeout) in list(self._active.items()):
                if timeout.over or self._timeout.over:
                    self._leave(site)
            if self._timeout.over:
                for site in self._waiting:
                    self._skip(site, "it has not received the weights yet")
                self._waiting.clear()
            self._roster.tell()
        return self._exchange

    def _send(self, site: str, offset: int | None) -> None:
        """Send a chunk, or ask for the number of received bytes; the reply triggers the next chunk."""
        weights = self._roster.weights
        content = weights.question() if offset is None else weights.chunk(offset)
        answers: list[Description] = []

        def read(reply: Reply) -> None:
            answers.append(Description.from_content(reply.content))

        def handle(reply: Message) -> None:
            del self._active[site]
            self._answered += 1
            self._messenger.take(reply, question, (site,), False, read, self._exchange)
            if answers:
                self._judge(site, answers[0], offset)

        question = Message(content, self._nodes[site], INSTALL)
        message_id, count = self._messenger.post_message(site, question, handle)
        self._exchange.asked += 1
        self._exchange.bytes_down += count
        self._active[site] = message_id, Timeout(self._messenger.deadline)

    def _judge(self, site: str, answer: Description, offset: int | None) -> None:
        verdict = self._roster.judge(answer, self._nodes[site], offset)
        if verdict == "lacking":
            self._send(site, answer.received)
        elif verdict == "fit":
            self._roster.admit(answer, self._nodes[site])
            self._timeout.restart()

    def _leave(self, site: str) -> None:
        message_id, timeout = self._active.pop(site)
        self._messenger.give_up([message_id])
        silent = f"no reply within {timeout.seconds:.0f} s"
        self._skip(site, silent if timeout.over else "it has not received all of the weights yet")

    def _skip(self, site: str, reason: str) -> None:
        self._exchange.drop([site], reason)
        self._exchange.late.add(site)
