"""The run as a reader would tell it: describe, install, train, finish."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.heads import Head, make_head
from fedhead.messages import (
    DESCRIBE,
    EVALUATE,
    INSTALL,
    METRICS,
    Arrays,
    Description,
    FloatArray,
    HeadReply,
    HeadRequest,
    Manifest,
    MessageError,
    Payload,
    payload_bytes,
)
from fedhead.server.strategies import aggregate_round, averages, configure_round, required_sites, sample_sites, screen

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
HELD_OUT, LOSS_SUM, CORRECT = (METRICS.index(name) for name in ("held_out", "loss_sum", "correct"))
EXAMPLES, TRAIN_LOSS = METRICS.index("examples"), METRICS.index("train_loss")


@dataclass(frozen=True)
class SiteScore:
    """How a head does on one site's held-out rows."""

    rows: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of held-out rows that are classified as labelled."""
        return self.correct / self.rows


@dataclass(frozen=True)
class Round:
    """One line of the history: a head, how it came about, and how it does.

    Attributes:
        number: 0 is the head that the run starts from.
        sites: how many sites' replies made the head.
        seconds: what making and evaluating it took.
        bytes_down: payload sent to sites for it.
        bytes_up: payload that sites sent.
        train_loss: the sites' mean loss while they trained it; None for round 0.
        loss: mean cross entropy on the held-out rows of the sites that evaluated it.
        accuracy: the share of these rows that is right; None (like `loss`) where nothing is held out.
        test_accuracy: the same on the pooled test set, where there is one.
        dropped: sites whose replies did not count, with the reason.
    """

    number: int
    sites: int
    seconds: float
    bytes_down: int
    bytes_up: int
    train_loss: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Attributes:
        head: the head that is delivered.
        kept_round: the round it comes from, the best by pooled held-out loss.
        history: from round 0.
        participants: the sites that took part.
        sites: how the delivered head does at each of them that holds rows out.
        refused: sites that could not take part, with the reason.
        full_model_bytes: what exchanging backbone and head each round would have taken.
    """

    head: Head
    kept_round: int
    history: Sequence[Round]
    participants: Sequence[str]
    sites: Mapping[str, SiteScore]
    refused: Mapping[str, str]
    full_model_bytes: int


@dataclass
class _Exchange:
    """What one message to each site, and the replies, brought and took.

    Attributes:
        replies: usable heads with the message each answers, by site name.
        metrics: `[len(METRICS)]` of each site that answered usably.
        dropped: the other sites, with the reason.
    """

    replies: list[tuple[Message, HeadReply]] = field(default_factory=list)
    metrics: dict[str, FloatArray] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def sums(self) -> FloatArray:
        """Return the metrics `[len(METRICS)]` summed over sites, losses of training weighted by their rows."""
        table = np.array([self.metrics[name] for name in sorted(self.metrics)]).reshape(-1, len(METRICS))
        table[:, TRAIN_LOSS] *= table[:, EXAMPLES]
        total: FloatArray = table.sum(axis=0)
        return total


@dataclass(frozen=True)
class _Version:
    """A head and the exchange that made it."""

    number: int
    arrays: Arrays
    made_by: _Exchange
    seconds: float


