"""The in-process Grid: the messages and apps of real sites, with all sampled sites' training in one call."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedhead.client.handlers import answer
from fedhead.client.site_data import Site
from fedhead.errors import FedheadError
from fedhead.flower import set_message_id
from fedhead.flower.grids import Run
from fedhead.protocol.actions import EVALUATE, GRADIENT, TRAIN
from fedhead.protocol.messages import MessageError, Payload
from fedhead.server.grid import SiteGrid
from fedhead.simulations.blocks import assign_blocks

FAILED = 0
"""Flower's code of an unknown error."""

FIRST_GROUP = 2**62
"""Nodes from here on stand for several."""


class InProcessGrid(SiteGrid):
    """Flower's Grid over simulated sites in this process.

    Sites are answered by the handlers of real ones, all sites of one message at once; see `fedhead.client.handlers`.

    Args:
        sites: the simulated sites, which share one `LabelledFeatures`.
        apps: `ClientApp`s of sites that do not run ours (a user's own training, an attacker); these are run one at a
            time.
        run_id: of the run that messages belong to.
        blocks: how many blocks of sites are answered for separately.
    """

    in_process = True

    def __init__(
        self,
        sites: Sequence[Site],
        apps: Mapping[str, ClientApp] | None = None,
        run_id: int = 1,
        blocks: int = 1,
    ) -> None:
        self._sites = {node_id_of(site.name): site for site in sites}
        if len(self._sites) < len(sites):
            raise ValueError("Two sites have one name.")
        self._apps = dict(apps or {})
        self._blocks = dict(
            zip(self._sites, assign_blocks([site.num_rows for site in sites], blocks).tolist(), strict=True)
        )
        # Our own sites of a block share one state.
        told = [RecordDict() for _ in range(blocks)]
        self._contexts = {
            node_id: Context(
                run_id, node_id, {}, RecordDict() if site.name in self._apps else told[self._blocks[node_id]], {}
            )
            for node_id, site in self._sites.items()
        }
        self._groups: dict[int, list[int]] = {}
        self._pending: dict[str, Message] = {}
        self._sent = 0

    def together(self, node_ids: Sequence[int]) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
        """Return a node for each block of sites, for one message, and the sites that run the user's own apps.

        Its one reply is for all of the block: their descriptions, their sums added, or the mean of their heads.
        """
        if node_ids and any(step.per_site for step in self._sites[node_ids[0]].steps):
            return {}, list(node_ids)
        alone = [node for node in node_ids if self._sites[node].name in self._apps] if self._apps else []
        apart = set(alone)
        by_block: dict[int, list[int]] = defaultdict(list)
        for node in node_ids:
            if node not in apart:
                by_block[self._blocks[node]].append(node)
        groups = {FIRST_GROUP + self._sent + 1 + at: by_block[block] for at, block in enumerate(sorted(by_block))}
        self._sent += len(groups)
        self._groups.update(groups)
        return groups, alone

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("A simulated run is known to no SuperLink.")

    @property
    def run(self) -> Run:
        raise NotImplementedError("A simulated run is known to no SuperLink.")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            set_message_id(message, str(self._sent))
            self._pending[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the messages: those of one content to single sites of a block all at once."""
        alike: dict[tuple[str, int, int], list[Message]] = defaultdict(list)
        asked: list[Asked] = []
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is None:
                continue
            node = message.metadata.dst_node_id
            if node in self._groups:
                asked.append(Asked(message.metadata.message_type, self._groups.pop(node), [message], merged=True))
            elif (app := self._apps.get(self._sites[node].name)) is not None:
                yield self._run_app(app, message)
            else:
                alike[message.metadata.message_type, id(message.content), self._blocks[node]].append(message)
        for (action, _, _), messages in alike.items():
            asked.append(Asked(action, [message.metadata.dst_node_id for message in messages], messages))
        yield from self._answer(asked)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def _run_app(self, app: ClientApp, message: Message) -> Message:
        try:
            reply = app(message, self._contexts[message.metadata.dst_node_id])
            about_a_head = message.metadata.message_type in (TRAIN, GRADIENT, EVALUATE) and not reply.has_error()
            # Only this Grid may merge replies: an app that says it speaks for other sites speaks for none.
            if about_a_head and Payload.from_content(reply.content).values:
                raise MessageError("it speaks for other sites than its own")
            return reply
        # Whatever a site's app raises is that site's failure, as it is on a network.
        except Exception as error:
            return Message(Error(FAILED, f"{error}"), reply_to=message)

    def _answer(self, asked: Sequence["Asked"]) -> Iterator[Message]:
        """Yield the replies of our own sites, block by block."""
        for one in asked:
            sites, context = [self._sites[node] for node in one.nodes], self._contexts[one.nodes[0]]
            for position, reply in replies_of(one.action, sites, one.payload, context, merged=one.merged):
                yield one.reply(position, reply)


@dataclass(frozen=True)
class Asked:
    """Messages of one content to sites of one block.

    Attributes:
        action: the request.
        nodes: those asked.
        messages: one to each, or one to all of them if `merged`.
        merged: whether one reply is to speak for all.
    """

    action: str
    nodes: Sequence[int]
    messages: Sequence[Message]
    merged: bool = False

    @cached_property
    def payload(self) -> Payload:
        """What the messages say."""
        return Payload.from_content(self.messages[0].content)

    def reply(self, position: int, reply: Payload | str) -> Message:
        """Return the message that replies to the one at `position`; a sentence is the reason of a failure."""
        question = self.messages[position]
        if isinstance(reply, str):
            return Message(Error(FAILED, reply), reply_to=question)
        return Message(reply.to_content(), reply_to=question)


def replies_of(
    action: str, sites: Sequence[Site], payload: Payload, context: Context, *, merged: bool
) -> Iterator[tuple[int, Payload | str]]:
    """Yield the replies of sites to one message, each with the position of the first site that it speaks for.

    A sentence in place of a reply is the reason why there is none; without `merged`, one site's failure is its own.
    """
    unanswered = set(range(len(sites)))
    try:
        for positions, reply in answer(action, sites, payload, context, merged=merged):
            unanswered.difference_update(positions)
            yield positions[0], reply
    except FedheadError as error:
        if merged or len(sites) == 1:
            yield 0, str(error)
            return
        for position in sorted(unanswered):
            for _, alone in replies_of(action, [sites[position]], payload, context, merged=False):
                yield position, alone


def node_id_of(name: str) -> int:
    """Return the node id of a simulated site."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") + 2
