"""Sites that connect, disconnect or return during a run."""

from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from fedhead.protocol.actions import DESCRIBE, INSTALL, MAP, STANDARDISE
from fedhead.protocol.messages import Description, MessageError, payload_bytes
from fedhead.server.exchange import Exchange
from fedhead.server.installing import INSTALLING
from fedhead.server.messenger import UNREACHABLE, Messenger
from fedhead.server.roster import Roster
from fedhead.wording import one_line


@dataclass
class _Arrival:
    """A site that is joining a run.

    Attributes:
        node_id: its node.
        offset: the offset of the last chunk of weights that was sent; None before the first.
        lacking: whether it waits for the weights.
        installing: whether the weights are being sent to it.
        description: its description, once it has the weights.
        ready: whether it may take part.
        told: the messages sent to introduce it, by action.
    """

    node_id: int
    offset: int | None = None
    lacking: bool = False
    installing: bool = False
    description: Description | None = None
    ready: bool = False
    told: dict[str, RecordDict] = field(default_factory=dict)


class Latecomers:
    """Admits sites to a running run without making other sites wait.

    A site that connects late, or returns, receives the manifest, the weights if it lacks them, the map of features
    and the standardisation; it takes part in the next round. Its sums are not requested: the statistics, the
    standardisation and the solved head remain those of the sites that the run began with.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.

    Attributes:
        introduction: the messages that follow the manifest, by action: the map of features if there is one, and their
            mean and scale once they are known.
        received: bytes of weights that have arrived at sites, each counted once.
    """

    def __init__(self, messenger: Messenger, roster: Roster) -> None:
        self.introduction: dict[str, RecordDict] = {}
        self.received = 0
        self._messenger = messenger
        self._roster = roster
        self._arriving: dict[int, _Arrival] = {}
        self._reached: dict[int, int] = {}
        self._exchange = Exchange()

    def welcome(self, server_round: int) -> Exchange:
        """Drop sites that are gone, contact those that connected, and admit those that are ready.

        Args:
            server_round: the next round.

        Returns:
            The traffic since the last call, and the sites that are admitted as `joined`.
        """
        connected = set(self._messenger.grid.get_node_ids())
        for site, node_id in list(self._roster.nodes.items()):
            if node_id not in connected:
                self._roster.lose(site, "it is not connected")
        self._roster.turned_away &= connected
        known = {*self._roster.nodes.values(), *self._roster.turned_away, *self._arriving}
        for node_id in sorted(connected - known):
            self._arriving[node_id] = _Arrival(node_id)
            self._send(self._arriving[node_id], DESCRIBE, self._roster.description())
        exchange = self._exchange
        for arrival in list(self._arriving.values()):
            if arrival.node_id not in connected:
                del self._arriving[arrival.node_id]
            elif arrival.ready and arrival.description is not None:
                # The run may have gone on since.
                self._introduce(arrival)
                if not arrival.ready:
                    continue
                del self._arriving[arrival.node_id]
                self._roster.admit(arrival.description, arrival.node_id, server_round)
                exchange.joined.append(arrival.description.site)
        self._install()
        self._exchange = Exchange()
        self._roster.tell()
        exchange.joined.sort()
        return exchange

    def _install(self) -> None:
        """Begin to send the weights to sites that lack them, to a few at a time."""
        free = INSTALLING - sum(arrival.installing for arrival in self._arriving.values())
        waiting = [arrival for arrival in self._arriving.values() if arrival.lacking]
        for arrival in waiting[: max(free, 0)]:
            arrival.lacking, arrival.installing = False, True
            self._send(arrival, INSTALL, self._roster.weights.question())

    def _send(self, arrival: _Arrival, action: str, content: RecordDict) -> None:
        site = self._roster.name_of(arrival.node_id)

        def handle(reply: Message) -> None:
            if self._arriving.get(arrival.node_id) is not arrival:
                return
            if reply.has_error():
                reason = one_line(reply.error.reason or "It failed.")
                self._turn_away(arrival, reason, for_good=reply.error.code != UNREACHABLE)
                return
            try:
                count = payload_bytes(reply.content)
                self._messenger.traffic.received((site,), action, count)
                self._exchange.bytes_up += count
                self._go_on(arrival, action, reply.content)
            except MessageError as error:
                self._turn_away(arrival, one_line(str(error)))

        self._exchange.bytes_down += self._messenger.post(site, arrival.node_id, action, content, handle)

    def _go_on(self, arrival: _Arrival, action: str, content: RecordDict) -> None:
        """Take the next step with a site that answered `action`."""
        if action in (MAP, STANDARDISE):
            self._introduce(arrival)
            return
        answer = Description.from_content(content)
        verdict = self._roster.judge(answer, arrival.node_id, arrival.offset)
        if verdict == "refused":
            self._turn_away(arrival)
        elif verdict == "fit":
            arrival.description, arrival.installing = answer, False
            self._introduce(arrival)
        elif action == DESCRIBE:
            arrival.lacking = True
        else:
            self._note_received(arrival.node_id, answer.received)
            arrival.offset = answer.received
            self._send(arrival, INSTALL, self._roster.weights.chunk(answer.received))

    def _introduce(self, arrival: _Arrival) -> None:
        """Send the next message of the introduction; after the last one, the site may take part."""
        for action, content in self.introduction.items():
            if arrival.told.get(action) is not content:
                arrival.told[action], arrival.ready = content, False
                self._send(arrival, action, content)
                return
        arrival.ready = True

    def _note_received(self, node_id: int, received: int) -> None:
        """Count bytes once, as a site that connects again and again must not prolong the wait for others."""
        more = min(received, self._roster.weights.size) - self._reached.get(node_id, 0)
        if more > 0:
            self.received += more
            self._reached[node_id] = self._reached.get(node_id, 0) + more

    def _turn_away(self, arrival: _Arrival, reason: str = "", *, for_good: bool = True) -> None:
        """Turn a site away until it reconnects, or only for now."""
        del self._arriving[arrival.node_id]
        if for_good:
            self._roster.turned_away.add(arrival.node_id)
            if reason:
                self._roster.refuse(self._roster.name_of(arrival.node_id), reason)
