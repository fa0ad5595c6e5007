"""The in-process Grid: the messages and apps of real sites, with all sampled sites' training in one call."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedhead.client.app import (
    Kept,
    TrainedSites,
    empty_head,
    evaluate_sites,
    kept,
    make_app,
    report_sites,
    train_sites,
)
from fedhead.client.site_data import Site
from fedhead.errors import FedheadError
from fedhead.flower import set_message_id
from fedhead.messages import (
    EVALUATE,
    METRICS,
    REPORT,
    TRAIN,
    HeadReply,
    HeadRequest,
    MessageError,
    Payload,
    ReportRequest,
    check_metrics,
)

EXAMPLES = METRICS.index("examples")
FAILED = 0
"""Flower's code of an unknown error."""


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
        self._contexts = {node_id: Context(run_id, node_id, {}, RecordDict(), {}) for node_id in self._sites}
        self._apps = dict(apps or {})
        self._app = make_app(lambda context: self._sites[context.node_id])
        self._pending: dict[str, Message] = {}
        self._sent = 0

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
        """Do what the messages ask for, and return the replies; merged ones answer the first of their messages."""
        answers = {TRAIN: self._train, EVALUATE: self._evaluate, REPORT: self._report}
        together: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is None:
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

    def _train(self, messages: Sequence[Message]) -> Iterator[Message]:
        sites, agreed = self._addressed(messages)
        request = HeadRequest.from_content(messages[0].content, empty_head(agreed.manifest))
        for chunk in train_sites(sites, agreed, request):
            answered = [messages[position] for position in chunk.positions]
            if request.merge:
                names = [sites[position].name for position in chunk.positions]
                yield Message(merge(chunk, names).to_content(), reply_to=answered[0])
            else:
                for message, reply in zip(answered, chunk.replies(), strict=True):
                    yield Message(reply.to_content(), reply_to=message)

    def _evaluate(self, messages: Sequence[Message]) -> Iterator[Message]:
        sites, agreed = self._addressed(messages)
        request = HeadRequest.from_content(messages[0].content, empty_head(agreed.manifest))
        metrics = evaluate_sites(sites, agreed, request)
        if request.merge:
            names = tuple(site.name for site in sites)
            reply = HeadReply(metrics, sites=names, num_bytes=len(sites) * HeadReply(metrics[:1]).single_bytes())
            yield Message(reply.to_content(), reply_to=messages[0])
        else:
            for message, row in zip(messages, metrics, strict=True):
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


def merge(chunk: TrainedSites, names: Sequence[str]) -> HeadReply:
    """Screen each site's result as the coordinator would, and return one reply for those that pass.

    The heads' mean is weighted by examples and summed in float64: what any strategy that sees replies only through
    their weighted mean would make of them.
    """
    arrays_finite = np.all([np.isfinite(v).reshape(len(v), -1).all(axis=1) for v in chunk.arrays.values()], axis=0)
    dropped = {}
    kept = []
    for row, name in enumerate(names):
        try:
            check_metrics(chunk.metrics[row : row + 1], 1)
            if not arrays_finite[row]:
                raise MessageError("its head holds values that are not finite")
            kept.append(row)
        except MessageError as error:
            dropped[name] = str(error)
    examples = chunk.metrics[kept, EXAMPLES]
    weights = examples / max(examples.sum(), 1.0)
    arrays = {
        name: np.tensordot(weights, value[kept].astype(np.float64), 1).astype(value.dtype)
        for name, value in chunk.arrays.items()
    }
    single = next(chunk.replies()).single_bytes()
    return HeadReply(chunk.metrics[kept], arrays, tuple(names[row] for row in kept), dropped, len(names) * single)
