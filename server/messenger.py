"""The messenger: sends messages to named sites, and hands each reply to its reader."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhead.protocol.fields import MOST_ROWS
from fedhead.protocol.messages import UNDESCRIBED, MessageError, Payload, payload_bytes
from fedhead.server.exchange import Exchange
from fedhead.server.grid import SiteGrid
from fedhead.server.timeout import Timeout
from fedhead.server.traffic import Traffic
from fedhead.wording import one_line

if TYPE_CHECKING:
    from fedhead.server.secure_sum import Summation

POLL_SECONDS = 0.05
UNREACHABLE = 6
"""Flower's code of a node that is unavailable."""


@dataclass(frozen=True)
class Reply:
    """One reply of a site, or one reply for several sites of this process.

    Attributes:
        sites: the sites that it speaks for.
        content: the reply.
        question: the message that it answers.
        merged: whether it may speak for several sites.
    """

    sites: tuple[str, ...]
    content: RecordDict
    question: Message
    merged: bool

    @cached_property
    def payload(self) -> Payload:
        """The content, parsed once.

        Raises:
            MessageError: if it is invalid.
        """
        return Payload.from_content(self.content)

    @property
    def num_bytes(self) -> int:
        """The size of the payload; of a merged reply, the size of its sites' single replies."""
        # Only a Grid in this process may say how long the replies of single sites would be.
        said = self.payload.values.get("num_bytes") if self.merged else None
        return said if isinstance(said, int) and 0 <= said <= MOST_ROWS else payload_bytes(self.content)


Reader = Callable[[Reply], None]
"""Checks and uses a reply; its `MessageError` or `ValueError` drops the reply, with its text as the reason."""

Handler = Callable[[Message], None]


@dataclass(frozen=True)
class Addresses:
    """The recipients of a question.

    Attributes:
        nodes: by name; a node that answers for several sites has the name of the first of them.
        merged: the sites that such a node answers for.
    """

    nodes: Mapping[str, int]
    merged: Mapping[str, tuple[str, ...]]

    def sites(self, name: str) -> tuple[str, ...]:
        """Return the sites that the node of this name answers for."""
        return self.merged.get(name, (name,))


