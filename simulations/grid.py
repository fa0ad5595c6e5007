"""The in-process Grid: the messages and apps of real sites, with all sampled sites' training in one call."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    """

    in_process = True

    def __init__(self, sites: Sequence[Site], apps: Mapping[str, ClientApp] | None = None, run_id: int = 1) -> None:
        self._sites = {node_id_of(site.name): site for site in sites}
        if len(self._sites) < len(sites):
            raise ValueError("Two sites have one name.")
        self._apps = dict(apps or {})
        # Our own sites share one state.
        told = RecordDict()
        self._contexts = {
            node_id: Context(run_id, node_id, {}, RecordDict() if site.name in self._apps else told, {})
            for node_id, site in self._sites.items()
        }
        self._groups: dict[int, list[int]] = {}
        self._pending: dict[str, Message] = {}
        self._sent = 0

    def together(self, node_ids: Sequence[int]) -> tuple[int | None, list[int]]:
        """Return a node that stands for all of `node_ids` but the user's own apps, for one message; and those.

        Its one reply is for all of them: their descriptions, their sums added, or the mean of their heads.
        """
        if node_ids and any(step.per_site for step in self._sites[node_ids[0]].steps):
            return None, list(node_ids)
        alone = [node for node in node_ids if self._sites[node].name in self._apps] if self._apps else []
        apart = set(alone)
        group = [node for node in node_ids if node not in apart]
        if not group:
            return None, alone
        self._sent += 1
        stand_in = FIRST_GROUP + self._sent
        self._groups[stand_in] = group
        return stand_in, alone

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
        """Answer the messages: those of one content to single sites all at once."""
        alike: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is None:
                continue
            node = message.metadata.dst_node_id
            if node in self._groups:
                yield from self._answer(message.metadata.message_type, self._groups.pop(node), [message], merged=True)
            elif (app := self._apps.get(self._sites[node].name)) is not None:
                yield self._run_app(app, message)
            else:
                alike[message.metadata.message_type, id(message.content)].append(message)
        for (action, _), messages in alike.items():
            nodes = [message.metadata.dst_node_id for message in messages]
            yield from self._answer(action, nodes, messages)

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

    def _answer(
        self, action: str, nodes: Sequence[int], messages: Sequence[Message], *, merged: bool = False
    ) -> Iterator[Message]:
        """Yield the sites' replies to messages of one content: one to each message, or one for all if `merged`."""
        sites, context = [self._sites[node] for node in nodes], self._contexts[nodes[0]]
        unanswered = dict(enumerate(messages))
        try:
            payload = Payload.from_content(messages[0].content)
            for positions, reply in answer(action, sites, payload, context, merged=merged):
                yield Message(reply.to_content(), reply_to=unanswered.pop(positions[0]))
        except FedheadError as error:
            if len(messages) == 1:
                yield Message(Error(FAILED, str(error)), reply_to=messages[0])
                return
            # One site's failure is its own: the others are asked again, one by one.
            for position, message in unanswered.items():
                yield from self._answer(action, [nodes[position]], [message])


def node_id_of(name: str) -> int:
    """Return the node id of a simulated site."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") + 2