class Coordinator:
    """Runs one configuration on a Grid.

    Args:
        config: the run; its `simulation` table is not read.
        grid: where the sites are.
        backbone: what every site is to hold.
        classes: the names of the head's outputs.
        strategy: Flower's, or the user's own.
        on_round: called with each finished line of the history.
        test: gives the accuracy of a head on a pooled test set.
        deadline: seconds to wait for the replies of one exchange.

    Raises:
        UserError: if head, init or classes do not fit each other.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        backbone: Backbone,
        classes: Sequence[str],
        strategy: Strategy,
        *,
        on_round: Callable[[Round], None] = lambda finished: None,
        test: Callable[[Head], float] | None = None,
        deadline: float = 3600.0,
    ) -> None:
        if len(classes) < 2:
            raise UserError(f"A classifier needs two classes or more; this run has {list(classes)}.")
        self.config = config
        self.grid = grid
        self.backbone = backbone
        self.strategy = strategy
        self.on_round = on_round
        self.test = test
        self.deadline = deadline
        self.head = initial_head(config, backbone.num_features, len(classes))
        self.manifest = Manifest(
            backbone=backbone.spec,
            layer=backbone.layer,
            backbone_digest=backbone.digest,
            weights_digest=backbone.weights_digest,
            num_features=backbone.num_features,
            classes=tuple(classes),
            head=config.head,
            holdout=config.holdout,
            seed=config.seed,
            local=config.local,
        )
        # A Grid in this process may answer for many sites at once; one that answers so has answered all.
        self._in_process = bool(getattr(grid, "merges_replies", False))
        self._merge = self._in_process and averages(strategy)
        self._nodes: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._full_model_bytes = 0
        self._started = time.perf_counter()

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            FedheadError: if too few sites can take part, or no reply of a round can be used.
        """
        history: list[Round] = []
        evaluated: list[tuple[_Version, _Exchange]] = []
        current = self._version(0, _arrays(self.head), self._gather_sites())
        for number in range(1, self.config.rounds + 1):
            exchange = self._train(number, current.arrays)
            evaluated.append((current, exchange))
            history.append(self._round(current, exchange))
            current = self._aggregate(number, current, exchange)
        exchange = self._evaluate(current.arrays)
        # Nothing is made of this exchange, so what it took belongs to the head that it evaluates.
        current.made_by.bytes_down += exchange.bytes_down
        current.made_by.bytes_up += exchange.bytes_up
        evaluated.append((current, exchange))
        history.append(self._round(current, exchange))
        kept, evaluation = _best(evaluated)
        _assign(self.head, kept.arrays)
        return Outcome(
            head=self.head,
            kept_round=kept.number,
            history=history,
            participants=sorted(self._nodes),
            sites=_scores(evaluation),
            refused=dict(sorted(self._refused.items())),
            full_model_bytes=self._full_model_bytes,
        )

    def _gather_sites(self) -> _Exchange:
        """Describe the run to every site, install the backbone where it is missing, and know who takes part."""
        traffic = _Exchange()
        nodes = list(self.grid.get_node_ids())
        probe = self.backbone.probe().numpy()
        described = Payload(self.manifest.model_dump(mode="json"), {"probe": probe}).to_content()
        lacking: dict[str, int] = {}
        descriptions = self._ask({str(node): node for node in nodes}, DESCRIBE, described, traffic)
        for key, description in sorted(descriptions.items(), key=lambda item: item[1].site):
            if description.site in self._nodes or description.site in lacking:
                raise FedheadError(f"Two sites call themselves {description.site!r}; give each its own name.")
            if not self._accept(description, int(key)):
                lacking[description.site] = int(key)
        if lacking:
            blob = np.frombuffer(self.backbone.to_bytes(), dtype=np.uint8)
            installed = self._ask(lacking, INSTALL, Payload({}, {"weights": blob}).to_content(), traffic)
            for site, description in sorted(installed.items()):
                if not self._accept(description, lacking[site]):
                    self._refused[site] = "The weights were sent, but it still has none."
        self._refused.update(traffic.dropped)
        for site, reason in sorted(self._refused.items()):
            logger.warning("%s takes no part: %s", site, reason)
        needed = required_sites(self.strategy)
        if len(self._nodes) < needed:
            reasons = "".join(f" {site}: {reason}" for site, reason in sorted(self._refused.items())[:3])
            raise FedheadError(
                f"{len(self._nodes)} of {len(nodes)} sites can take part, and {type(self.strategy).__name__} needs "
                f"{needed} or more.{reasons}"
            )
        return traffic

    def _accept(self, description: Description, node_id: int) -> bool:
        """Note what a site said of itself; return False if it still lacks the backbone."""
        if description.refusal:
            self._refused[description.site] = description.refusal
        elif not description.has_weights:
            return False
        else:
            self._nodes[description.site] = node_id
            self._rows[description.site] = description.rows
        return True

    def _ask(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, traffic: _Exchange
    ) -> dict[str, Description]:
        messages = {name: Message(content, node_id, action) for name, node_id in nodes.items()}
        descriptions = {}
        for name, _, reply in self._exchange(messages, traffic):
            try:
                descriptions[name] = Description.from_content(reply)
                traffic.bytes_up += payload_bytes(reply)
            except MessageError as error:
                traffic.dropped[name] = f"Its reply is not usable: {error}."
        return descriptions

    def _train(self, number: int, head: Arrays) -> _Exchange:
        cohort = sample_sites(self.strategy, list(self._nodes), self.config.seed, number)
        names = {self._nodes[name]: name for name in cohort}
        messages: dict[str, Message] = {}
        packed: dict[int, RecordDict] = {}
        for message in configure_round(self.strategy, number, head, self.grid, list(names)):
            # A strategy gives most sites one and the same record: pack it once.
            record = message.content
            if id(record) not in packed:
                packed[id(record)] = self._request(record, number).to_content()
            message.content = packed[id(record)]
            messages[names[message.metadata.dst_node_id]] = message
        self._full_model_bytes += 2 * len(messages) * (self.backbone.num_bytes + _nbytes(head))
        return self._heads(messages, head)

    def _request(self, record: RecordDict, number: int) -> HeadRequest:
        (arrays,) = record.array_records.values()
        settings = {key: value for config in record.config_records.values() for key, value in config.items()}
        mu = settings.get("proximal-mu")
        return HeadRequest(
            {name: array.numpy() for name, array in arrays.items()},
            server_round=number,
            proximal_mu=float(mu) if isinstance(mu, int | float) else None,
            merge=self._merge,
        )

    def _evaluate(self, head: Arrays) -> _Exchange:
        content = HeadRequest(head, server_round=self.config.rounds, merge=self._in_process).to_content()
        messages = {name: Message(content, node_id, EVALUATE) for name, node_id in sorted(self._nodes.items())}
        return self._heads(messages, {})

    def _heads(self, messages: Mapping[str, Message], expected: Arrays) -> _Exchange:
        """Exchange messages about a head; screen what comes back, and order it by site name."""
        exchange = _Exchange()
        replies: dict[str, tuple[Message, HeadReply]] = {}
        for name, instruction, content in self._exchange(messages, exchange):
            try:
                reply = screen(content, expected, self._rows, name, merged=self._in_process)
            except MessageError as error:
                exchange.dropped[name] = f"{error}"
                continue
            exchange.bytes_up += reply.num_bytes
            exchange.dropped.update(reply.dropped)
            if len(reply.metrics):
                replies[name] = (instruction, reply)
                exchange.metrics.update(zip(reply.sites or (name,), reply.metrics, strict=True))
        exchange.replies = [replies[name] for name in sorted(replies)]
        for name, reason in sorted(exchange.dropped.items()):
            logger.warning("A reply of %s is dropped: %s.", name, reason.rstrip("."))
        return exchange

    def _exchange(
        self, messages: Mapping[str, Message], traffic: _Exchange
    ) -> Iterator[tuple[str, Message, RecordDict]]:
        """Send messages, and yield what each site answers with what it answers to; note those that fail or are lost."""
        sizes: dict[int, int] = {}
        for message in messages.values():
            if id(message.content) not in sizes:
                sizes[id(message.content)] = payload_bytes(message.content)
            traffic.bytes_down += sizes[id(message.content)]
        ids = self.grid.push_messages(list(messages.values()))
        waiting = dict(zip(ids, messages, strict=True))
        stop = time.monotonic() + self.deadline
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                # A lost node's error comes from node 1, so the message that is answered names the site.
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is None:
                    continue
                if reply.has_error():
                    traffic.dropped[name] = reply.error.reason or "It failed without a reason."
                else:
                    yield name, messages[name], reply.content
            if self._in_process:
                return
            if waiting and time.monotonic() > stop:
                traffic.dropped.update(dict.fromkeys(waiting.values(), f"No reply within {self.deadline:.0f} s."))
                return
            time.sleep(POLL_SECONDS if waiting else 0)

    def _aggregate(self, number: int, current: _Version, exchange: _Exchange) -> _Version:
        if not exchange.replies:
            reasons = " ".join(f"{name}: {reason}." for name, reason in sorted(exchange.dropped.items())[:3])
            raise FedheadError(f"Not one reply of round {number} could be used. {reasons}")
        made = aggregate_round(self.strategy, number, exchange.replies, current.arrays)
        if made is None:
            logger.warning("%s made no head in round %d; the one before stays.", type(self.strategy).__name__, number)
        return self._version(number, made or current.arrays, exchange)

    def _version(self, number: int, arrays: Arrays, made_by: _Exchange) -> _Version:
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return _Version(number, arrays, made_by, seconds)

    def _round(self, version: _Version, evaluation: _Exchange) -> Round:
        sums = evaluation.sums()
        trained = version.made_by.sums()
        held_out = sums[HELD_OUT]
        test_accuracy = None
        if self.test is not None:
            _assign(self.head, version.arrays)
            test_accuracy = self.test(self.head)
        finished = Round(
            number=version.number,
            sites=len(version.made_by.metrics),
            seconds=version.seconds,
            bytes_down=version.made_by.bytes_down,
            bytes_up=version.made_by.bytes_up,
            train_loss=float(trained[TRAIN_LOSS] / trained[EXAMPLES]) if trained[EXAMPLES] else None,
            loss=float(sums[LOSS_SUM] / held_out) if held_out else None,
            accuracy=float(sums[CORRECT] / held_out) if held_out else None,
            test_accuracy=test_accuracy,
            dropped=dict(sorted(version.made_by.dropped.items())),
        )
        self.on_round(finished)
        return finished


