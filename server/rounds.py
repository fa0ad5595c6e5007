"""Rounds: the sites train a head, their replies are screened, and a strategy aggregates them into the next head."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedhead.errors import FedheadError
from fedhead.protocol.actions import EVALUATE, GRADIENT, TRAIN
from fedhead.protocol.heads import HeadReply, HeadRequest
from fedhead.protocol.messages import (
    Manifest,
    Payload,
)
from fedhead.server.exchange import POOL, Exchange
from fedhead.server.messenger import Addresses, Messenger, Reply
from fedhead.server.pooled_lbfgs import GramPreconditioner, PooledLBFGS
from fedhead.server.roster import Roster
from fedhead.server.screening import heaviest, impossible_answers, most_rows, outlying_losses, outlying_updates
from fedhead.server.secure_sum import pool_of, unusable
from fedhead.server.starting_head import HeadForm
from fedhead.server.strategies import (
    UnusableHeadError,
    aggregate_round,
    averages,
    configure_round,
    sample_sites,
    screen,
)
from fedhead.server.strategy_state import AnyArray, restore, state_of
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, SCORE, WIDTHS, FloatArray, HeadSums
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """A head, the exchange that made it, and the seconds this took."""

    number: int
    arrays: Arrays
    made_by: Exchange
    seconds: float


class Rounds:
    """Sends heads to be trained or evaluated; in pooled L-BFGS, a head's gradient comes back instead of a head.

    Args:
        strategy: Flower's, or the user's own.
        messenger: reaches the sites.
        manifest: of the run.
        roster: the sites that take part.
        task: of the run.
        form: names the parameters that train in each round.
        fresh: the state of the strategy before the first round, from which it starts again where others train.
    """

    def __init__(
        self,
        strategy: Strategy,
        messenger: Messenger,
        manifest: Manifest,
        roster: Roster,
        task: Task,
        form: HeadForm,
        fresh: tuple[dict[str, Any], dict[str, AnyArray]],
    ) -> None:
        self._form = form
        self._fresh = fresh
        self._strategy = strategy
        self._messenger = messenger
        self._manifest = manifest
        self._roster = roster
        self._task = task

    @property
    def _width(self) -> int:
        """The number of columns of metrics."""
        return WIDTHS[bool(self._manifest.tune) and self._task.scales_outputs]

    def precondition(self, stats: FeatureStatistics | None, standardisation: tuple[Tensor, Tensor] | None) -> None:
        """Give a strategy of full gradients the pooled Gram matrix, if there is one of the features themselves."""
        if isinstance(self._strategy, PooledLBFGS) and stats is not None and standardisation is not None:
            scale = standardisation[1]
            if len(scale) == stats.num_features:
                self._strategy.preconditioner = GramPreconditioner.from_statistics(stats, scale, self._strategy.penalty)

    def train(self, number: int, head: Arrays) -> Exchange:
        """Have this round's sites train `head`, and evaluate it as it reached them."""
        head = self._form.trained_in(number, head)
        if self._form.begins(number):
            restore(self._strategy, *self._fresh)
        cohort = sample_sites(self._strategy, list(self._roster.nodes), self._manifest.seed, number)
        # An averaging strategy sends all sites the same head, and uses no more than the mean of their replies.
        together = averages(self._strategy) and self._messenger.summation is None
        addresses = self._messenger.addresses({name: self._roster.nodes[name] for name in cohort}, together=together)
        names = {node: name for name, node in addresses.nodes.items()}
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
        action, base = TRAIN, head
        if isinstance(self._strategy, PooledLBFGS):
            action, base = GRADIENT, {name: np.zeros(value.shape) for name, value in head.items()}
        if self._messenger.summation is not None:
            return self._sum(messages, action, base)
        return self._heads(messages, addresses, base)

    def aggregate(self, number: int, head: Arrays, exchange: Exchange) -> Arrays:
        """Return the strategy's aggregate of the replies, or `head` itself if it makes none.

        If the strategy makes a head that overflows, and one reply outweighs the others, it aggregates again without it.

        Raises:
            FedheadError: if there is no reply, or the strategy fails.
        """
        trained = self._form.trained_in(number, head)
        if not exchange.replies:
            raise FedheadError(f"Not one reply of round {number} could be used.{exchange.first_reasons()}")
        before = None if self._messenger.in_process else state_of(self._strategy)
        try:
            made = aggregate_round(self._strategy, number, exchange.replies, trained)
        except UnusableHeadError:
            at = heaviest(trained, [reply.sums.heads for _, reply in exchange.replies])
            if before is None or at is None:
                raise
            restore(self._strategy, *before)
            question, _ = exchange.replies.pop(at)
            node = question.metadata.dst_node_id
            sites = [site for site, each in self._roster.nodes.items() if each == node]
            exchange.drop(sites, "its head makes the aggregate overflow")
            return self.aggregate(number, head, exchange)
        if made is None:
            logger.warning("%s made no head in round %d; the one before stays.", type(self._strategy).__name__, number)
        return {**head, **(made or {})}

    def evaluate(self, number: int, head: Arrays) -> Exchange:
        """Have all sites evaluate the head of round `number`."""
        content = HeadRequest(self._form.evaluated(head), server_round=number).to_content()
        together = self._messenger.summation is None
        addresses = self._messenger.addresses(self._roster.nodes, together=together)
        messages = {name: Message(content, node_id, EVALUATE) for name, node_id in sorted(addresses.nodes.items())}
        if self._messenger.summation is not None:
            return self._sum(messages, EVALUATE, {})
        return self._heads(messages, addresses, {})

    def _sum(self, messages: Mapping[str, Message], action: str, base: Arrays) -> Exchange:
        """Have sites train or evaluate a head, all by one message, and learn only the sum of their updates.

        Args:
            messages: by site name, of one content.
            action: `TRAIN`, `GRADIENT` or `EVALUATE`.
            base: the head that updates are relative to: the one that is sent, or zeros for gradients; empty if it is
                only evaluated.

        Raises:
            FedheadError: if the sum cannot be used.
        """
        assert self._messenger.summation is not None
        first = next(iter(messages.values()))
        if any(message.content is not first.content for message in messages.values()):
            raise FedheadError("Secure summation needs a strategy that sends every site the same head and settings.")
        nodes = {name: message.metadata.dst_node_id for name, message in messages.items()}
        nothing = HeadSums.unchanged(base, self._width)
        summed = self._messenger.summation.total(nodes, action, Payload.from_content(first.content), nothing)
        exchange, total = summed.exchange, summed.total
        if not summed.sites:
            return exchange
        row, made = total.metrics, total.heads
        wrong = outlying_losses({POOL: row}) | self._impossible({POOL: row})
        wrong |= outlying_updates(base, {POOL: made}) if base else {}
        if wrong:
            raise unusable(wrong[POOL])
        exchange.summed = summed.sites
        exchange.metrics = {pool_of(summed.sites): row}
        if base and total.examples:
            exchange.replies = [(first, HeadReply(HeadSums(made, row, self._task.counts_scores), row[None]))]
        return exchange

    def _impossible(self, metrics: Mapping[str, FloatArray]) -> dict[str, str]:
        """Return the sites whose language model's figures no conversations can have, with the reason."""
        if self._form.longest is None:
            return {}
        answers = {site: (row[HELD_OUT], row[SCORE], row[LOSS_SUM]) for site, row in metrics.items()}
        return impossible_answers(answers, self._form.longest)

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

    def _heads(self, messages: Mapping[str, Message], addresses: Addresses, expected: Arrays) -> Exchange:
        """Exchange messages about a head; screen the replies, and order them by site name."""
        heads: dict[str, tuple[Message, HeadReply]] = {}
        metrics: dict[str, FloatArray] = {}
        unusable: dict[str, str] = {}
        like = HeadSums(expected, np.zeros(self._width), self._task.counts_scores)

        def read(answer: Reply) -> None:
            site = answer.sites[0]
            reply = screen(answer.payload, like, self._roster.rows, site, merged=answer.merged)
            unusable.update(reply.dropped)
            metrics.update(zip(reply.sites or (site,), reply.metrics, strict=False))
            # A site may hold out all of its rows; then it evaluates, and its head is no more than the one it was sent.
            if reply.sums.examples:
                heads[site] = (answer.question, reply)

        exchange = self._messenger.send(messages, addresses, read)
        unusable.update(self._impossible(metrics))
        if not self._messenger.in_process:
            unusable.update(outlying_losses(metrics))
            bar = most_rows(self._roster.rows.values())
            used = {site: row[EXAMPLES] + row[HELD_OUT] for site, row in metrics.items()}
            unusable.update(
                {
                    site: f"it uses {rows:.0f} rows; the sites' median allows {bar:.0f}"
                    for site, rows in used.items()
                    if rows > bar
                }
            )
            trained = {site: reply.sums.heads for site, (_, reply) in heads.items()}
            unusable.update(outlying_updates(expected, trained) if expected else {})
        for site, reason in unusable.items():
            exchange.drop([site], reason)
            metrics.pop(site, None)
            # A merged reply does without the sites that it drops.
            if site not in addresses.merged:
                heads.pop(site, None)
        exchange.metrics = metrics
        exchange.replies = [heads[site] for site in sorted(heads)]
        return exchange
