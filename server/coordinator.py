"""The run as a reader would tell it: describe, install, statistics, train, finish."""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.diagnosis import ClassCoverage, SiteDiagnosis, coverage
from fedhead.errors import FedheadError, UserError
from fedhead.heads import Head, LinearHead
from fedhead.messages import (
    DESCRIBE,
    EVALUATE,
    INSTALL,
    METRICS,
    REPORT,
    STANDARDISE,
    STATISTICS,
    Arrays,
    Description,
    HeadReply,
    HeadRequest,
    Manifest,
    MessageError,
    Payload,
    ReportRequest,
    StatisticsRequest,
    payload_bytes,
)
from fedhead.metrics import EvaluationSums, ScoreBins
from fedhead.moments import FeatureMoments
from fedhead.server.exchange import EXAMPLES, TRAIN_LOSS, Exchange, Messenger
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.server.strategies import aggregate_round, averages, configure_round, required_sites, sample_sites, screen
from fedhead.statistics import FeatureStatistics, origin_of

logger = logging.getLogger(__name__)

Sums = TypeVar("Sums", FeatureStatistics, FeatureMoments)

HELD_OUT, LOSS_SUM, CORRECT = (METRICS.index(name) for name in ("held_out", "loss_sum", "correct"))


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
        loss: the mean loss on the held-out rows of the sites that evaluated it: cross entropy, or of multi-label rows
            binary cross entropy.
        accuracy: the share of these rows that is right, of multi-label rows with all labels; None (like `loss`) where
            nothing is held out.
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
        head: the head that is delivered, for features as they are.
        kept_round: the round it comes from, the best by pooled held-out loss.
        all_rows: whether it is the statistics head solved again of all rows, held-out ones included; what is reported
            of it was measured without them. Else it has seen no held-out row.
        history: from round 0.
        participants: the sites that took part.
        sites: how the kept head does on the held-out rows of each of them that has any.
        diagnoses: how each site stands to the pool, where statistics are kept and rows have one class each.
        coverage: which sites hold which classes, where statistics were summed.
        refused: sites that could not take part, with the reason.
        full_model_bytes: what exchanging backbone and head each round would have taken.
        statistics: the sites' training rows summed, where the first head was solved of them.
    """

    head: Head
    kept_round: int
    all_rows: bool
    history: Sequence[Round]
    participants: Sequence[str]
    sites: Mapping[str, EvaluationSums]
    diagnoses: Sequence[SiteDiagnosis]
    coverage: Sequence[ClassCoverage]
    refused: Mapping[str, str]
    full_model_bytes: int
    statistics: FeatureStatistics | None


@dataclass(frozen=True)
class _Version:
    """A head and the exchange that made it."""

    number: int
    arrays: Arrays
    made_by: Exchange
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
        sums: where each site's statistics are kept, if anywhere; sites are diagnosed only if they are.
        test: gives the accuracy of a head on a pooled test set.
        deadline: seconds to wait for the replies of one exchange.
        deliver: whether a statistics head that is kept is solved again of all rows, for use.

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
        sums: SiteSums | None = None,
        test: Callable[[Head], float] | None = None,
        deadline: float = 3600.0,
        deliver: bool = True,
    ) -> None:
        if len(classes) < 2:
            raise UserError(f"A classifier needs two classes or more; this run has {list(classes)}.")
        self.config = config
        self.backbone = backbone
        self.strategy = strategy
        self.on_round = on_round
        self.sums = sums
        self.test = test
        self.deliver = deliver
        self.form = HeadForm(config, backbone.num_features, len(classes))
        self.manifest = Manifest(
            run=uuid.uuid4().hex,
            backbone=backbone.spec,
            kind=backbone.kind,
            layer=backbone.layer,
            backbone_digest=backbone.digest,
            weights_digest=backbone.weights_digest,
            num_features=backbone.num_features,
            classes=tuple(classes),
            multi_label=config.multi_label,
            head=config.head,
            holdout=config.holdout,
            seed=config.seed,
            local=config.local,
        )
        self._messenger = Messenger(grid, deadline)
        # Taken once: sites sum about the mean of the very features that they are sent.
        self._probe = backbone.probe()
        self._nodes: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._full_model_bytes = 0
        self._marked = time.perf_counter()

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        history: list[Round] = []
        evaluated: list[tuple[_Version, Exchange]] = []
        first = Exchange()
        self._gather_sites(first)
        stats = self._sum_statistics(StatisticsRequest(), first) if self.form.init not in UNSOLVED else None
        if self.config.rounds:
            self._standardise(stats, first)
        self._exclude(first.dropped)
        current = self._version(0, self.form.start(stats), first)
        for number in range(1, self.config.rounds + 1):
            exchange = self._train(number, current.arrays)
            evaluated.append((current, exchange))
            history.append(self._round(current, exchange))
            current = self._aggregate(number, current, exchange)
        exchange = self._evaluate(current.arrays)
        evaluated.append((current, exchange))
        kept = _best(evaluated)
        sites = self._report(kept, stats, exchange) if self.config.holdout else {}
        diagnoses: list[SiteDiagnosis] = []
        if stats is not None and self.sums is not None and self.config.diagnose and not self.config.multi_label:
            diagnoses = diagnose_sites(self._messenger, self._nodes, self.manifest, self.sums, stats, exchange)
        head = self.form.leave(kept.arrays)
        all_rows = self.deliver and kept.number == 0 and stats is not None and self.config.holdout > 0
        if stats is not None and all_rows:
            held_out = self._sum_statistics(StatisticsRequest(rows="held_out"), exchange)
            head = self.form.solve(stats + held_out).float()
        # Nothing more is made of the last exchange, so what it took belongs to the head that it evaluates.
        current.made_by.bytes_down += exchange.bytes_down
        current.made_by.bytes_up += exchange.bytes_up
        history.append(self._round(current, exchange))
        return Outcome(
            head=head,
            kept_round=kept.number,
            all_rows=all_rows,
            history=history,
            participants=sorted(self._nodes),
            sites=sites,
            diagnoses=diagnoses,
            coverage=coverage(self._counts, self.manifest.classes) if stats is not None else [],
            refused=dict(sorted(self._refused.items())),
            full_model_bytes=self._full_model_bytes,
            statistics=stats,
        )

    def _gather_sites(self, exchange: Exchange) -> None:
        """Describe the run to every site, install the backbone where it is missing, and know who takes part."""
        nodes = {str(node): node for node in self._messenger.grid.get_node_ids()}
        described = self.manifest.model_dump(mode="json")
        content = Payload(described, {"probe": self._probe.numpy()}).to_content()
        lacking: dict[str, int] = {}
        descriptions = self._descriptions(nodes, DESCRIBE, content, exchange)
        claimed = Counter(description.site for description in descriptions.values())
        for key, description in sorted(descriptions.items()):
            if claimed[description.site] > 1:
                self._refused[f"node {key}"] = (
                    f"{claimed[description.site]} sites call themselves {description.site!r}; give each its own name."
                )
                continue
            if not self._accept(description, nodes[key]):
                lacking[description.site] = nodes[key]
        if lacking:
            blob = np.frombuffer(self.backbone.to_bytes(), dtype=np.uint8)
            content = Payload({}, {"weights": blob}).to_content()
            for site, description in self._descriptions(lacking, INSTALL, content, exchange).items():
                if description.site != site or not self._accept(description, lacking[site]):
                    self._refused[site] = "The weights were sent, but it still has none."
        self._refused.update(exchange.dropped)
        for site, reason in sorted(self._refused.items()):
            logger.warning("%s takes no part: %s", site, reason)
        self._require_sites()

    def _exclude(self, dropped: Mapping[str, str]) -> None:
        """Go on without sites whose sums could not be used: the head would be of other rows than those trained on."""
        for site in dropped.keys() & self._nodes.keys():
            self._refused[site] = dropped[site]
            del self._nodes[site]
        self._require_sites()

    def _require_sites(self) -> None:
        needed = required_sites(self.strategy)
        if len(self._nodes) < needed:
            reasons = "".join(f" {site}: {reason}" for site, reason in sorted(self._refused.items())[:3])
            known = len(self._nodes) + len(self._refused)
            raise FedheadError(
                f"{len(self._nodes)} of {known} sites can take part, and {type(self.strategy).__name__} needs "
                f"{needed} or more.{reasons}"
            )

    def _descriptions(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> dict[str, Description]:
        descriptions = {}
        for name, answer in self._messenger.ask(nodes, action, content, exchange):
            try:
                descriptions[name] = Description.from_content(answer)
                exchange.bytes_up += payload_bytes(answer)
            except MessageError as error:
                exchange.drop(name, str(error))
        return descriptions

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

    def _sum_statistics(self, request: StatisticsRequest, exchange: Exchange) -> FeatureStatistics:
        """Fold the sites' statistics into one as they come."""
        used = 0
        origin = origin_of(self._probe, self.manifest.seed)
        classes = len(self.manifest.classes)
        total = FeatureStatistics.empty(len(origin), classes, origin, multi_label=self.manifest.multi_label)
        for name, tensors in self._sums(request, exchange):
            try:
                stats = FeatureStatistics.from_tensors(tensors)
                alike = stats.multi_label == self.manifest.multi_label
                self._vouch(name, stats.rows, stats.num_classes == classes and alike)
                total += stats
            except ValueError as error:
                exchange.drop(name, str(error))
                continue
            used += 1
            if self.sums is not None:
                self.sums.save(name, request.rows, stats)
            if request.rows == "train":
                self._counts[name] = stats.counts
        return _at_least_one(total if used else None, exchange)

    def _sum_moments(self, exchange: Exchange) -> FeatureMoments:
        origin = self._probe.mean(0)
        total: FeatureMoments | None = None
        for name, tensors in self._sums(StatisticsRequest(what="moments"), exchange):
            try:
                moments = FeatureMoments.from_tensors(tensors, origin)
                self._vouch(name, moments.rows, True)
                total = moments if total is None else total + moments
            except ValueError as error:
                exchange.drop(name, str(error))
        return _at_least_one(total, exchange)

    def _sums(self, request: StatisticsRequest, exchange: Exchange) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        content = Payload(request.model_dump()).to_content()
        for name, answer in self._messenger.ask(self._nodes, STATISTICS, content, exchange):
            try:
                arrays = Payload.from_content(answer).arrays
                exchange.bytes_up += payload_bytes(answer)
            except MessageError as error:
                exchange.drop(name, str(error))
                continue
            yield name, {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}

    def _vouch(self, name: str, rows: int, fits: bool) -> None:
        if rows > self._rows[name]:
            raise ValueError(f"it sums {rows} rows, of {self._rows[name]} that it has")
        if not fits:
            raise ValueError("its statistics are of other classes")

    def _standardise(self, stats: FeatureStatistics | None, exchange: Exchange) -> None:
        """Agree with the sites on the mean and scale that heads are trained under."""
        same_width = stats is not None and stats.num_features == self.backbone.num_features
        sums = stats if stats is not None and same_width else self._sum_moments(exchange)
        mean, scale = sums.mean().float(), sums.scale().float()
        # What the sites compute with is float32, so that is what must be folded back, if in float64.
        self.form.standardisation = (mean.double(), scale.double())
        content = Payload({}, {"mean": mean.numpy(), "scale": scale.numpy()}).to_content()
        for name, answer in self._messenger.ask(self._nodes, STANDARDISE, content, exchange):
            try:
                exchange.bytes_up += payload_bytes(answer)
            except MessageError as error:
                exchange.drop(name, str(error))

    def _train(self, number: int, head: Arrays) -> Exchange:
        cohort = sample_sites(self.strategy, list(self._nodes), self.config.seed, number)
        names = {self._nodes[name]: name for name in cohort}
        messages: dict[str, Message] = {}
        packed: dict[int, RecordDict] = {}
        records = []
        for message in configure_round(self.strategy, number, head, self._messenger.grid, list(names)):
            # A strategy gives most sites one and the same record: pack it once.
            records.append(message.content)  # kept, so that no other gets its id
            if id(message.content) not in packed:
                packed[id(message.content)] = self._request(message.content, number).to_content()
            message.content = packed[id(message.content)]
            messages[names[message.metadata.dst_node_id]] = message
        whole_model = self.backbone.num_bytes + sum(array.nbytes for array in head.values())
        self._full_model_bytes += 2 * len(messages) * whole_model
        return self._heads(messages, head)

    def _request(self, record: RecordDict, number: int) -> HeadRequest:
        (arrays,) = record.array_records.values()
        settings = {key: value for config in record.config_records.values() for key, value in config.items()}
        mu = settings.get("proximal-mu")
        return HeadRequest(
            {name: array.numpy() for name, array in arrays.items()},
            server_round=number,
            proximal_mu=float(mu) if isinstance(mu, int | float) else None,
            merge=self._messenger.in_process and averages(self.strategy),
        )

    def _evaluate(self, head: Arrays) -> Exchange:
        request = HeadRequest(head, server_round=self.config.rounds, merge=self._messenger.in_process)
        content = request.to_content()
        messages = {name: Message(content, node_id, EVALUATE) for name, node_id in sorted(self._nodes.items())}
        return self._heads(messages, {})

    def _report(
        self, version: _Version, stats: FeatureStatistics | None, exchange: Exchange
    ) -> dict[str, EvaluationSums]:
        """Have a head evaluated in detail; return what each site with held-out rows counted, by name."""
        num_classes = len(self.manifest.classes)
        bins = ScoreBins.default(num_classes)
        head = self.form.leave(version.arrays)
        if isinstance(head, LinearHead) and stats is not None and stats.num_features == head.num_features:
            bins = score_bins(head, stats)
        request = ReportRequest(HeadRequest(version.arrays, server_round=version.number), bins)
        reports = {}
        for name, answer in self._messenger.ask(self._nodes, REPORT, request.to_content(), exchange):
            try:
                arrays = Payload.from_content(answer).arrays
                sums = EvaluationSums.from_arrays(arrays, num_classes, multi_label=self.manifest.multi_label)
                exchange.bytes_up += payload_bytes(answer)
                if sums.rows > self._rows[name]:
                    raise ValueError(f"it evaluated {sums.rows} rows, of {self._rows[name]} that it has")
            except (MessageError, ValueError) as error:
                exchange.drop(name, str(error))
                continue
            if sums.rows:
                reports[name] = sums
        return dict(sorted(reports.items()))

    def _heads(self, messages: Mapping[str, Message], expected: Arrays) -> Exchange:
        """Exchange messages about a head; screen what comes back, and order it by site name."""
        exchange = Exchange()
        replies: dict[str, tuple[Message, HeadReply]] = {}
        for name, instruction, content in self._messenger.send(messages, exchange):
            try:
                reply = screen(content, expected, self._rows, name, merged=self._messenger.in_process)
            except MessageError as error:
                exchange.drop(name, str(error))
                continue
            exchange.bytes_up += reply.num_bytes
            for site, reason in reply.dropped.items():
                exchange.drop(site, reason)
            exchange.metrics.update(zip(reply.sites or (name,), reply.metrics, strict=False))
            # A site may hold out all of its rows; then it evaluates, and its head is no more than the one it was sent.
            if reply.metrics[:, EXAMPLES].any():
                replies[name] = (instruction, reply)
        exchange.replies = [replies[name] for name in sorted(replies)]
        return exchange

    def _aggregate(self, number: int, current: _Version, exchange: Exchange) -> _Version:
        if not exchange.replies:
            raise FedheadError(f"Not one reply of round {number} could be used.{_first_reasons(exchange)}")
        made = aggregate_round(self.strategy, number, exchange.replies, current.arrays)
        if made is None:
            logger.warning("%s made no head in round %d; the one before stays.", type(self.strategy).__name__, number)
        return self._version(number, made or current.arrays, exchange)

    def _version(self, number: int, arrays: Arrays, made_by: Exchange) -> _Version:
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        return _Version(number, arrays, made_by, seconds)

    def _round(self, version: _Version, evaluation: Exchange) -> Round:
        sums = evaluation.sums()
        trained = version.made_by.sums()
        held_out = sums[HELD_OUT]
        finished = Round(
            number=version.number,
            sites=sum(bool(row[EXAMPLES]) for row in version.made_by.metrics.values()),
            seconds=version.seconds,
            bytes_down=version.made_by.bytes_down,
            bytes_up=version.made_by.bytes_up,
            train_loss=float(trained[TRAIN_LOSS] / trained[EXAMPLES]) if trained[EXAMPLES] else None,
            loss=float(sums[LOSS_SUM] / held_out) if held_out else None,
            accuracy=float(sums[CORRECT] / held_out) if held_out else None,
            test_accuracy=self.test(self.form.leave(version.arrays)) if self.test else None,
            dropped=dict(sorted(version.made_by.dropped.items())),
        )
        self.on_round(finished)
        return finished


