"""The in-process Grid: the messages and apps of real sites, with all sampled sites' training in one call."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedhead.client.app import Kept, empty_head, evaluate_sites, kept, make_app, report_sites, train_sites
from fedhead.client.site_data import Site
from fedhead.errors import FedheadError
from fedhead.flower import set_message_id
from fedhead.messages import (
    CALIBRATE,
    DESCRIBE,
    EVALUATE,
    INSTALL,
    REPORT,
    STANDARDISE,
    STATISTICS,
    TRAIN,
    HeadReply,
    HeadRequest,
    MessageError,
    Payload,
    ReportRequest,
)
from fedhead.simulations.together import (
    calibrate_together,
    describe_together,
    evaluate_together,
    install_together,
    standardise_together,
    sum_together,
    train_together,
)

FAILED = 0
"""Flower's code of an unknown error."""

FIRST_GROUP = 2**62
"""Nodes from here on stand for several."""

TOGETHER: Mapping[str, Callable[[Sequence[Site], RecordDict, Context], RecordDict]] = {
    DESCRIBE: describe_together,
    INSTALL: install_together,
    STANDARDISE: standardise_together,
    STATISTICS: sum_together,
    CALIBRATE: calibrate_together,
}


class InProcessGrid(Grid):
    """Flower's Grid over simulated sites in this process.

    Each site keeps its own `Context`. Describing and installing go through the `ClientApp` one site at a time;
    training and evaluation of one round go to the trainer together.

    Args:
        sites: the simulated sites, which share one `LabelledFeatures`.
        apps: `ClientApp`s of sites that do not run ours (a user's own training, an attacker); these are run one at a
            time.
        run_id: of the run that messages belong to.
    """

    merges_replies = True

    def __init__(self, sites: Sequence[Site], apps: Mapping[str, ClientApp] | None = None, run_id: int = 1) -> None:
        self._sites = {node_id_of(site.name): site for site in sites}
        if len(self._sites) < len(sites):
            raise ValueError("Two sites have one name.")
        self._apps = dict(apps or {})
        # What sites of ours are told is the same, and kept once for all of them.
        told = RecordDict()
        self._contexts = {
            node_id: Context(run_id, node_id, {}, RecordDict() if site.name in self._apps else told, {})
            for node_id, site in self._sites.items()
        }
        self._groups: dict[int, list[int]] = {}
        self._app = make_app(lambda context: self._sites[context.node_id])
        self._pending: dict[str, Message] = {}
        self._sent = 0

    def together(self, node_ids: Sequence[int]) -> tuple[int | None, list[int]]:
        """Return a node that stands for all of `node_ids` but the user's own apps, for one message; and those.

        Its one reply is for all of them: their descriptions, their sums added, or the mean of their heads.
        """
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
        """Do what the messages ask for, and return the replies."""
        answers = {TRAIN: self._train, EVALUATE: self._evaluate, REPORT: self._report}
        together: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is None:
                continue
            if message.metadata.dst_node_id in self._groups:
                yield self._answer_together(message, self._groups.pop(message.metadata.dst_node_id))
                continue
            name = self._sites[message.metadata.dst_node_id].name
            if message.metadata.message_type in answers and name not in self._apps:
                together[message.metadata.message_type, id(message.content)].append(message)
            else:
                yield self._run_app(self._apps.get(name, self._app), message)
        for (message_type, _), messages in together.items():
            try:
                yield from answers[message_type](messages)
            except FedheadError as error:
                yield from (Message(Error(FAILED, str(error)), reply_to=message) for message in messages)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def _run_app(self, app: ClientApp, message: Message) -> Message:
        try:
            reply = app(message, self._contexts[message.metadata.dst_node_id])
            about_a_head = message.metadata.message_type in (TRAIN, EVALUATE) and not reply.has_error()
            # Only this Grid may merge replies: an app that says it speaks for other sites speaks for none.
            if about_a_head and Payload.from_content(reply.content).values:
                raise MessageError("it speaks for other sites than its own")
            return reply
        # Whatever a site's app raises is that site's failure, as it is on a network.
        except Exception as error:
            return Message(Error(FAILED, f"{error}"), reply_to=message)

    def _answer_together(self, message: Message, group: Sequence[int]) -> Message:
        sites, context = [self._sites[node] for node in group], self._contexts[group[0]]
        asked = message.metadata.message_type
        try:
            if asked in TOGETHER:
                return Message(TOGETHER[asked](sites, message.content, context), reply_to=message)
            agreed = kept(context)
            request = HeadRequest.from_content(message.content, empty_head(agreed.manifest))
            work = train_together if asked == TRAIN else evaluate_together
            return Message(work(sites, agreed, request).to_content(), reply_to=message)
        except FedheadError as error:
            return Message(Error(FAILED, str(error)), reply_to=message)

    def _train(self, messages: Sequence[Message]) -> Iterator[Message]:
        sites, agreed = self._addressed(messages)
        request = HeadRequest.from_content(messages[0].content, empty_head(agreed.manifest))
        for chunk in train_sites(sites, agreed, request):
            for position, reply in zip(chunk.positions, chunk.replies(), strict=True):
                yield Message(reply.to_content(), reply_to=messages[position])

    def _evaluate(self, messages: Sequence[Message]) -> Iterator[Message]:
        sites, agreed = self._addressed(messages)
        request = HeadRequest.from_content(messages[0].content, empty_head(agreed.manifest))
        for message, row in zip(messages, evaluate_sites(sites, agreed, request), strict=True):
            yield Message(HeadReply(row[None]).to_content(), reply_to=message)

    def _report(self, messages: Sequence[Message]) -> Iterator[Message]:
        sites, agreed = self._addressed(messages)
        request = ReportRequest.from_content(messages[0].content, empty_head(agreed.manifest))
        for message, sums in zip(messages, report_sites(sites, agreed, request), strict=True):
            yield Message(Payload({}, sums.to_arrays()).to_content(), reply_to=message)

    def _addressed(self, messages: Sequence[Message]) -> tuple[list[Site], Kept]:
        """Return the sites that messages of one content go to, and what all of them were told."""
        nodes = [message.metadata.dst_node_id for message in messages]
        return [self._sites[node] for node in nodes], kept(self._contexts[nodes[0]])


def node_id_of(name: str) -> int:
    """Return the node id of a simulated site."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") + 2
