"""Rounds: a head goes to the sites, what they make of it comes back screened, and a strategy makes the next."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import Strategy

from fedhead.errors import FedheadError
from fedhead.messages import EVALUATE, Arrays, HeadReply, HeadRequest, Manifest, MessageError
from fedhead.server.exchange import EXAMPLES, Exchange, Messenger
from fedhead.server.roster import Roster
from fedhead.server.strategies import aggregate_round, averages, configure_round, sample_sites, screen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A head, the exchange that made it, and the seconds this took."""

    number: int
    arrays: Arrays
    made_by: Exchange
    seconds: float


class Rounds:
    """Sends heads to be trained or evaluated.

    Args:
        strategy: Flower's, or the user's own.
        messenger: reaches the sites.
        manifest: of the run.
        roster: the sites that take part.
    """

    def __init__(self, strategy: Strategy, messenger: Messenger, manifest: Manifest, roster: Roster) -> None:
        self._strategy = strategy
        self._messenger = messenger
        self._manifest = manifest
        self._roster = roster

    def train(self, number: int, head: Arrays) -> Exchange:
        """Have this round's sites train `head`, and evaluate it as it reached them."""
        cohort = sample_sites(self._strategy, list(self._roster.nodes), self._manifest.seed, number)
        addresses = {name: self._roster.nodes[name] for name in cohort}
        spoken: Mapping[str, tuple[str, ...]] = {}
        if averages(self._strategy):
            # Such a strategy tells all sites the same, and sees nothing but the mean of what they answer.
            addresses, spoken = self._messenger.group(addresses)
        names = {node: name for name, node in addresses.items()}
        messages: dict[str, Message] = {}
        packed: dict[int, RecordDict] = {}
        records = []
        for message in configure_round(self._strategy, number, head, self._messenger.grid, list(names)):
            # A strategy gives most sites one and the same record: pack it once.
            records.append(message.content)  # kept, so that no other gets its id
            if id(message.content) not in packed:
                everyone = len(cohort) == len(self._roster.nodes)
                packed[id(message.content)] = self._request(message.content, number, everyone).to_content()
            message.content = packed[id(message.content)]
            messages[names[message.metadata.dst_node_id]] = message
        return self._heads(messages, head, spoken)

    def aggregate(self, number: int, head: Arrays, exchange: Exchange) -> Arrays:
        """Return what the strategy makes of the replies; `head`, which was trained, if it makes none.

        Raises:
            FedheadError: if there is no reply, or the strategy fails.
        """
        if not exchange.replies:
            raise FedheadError(f"Not one reply of round {number} could be used.{exchange.first_reasons()}")
        made = aggregate_round(self._strategy, number, exchange.replies, head)
        if made is None:
            logger.warning("%s made no head in round %d; the one before stays.", type(self._strategy).__name__, number)
        return made or head

    def evaluate(self, number: int, head: Arrays) -> Exchange:
        """Have all sites evaluate the head of round `number`."""
        content = HeadRequest(head, server_round=number).to_content()
        addresses, spoken = self._messenger.group(self._roster.nodes)
        messages = {name: Message(content, node_id, EVALUATE) for name, node_id in sorted(addresses.items())}
        return self._heads(messages, {}, spoken)

    def _request(self, record: RecordDict, number: int, everyone: bool) -> HeadRequest:
        (arrays,) = record.array_records.values()
        settings = {key: value for config in record.config_records.values() for key, value in config.items()}
        mu = settings.get("proximal-mu")
        return HeadRequest(
            {name: array.numpy() for name, array in arrays.items()},
            server_round=number,
            proximal_mu=float(mu) if isinstance(mu, int | float) else None,
            everyone=everyone,
        )

    def _heads(
        self, messages: Mapping[str, Message], expected: Arrays, spoken: Mapping[str, tuple[str, ...]]
    ) -> Exchange:
        """Exchange messages about a head; screen what comes back, and order it by site name."""
        exchange = Exchange()
        replies: dict[str, tuple[Message, HeadReply]] = {}
        for name, instruction, content in self._messenger.send(messages, exchange, spoken):
            try:
                reply = screen(content, expected, self._roster.rows, name, merged=name in spoken)
            except MessageError as error:
                exchange.drop(name, str(error))
                continue
            answered = (*reply.sites, *reply.dropped) or (name,)
            self._messenger.receive(answered, instruction.metadata.message_type, reply.num_bytes, exchange)
            for site, reason in reply.dropped.items():
                exchange.drop(site, reason)
            exchange.metrics.update(zip(reply.sites or (name,), reply.metrics, strict=False))
            # A site may hold out all of its rows; then it evaluates, and its head is no more than the one it was sent.
            if reply.metrics[:, EXAMPLES].any():
                replies[name] = (instruction, reply)
        exchange.replies = [replies[name] for name in sorted(replies)]
        return exchange