class Messenger:
    """Sends messages to named sites, and hands over their replies.

    It needs `get_node_ids`, `push_messages` and `pull_messages` of a Grid, which may answer with an error for a node
    that is lost; of a `SiteGrid` it uses the rest as well.

    Args:
        grid: where the sites are.
        deadline: seconds to wait for the replies of one exchange.

    Attributes:
        traffic: payload by site and by action.
        in_process: whether all sites are in this process.
        summation: how sums are asked for under secure summation; None without it.
    """

    def __init__(self, grid: Grid, deadline: float) -> None:
        self.grid = grid
        self.deadline = deadline
        self.traffic = Traffic()
        self._site_grid = grid if isinstance(grid, SiteGrid) else None
        self.in_process = self._site_grid is not None and self._site_grid.in_process
        self.summation: Summation | None = None
        self._posted: dict[str, Handler] = {}

    def registered_name(self, node_id: int) -> str | None:
        """Return the name that a node is registered under; None if the Grid does not know."""
        return self._site_grid.site_name(node_id) if self._site_grid is not None else None

    def post(self, site: str, node_id: int, action: str, content: RecordDict, handler: Handler) -> int:
        """Send a message without waiting for the reply, which goes to `handler` at the next pull or `poll`.

        Returns:
            The size of the payload in bytes.
        """
        return self.post_message(site, Message(content, node_id, action), handler)[1]

    def post_message(self, site: str, message: Message, handler: Handler) -> tuple[str, int]:
        """Send a message as `post` does.

        Returns:
            The message's id, to give it up by, and the size of the payload in bytes.
        """
        count = payload_bytes(message.content)
        self.traffic.sent((site,), message.metadata.message_type, count)
        (message_id,) = self.grid.push_messages([message])
        self._posted[message_id] = handler
        return message_id, count

    def give_up(self, message_ids: Sequence[str]) -> None:
        """Forget messages, and the handlers of posted ones."""
        for message_id in message_ids:
            self._posted.pop(message_id, None)
        if self._site_grid is not None:
            self._site_grid.forget(message_ids)

    def poll(self) -> None:
        """Hand over the replies to posted messages that have arrived."""
        if self._posted:
            for reply in self.grid.pull_messages(list(self._posted)):
                self._hand_over(reply)

    def _hand_over(self, reply: Message) -> None:
        handler = self._posted.pop(reply.metadata.reply_to_message_id, None)
        if handler is not None:
            handler(reply)

    def addresses(self, nodes: Mapping[str, int], *, together: bool = True) -> Addresses:
        """Return where to send a question for the sites of `nodes`; `together`, one reply may speak for several."""
        if not together or self._site_grid is None:
            return Addresses(nodes, {})
        stand_ins, alone = self._site_grid.together(list(nodes.values()))
        names = {node: name for name, node in nodes.items()}
        addresses, merged = {names[node]: node for node in alone}, {}
        for stand_in, group in stand_ins.items():
            sites = tuple(names[node] for node in group)
            addresses[sites[0]], merged[sites[0]] = stand_in, sites
        return Addresses(addresses, merged)

    def ask(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, read: Reader, *, together: bool = True
    ) -> Exchange:
        """Send one content to all sites of `nodes`, and read their replies as they come.

        Args:
            nodes: the sites, by name.
            action: the request.
            content: the message.
            read: is called with each reply.
            together: whether one reply may speak for several sites of this process.

        Returns:
            The traffic, and the sites whose replies were dropped or did not come within the deadline.
        """
        addresses = self.addresses(nodes, together=together)
        messages = {name: Message(content, node_id, action) for name, node_id in sorted(addresses.nodes.items())}
        return self.send(messages, addresses, read)

    def send(self, messages: Mapping[str, Message], addresses: Addresses, read: Reader) -> Exchange:
        """Send a message to each of `addresses`, by name, and read the replies as they come; see `ask`."""
        exchange = Exchange()
        self._note_sent(messages, addresses, exchange)
        waiting = dict(zip(self.grid.push_messages(list(messages.values())), messages, strict=True))
        timeout = Timeout(self.deadline)
        while waiting:
            for message in self.grid.pull_messages([*waiting, *self._posted]):
                # A lost node's error comes from node 1, so the message that is answered names the site.
                name = waiting.pop(message.metadata.reply_to_message_id, None)
                if name is None:
                    self._hand_over(message)
                    continue
                self.take(message, messages[name], addresses.sites(name), name in addresses.merged, read, exchange)
            if self.in_process:
                break
            if waiting and timeout.over:
                exchange.drop(waiting.values(), f"no reply within {self.deadline:.0f} s")
                exchange.late.update(waiting.values())
                self.give_up(list(waiting))
                break
            if waiting:
                self.rest()
        return exchange

    def _note_sent(self, messages: Mapping[str, Message], addresses: Addresses, exchange: Exchange) -> None:
        sizes: dict[int, int] = {}
        for name, message in messages.items():
            if id(message.content) not in sizes:
                sizes[id(message.content)] = payload_bytes(message.content)
            sites = addresses.sites(name)
            exchange.asked += len(sites)
            exchange.bytes_down += sizes[id(message.content)] * len(sites)
            self.traffic.sent(sites, message.metadata.message_type, sizes[id(message.content)])

    def take(
        self,
        message: Message,
        question: Message,
        sites: tuple[str, ...],
        merged: bool,
        read: Reader,
        exchange: Exchange,
    ) -> None:
        """Read a reply, or note in `exchange` why it cannot be used.

        Args:
            message: the reply.
            question: the message that it answers.
            sites: those that it speaks for.
            merged: whether it may speak for several sites.
            read: is called with a reply without an error.
            exchange: takes its traffic.
        """
        if message.has_error():
            reason = one_line(message.error.reason or "it failed without a reason")
            exchange.drop(sites, reason)
            if message.error.code == UNREACHABLE or UNDESCRIBED in reason:
                exchange.late.update(sites)
            return
        try:
            reply = Reply(sites, message.content, question, merged)
            self.traffic.received(sites, question.metadata.message_type, reply.num_bytes)
            exchange.bytes_up += reply.num_bytes
            read(reply)
        except (MessageError, ValueError) as error:
            exchange.drop(sites, str(error))

    def rest(self) -> None:
        """Wait a little, or until another reply arrives if the Grid notices it."""
        if self._site_grid is not None:
            self._site_grid.wait(POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
