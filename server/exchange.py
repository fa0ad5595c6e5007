"""Exchanges: one message to each site and its reply, with what they took, and who failed or was lost."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhead.messages import METRICS, FloatArray, HeadReply, payload_bytes

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
EXAMPLES, TRAIN_LOSS = METRICS.index("examples"), METRICS.index("train_loss")


@dataclass
class Exchange:
    """What exchanges brought and took.

    Attributes:
        replies: usable heads with the message each answers, by site name.
        metrics: `[len(METRICS)]` of each site that answered usably about a head.
        dropped: sites that did not, with the reason.
        asked: how many messages were sent.
        bytes_down: payload sent.
        bytes_up: payload received.
    """

    replies: list[tuple[Message, HeadReply]] = field(default_factory=list)
    metrics: dict[str, FloatArray] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def drop(self, site: str, reason: str) -> None:
        """Leave a site's reply out, and say so."""
        self.dropped[site] = reason
        logger.warning("A reply of %s is dropped: %s.", site, reason.rstrip("."))

    def first_reasons(self) -> str:
        """Return a sentence for each of the first sites that were dropped, with a space before it."""
        return "".join(f" {name}: {reason.rstrip('.')}." for name, reason in sorted(self.dropped.items())[:3])

    def sums(self) -> FloatArray:
        """Return the metrics `[len(METRICS)]` summed over sites, losses of training weighted by their rows."""
        table = np.array([self.metrics[name] for name in sorted(self.metrics)]).reshape(-1, len(METRICS))
        table[:, TRAIN_LOSS] *= table[:, EXAMPLES]
        total: FloatArray = table.sum(axis=0)
        return total


class Messenger:
    """Sends messages to named sites, and yields what they answer.

    Args:
        grid: where the sites are.
        deadline: seconds to wait for the replies of one exchange.
    """

    def __init__(self, grid: Grid, deadline: float) -> None:
        self.grid = grid
        self.deadline = deadline
        # A Grid in this process may answer for many sites at once; one that answers so has answered all.
        self.in_process = bool(getattr(grid, "merges_replies", False))

    def ask(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send one content to all `nodes`, by name; yield each site's answer as it comes."""
        messages = {name: Message(content, node_id, action) for name, node_id in sorted(nodes.items())}
        for name, _, answer in self.send(messages, exchange):
            yield name, answer

    def send(self, messages: Mapping[str, Message], exchange: Exchange) -> Iterator[tuple[str, Message, RecordDict]]:
        """Send messages; yield each site's name, the message it answers and its answer, as they come.

        Sites that fail, or do not answer within the deadline, are dropped from `exchange` with the reason.
        """
        sizes: dict[int, int] = {}
        exchange.asked += len(messages)
        for message in messages.values():
            if id(message.content) not in sizes:
                sizes[id(message.content)] = payload_bytes(message.content)
            exchange.bytes_down += sizes[id(message.content)]
        waiting = dict(zip(self.grid.push_messages(list(messages.values())), messages, strict=True))
        stop = time.monotonic() + self.deadline
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                # A lost node's error comes from node 1, so the message that is answered names the site.
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is None:
                    continue
                if reply.has_error():
                    exchange.drop(name, reply.error.reason or "it failed without a reason")
                else:
                    yield name, messages[name], reply.content
            if self.in_process:
                return
            if waiting and time.monotonic() > stop:
                for name in waiting.values():
                    exchange.drop(name, f"no reply within {self.deadline:.0f} s")
                return
            time.sleep(POLL_SECONDS if waiting else 0)
