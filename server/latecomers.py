"""Sites that connect, are lost or return while a run goes on."""

from dataclasses import dataclass

from flwr.app import Message, RecordDict

from fedhead.messages import DESCRIBE, INSTALL, STANDARDISE, Description, MessageError, payload_bytes
from fedhead.server.exchange import UNREACHABLE, Exchange, Messenger
from fedhead.server.roster import INSTALLING, Roster


@dataclass
class _Arrival:
    """A site on its way into a run.

    Attributes:
        node_id: where it is.
        offset: where the chunk of weights begins that was sent last; None before the first.
        lacking: whether it waits to be sent the weights.
        installing: whether it is being sent them.
        description: what it said of itself when it had the weights.
        ready: whether it may take part.
    """

    node_id: int
    offset: int | None = None
    lacking: bool = False
    installing: bool = False
    description: Description | None = None
    ready: bool = False


class Latecomers:
    """Brings sites into a running run without anybody waiting for them.

    A site that connects late, or returns, is told of the run, given the weights where it lacks them, and told how
    features are standardised; it takes part in the next round after that. Its sums are not asked for: the statistics,
    the standardisation and the head solved from them stay those of the sites that the run began with.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.

    Attributes:
        standardise: tells a site how features are standardised; None before that is known.
        received: how many bytes of weights have arrived at sites.
    """

    def __init__(self, messenger: Messenger, roster: Roster) -> None:
        self.standardise: RecordDict | None = None
        self.received = 0
        self._messenger = messenger
        self._roster = roster
        self._arriving: dict[int, _Arrival] = {}
        self._traffic = Exchange()

    def welcome(self, server_round: int, exchange: Exchange) -> list[str]:
        """Go on without sites that are gone, meet those that came, and admit those that are ready by now.

        Args:
            server_round: the next round.
            exchange: takes the traffic so far.

        Returns:
            The names of those that are admitted.
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
        admitted = []
        for arrival in list(self._arriving.values()):
            if arrival.node_id not in connected:
                del self._arriving[arrival.node_id]
            elif arrival.ready and arrival.description is not None:
                del self._arriving[arrival.node_id]
                self._roster.admit(arrival.description, arrival.node_id, server_round)
                admitted.append(arrival.description.site)
        self._install()
        exchange.add_traffic(self._traffic)
        self._traffic = Exchange()
        self._roster.tell()
        return sorted(admitted)

    def _install(self) -> None:
        """Begin to send the weights to those that lack them, to a few at a time."""
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
                self._turn_away(arrival, reply.error.reason or "It failed.", for_good=reply.error.code != UNREACHABLE)
                return
            try:
                self._messenger.receive((site,), action, payload_bytes(reply.content), self._traffic)
                self._go_on(arrival, action, reply.content)
            except MessageError as error:
                self._turn_away(arrival, str(error))

        self._messenger.post(site, arrival.node_id, action, content, self._traffic, handle)

    def _go_on(self, arrival: _Arrival, action: str, content: RecordDict) -> None:
        """Take the next step with a site that answered to `action`."""
        if action == STANDARDISE:
            arrival.ready = True
            return
        answer = Description.from_content(content)
        verdict = self._roster.judge(answer, arrival.node_id, arrival.offset)
        if verdict == "refused":
            self._turn_away(arrival)
        elif verdict == "fit":
            arrival.description, arrival.installing = answer, False
            if self.standardise is None:
                arrival.ready = True
            else:
                self._send(arrival, STANDARDISE, self.standardise)
        elif action == DESCRIBE:
            arrival.lacking = True
        else:
            self.received += answer.received - (arrival.offset or 0)
            arrival.offset = answer.received
            self._send(arrival, INSTALL, self._roster.weights.chunk(answer.received))

    def _turn_away(self, arrival: _Arrival, reason: str = "", *, for_good: bool = True) -> None:
        """Give a site up: until it connects anew, or only for now."""
        del self._arriving[arrival.node_id]
        if for_good:
            self._roster.turned_away.add(arrival.node_id)
            if reason:
                self._roster.refuse(self._roster.name_of(arrival.node_id), reason)
