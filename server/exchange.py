"""Exchanges: one message to each site and its reply, with what they took, and who failed or was lost."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhead.messages import METRICS, UNDESCRIBED, FloatArray, HeadReply, payload_bytes

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
UNREACHABLE = 6
"""Flower's code of a node that is unavailable."""
EXAMPLES, TRAIN_LOSS = METRICS.index("examples"), METRICS.index("train_loss")


@runtime_checkable
class Forgetful(Protocol):
    """A Grid that can be told what is no longer waited for."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop these messages, and replies to them."""


@runtime_checkable
class Attentive(Protocol):
    """A Grid that knows when answers come."""

    def wait(self, seconds: float) -> None:
        """Return once an answer has come since the last pull or wait, or after `seconds`."""


@dataclass
class Exchange:
    """What exchanges brought and took.

    Attributes:
        replies: usable heads with the message each answers, by site name.
        metrics: `[len(METRICS)]` of each site that answered usably about a head.
        dropped: sites that did not, with the reason.
        late: those of `dropped` that did not answer in time, are gone, or no longer know of the run.
        joined: sites that came late or returned, and took part for the first time since.
        asked: how many messages were sent.
        bytes_down: payload sent.
        bytes_up: payload received.
    """

    replies: list[tuple[Message, HeadReply]] = field(default_factory=list)
    metrics: dict[str, FloatArray] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    joined: list[str] = field(default_factory=list)
    asked: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def drop(self, site: str, reason: str) -> None:
        """Leave a site's reply out, and say so."""
        self.dropped[site] = reason
        logger.warning("A reply of %s is dropped: %s.", site, reason.rstrip("."))

    def add_traffic(self, other: "Exchange") -> None:
        """Count what `other` took as this exchange's."""
        self.bytes_down += other.bytes_down
        self.bytes_up += other.bytes_up

    def first_reasons(self) -> str:
        """Return a sentence for each of the first sites that were dropped, with a space before it."""
        return "".join(f" {name}: {reason.rstrip('.')}." for name, reason in sorted(self.dropped.items())[:3])

    def sums(self) -> FloatArray:
        """Return the metrics `[len(METRICS)]` summed over sites, losses of training weighted by their rows."""
        table = np.array([self.metrics[name] for name in sorted(self.metrics)]).reshape(-1, len(METRICS))
        table[:, TRAIN_LOSS] *= table[:, EXAMPLES]
        total: FloatArray = table.sum(axis=0)
        return total


@runtime_checkable
class MergingGrid(Protocol):
    """A Grid in this process, that can answer one message for many sites."""

    merges_replies: bool

    def together(self, node_ids: Sequence[int]) -> tuple[int | None, list[int]]:
        """Return a node that stands for those of `node_ids` that can answer together, if any can, and all others."""


@dataclass
class Traffic:
    """Payload by site and by action, over all exchanges of a run.

    Attributes:
        down: bytes sent to each site.
        up: bytes that each site sent.
        action_down: bytes sent for each action.
        action_up: bytes of the answers to it.
        answers: how many answers came.
    """

    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    action_down: Counter[str] = field(default_factory=Counter)
    action_up: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def sent(self, sites: Sequence[str], action: str, count: int) -> None:
        """Note a message of `count` bytes to each of some sites."""
        for site in sites:
            self.down[site] += count
        self.action_down[action] += count * len(sites)

    def received(self, sites: Sequence[str], action: str, count: int) -> None:
        """Note the answers of sites, of `count` bytes in all."""
        for site in sites:
            self.up[site] += count // len(sites)
        self.action_up[action] += count
        self.answers[action] += len(sites)

    def rename(self, node: str, site: str) -> None:
        """Count what was sent to a node for the site that it turned out to be."""
        self.down[site] += self.down.pop(node, 0)

    def to_dict(self) -> dict[str, dict[str, list[int]]]:
        """Return bytes down and up of each site, and answers, bytes down and bytes up of each action."""
        return {
            "sites": {site: [self.down[site], self.up[site]] for site in sorted(self.down.keys() | self.up.keys())},
            "actions": {
                action: [self.answers[action], count, self.action_up[action]]
                for action, count in self.action_down.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Sequence[int]]]) -> Self:
        """Read what `to_dict` returned."""
        sites, actions = values["sites"], values["actions"]
        return cls(
            down=Counter({site: down for site, (down, _) in sites.items()}),
            up=Counter({site: up for site, (_, up) in sites.items()}),
            action_down=Counter({action: down for action, (_, down, _) in actions.items()}),
            action_up=Counter({action: up for action, (_, _, up) in actions.items()}),
            answers=Counter({action: answers for action, (answers, _, _) in actions.items()}),
        )


Handler = Callable[[Message], None]