def score_bins(head: LinearHead, stats: FeatureStatistics) -> ScoreBins:
    """Return bins that fit the logits which `head` gives to rows with these statistics."""
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    covariance = weight @ (stats.scatter() / stats.rows) @ weight.T
    mean = (weight @ stats.mean() + bias).numpy()
    return ScoreBins.from_moments(mean, covariance.numpy(), multi_label=stats.multi_label)


def _best(evaluated: Sequence[tuple[_Version, Exchange]]) -> _Version:
    """Return the head with the least pooled held-out loss, over the sites that evaluated every head.

    Where these hold less than half of the held-out rows, as when few sites are sampled each round, heads cannot be
    told apart fairly, and the last one is returned.
    """
    common = sorted(set.intersection(*(set(exchange.metrics) for _, exchange in evaluated)))
    version, last = evaluated[-1]
    rows = sum(last.metrics[name][HELD_OUT] for name in common)
    if rows == 0 or rows < last.sums()[HELD_OUT] / 2:
        return version
    return min(evaluated, key=lambda pair: sum(pair[1].metrics[name][LOSS_SUM] for name in common))[0]


def _at_least_one(total: Sums | None, exchange: Exchange) -> Sums:
    if total is None:
        raise FedheadError(f"Not one site's statistics could be used.{_first_reasons(exchange)}")
    return total


def _first_reasons(exchange: Exchange) -> str:
    return "".join(f" {name}: {reason.rstrip('.')}." for name, reason in sorted(exchange.dropped.items())[:3])