def initial_head(config: RunConfig, num_features: int, num_classes: int) -> Head:
    """Build the head that a run starts from.

    Raises:
        UserError: if the head cannot start as `config.init` says.
    """
    head = make_head(config.head, num_features, num_classes)
    init = config.init or head.inits[0]
    if init not in head.inits:
        raise UserError(f"A head {config.head!r} cannot start from {init!r}, only from: {', '.join(head.inits)}.")
    if init == "random":
        head.randomise(torch.Generator().manual_seed(config.seed))
    return head


def _arrays(head: Head) -> Arrays:
    return {name: value.cpu().numpy() for name, value in head.trainable().items()}


def _assign(head: Head, arrays: Arrays) -> None:
    head.assign({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _best(evaluated: Sequence[tuple[_Version, _Exchange]]) -> tuple[_Version, _Exchange]:
    """Return the head with the least pooled held-out loss, over the sites that evaluated every head.

    Where these hold less than half of the held-out rows, as when few sites are sampled each round, heads cannot be
    told apart fairly, and the last one is returned.
    """
    common = sorted(set.intersection(*(set(exchange.metrics) for _, exchange in evaluated)))
    _, last = evaluated[-1]
    rows = sum(last.metrics[name][HELD_OUT] for name in common)
    if rows == 0 or rows < last.sums()[HELD_OUT] / 2:
        return evaluated[-1]
    return min(evaluated, key=lambda pair: sum(pair[1].metrics[name][LOSS_SUM] for name in common))


def _scores(evaluation: _Exchange) -> dict[str, SiteScore]:
    return {
        name: SiteScore(int(row[HELD_OUT]), int(row[CORRECT]), float(row[LOSS_SUM] / row[HELD_OUT]))
        for name, row in sorted(evaluation.metrics.items())
        if row[HELD_OUT]
    }