class Messenger:
    """Sends messages to named sites, and yields what they answer.

    Of a Grid it needs `get_node_ids`, which lists the nodes that are connected now, and `push_messages` and
    `pull_messages`, which may answer with an error for a node that is lost. It uses, where a Grid has them,
    `site_name(node_id)`, the name that a node is registered under, `forget(message_ids)`, to which it says what it
    no longer waits for, and `wait(seconds)`, which returns early where an answer comes.

    Args:
        grid: where the sites are.
        deadline: seconds to wait for the replies of one exchange.

    Attributes:
        traffic: what went to the sites and came back; who reads an answer notes it there.
    """

    def __init__(self, grid: Grid, deadline: float) -> None:
        self.grid = grid
        self.deadline = deadline
        self.traffic = Traffic()
        # A Grid in this process may answer for many sites at once; one that answers so has answered all.
        self.in_process = isinstance(grid, MergingGrid) and grid.merges_replies
        self._posted: dict[str, Handler] = {}

    def post(
        self, site: str, node_id: int, action: str, content: RecordDict, exchange: Exchange, handler: Handler
    ) -> None:
        """Send a message that nobody waits for; its answer goes to `handler` when others' are awaited, or at `poll`."""
        count = payload_bytes(content)
        exchange.bytes_down += count
        self.traffic.sent((site,), action, count)
        (message_id,) = self.grid.push_messages([Message(content, node_id, action)])
        self._posted[message_id] = handler

    def poll(self) -> None:
        """Take in answers to what was posted, as far as they are there."""
        if self._posted:
            for reply in self.grid.pull_messages(list(self._posted)):
                self._hand_over(reply)

    def _hand_over(self, reply: Message) -> None:
        handler = self._posted.pop(reply.metadata.reply_to_message_id, None)
        if handler is not None:
            handler(reply)

    def receive(self, sites: Sequence[str], action: str, count: int, exchange: Exchange) -> None:
        """Note the `count` bytes of an answer, of one site or merged of several."""
        exchange.bytes_up += count
        self.traffic.received(sites, action, count)

    def ask(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send one content to all `nodes`, by name; yield each site's answer as it comes."""
        messages = {name: Message(content, node_id, action) for name, node_id in sorted(nodes.items())}
        for name, _, answer in self.send(messages, exchange):
            yield name, answer

    def ask_together(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> Iterator[tuple[tuple[str, ...], RecordDict]]:
        """Do as `ask` does, but take one answer for several sites where the Grid gives one; yield whose it is."""
        addresses, spoken = self.group(nodes)
        messages = {name: Message(content, node_id, action) for name, node_id in sorted(addresses.items())}
        for name, _, answer in self.send(messages, exchange, spoken):
            yield spoken.get(name, (name,)), answer

    def group(self, nodes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        """Return the nodes to send to instead of `nodes`, by name, and those that answer for several sites, for whom.

        Such a node goes by the name of the first of its sites.
        """
        if not self.in_process:
            return dict(nodes), {}
        assert isinstance(self.grid, MergingGrid)
        stand_in, alone = self.grid.together(list(nodes.values()))
        apart = set(alone)
        names = tuple(name for name, node in nodes.items() if node not in apart)
        addresses = {name: node for name, node in nodes.items() if node in apart}
        if stand_in is None or not names:
            return addresses, {}
        return {**addresses, names[0]: stand_in}, {names[0]: names}

    def send(
        self,
        messages: Mapping[str, Message],
        exchange: Exchange,
        spoken: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Iterator[tuple[str, Message, RecordDict]]:
        """Send messages; yield each site's name, the message it answers and its answer, as they come.

        Sites that fail, or do not answer within the deadline, are dropped from `exchange` with the reason.

        Args:
            messages: by the name of who is to answer.
            exchange: takes the traffic.
            spoken: for whom those answer who answer for several, see `group`.
        """
        spoken = spoken or {}
        sizes: dict[int, int] = {}
        exchange.asked += sum(len(spoken.get(name, (name,))) for name in messages)
        for asked, message in messages.items():
            if id(message.content) not in sizes:
                sizes[id(message.content)] = payload_bytes(message.content)
            sites = spoken.get(asked, (asked,))
            exchange.bytes_down += sizes[id(message.content)] * len(sites)
            self.traffic.sent(sites, message.metadata.message_type, sizes[id(message.content)])
        waiting = dict(zip(self.grid.push_messages(list(messages.values())), messages, strict=True))
        stop = time.monotonic() + self.deadline
        while waiting:
            for reply in self.grid.pull_messages([*waiting, *self._posted]):
                # A lost node's error comes from node 1, so the message that is answered names the site.
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is None:
                    self._hand_over(reply)
                    continue
                if reply.has_error():
                    reason = reply.error.reason or "it failed without a reason"
                    for site in spoken.get(name, (name,)):
                        exchange.drop(site, reason)
                    if reply.error.code == UNREACHABLE or UNDESCRIBED in reason:
                        exchange.late.update(spoken.get(name, (name,)))
                else:
                    yield name, messages[name], reply.content
            if self.in_process:
                return
            if waiting and time.monotonic() > stop:
                for name in waiting.values():
                    exchange.drop(name, f"no reply within {self.deadline:.0f} s")
                exchange.late.update(waiting.values())
                if isinstance(self.grid, Forgetful):
                    self.grid.forget(list(waiting))
                return
            if waiting:
                self.rest()

    def rest(self) -> None:
        """Wait a little, and no longer than until another answer is there where the Grid can tell."""
        if isinstance(self.grid, Attentive):
            self.grid.wait(POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
