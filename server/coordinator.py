"""The run as a reader would tell it: describe, install, statistics, train, finish."""

import time
import uuid
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.diagnosis import SiteDiagnosis, coverage
from fedhead.errors import UserError
from fedhead.heads import Head
from fedhead.messages import METRICS, Arrays, HeadRequest, Manifest, StatisticsRequest
from fedhead.server.evaluation import evaluate_in_detail
from fedhead.server.exchange import EXAMPLES, TRAIN_LOSS, Exchange, Messenger
from fedhead.server.history import Outcome, Round
from fedhead.server.observer import Observer
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.rounds import HELD_OUT, LOSS_SUM, Rounds, Version, best
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.server.strategies import required_sites
from fedhead.statistics import FeatureStatistics

CORRECT = METRICS.index("correct")


class Coordinator:
    """Runs one configuration on a Grid.

    Args:
        config: the run; its `simulation` table is not read.
        grid: where the sites are.
        backbone: what every site is to hold.
        classes: the names of the head's outputs.
        strategy: Flower's, or the user's own.
        observer: is told of steps, sites and rounds; of start and end by who calls this.
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
        observer: Observer | None = None,
        sums: SiteSums | None = None,
        test: Callable[[Head], float] | None = None,
        deadline: float = 3600.0,
        deliver: bool = True,
    ) -> None:
        if len(classes) < 2:
            raise UserError(f"A classifier needs two classes or more; this run has {list(classes)}.")
        self.config = config
        self.backbone = backbone
        self.observer = observer or Observer()
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
        probe = backbone.probe()
        self._roster = Roster(self._messenger, self.manifest, backbone, probe, required_sites(strategy), self.observer)
        self._pooling = Pooling(self._messenger, self.manifest, self._roster, probe, sums)
        self._rounds = Rounds(strategy, self._messenger, self.manifest, self._roster, backbone.num_bytes)
        self._marked = time.perf_counter()

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        history: list[Round] = []
        evaluated: list[tuple[Version, Exchange]] = []
        first = Exchange()
        self._roster.gather(first)
        stats = self._sum_statistics(first)
        if self.config.rounds:
            self._standardise(stats, first)
        self._roster.exclude(first.dropped)
        current = self._version(0, self.form.start(stats), first)
        for number in range(1, self.config.rounds + 1):
            self.observer.on_step("train", number)
            exchange = self._rounds.train(number, current.arrays)
            evaluated.append((current, exchange))
            history.append(self._round(current, exchange))
            current = self._version(number, self._rounds.aggregate(number, current.arrays, exchange), exchange)
        self.observer.on_step("evaluate", self.config.rounds)
        exchange = self._rounds.evaluate(self.config.rounds, current.arrays)
        evaluated.append((current, exchange))
        return self._finish(history, current, best(evaluated), stats, exchange)

    def _sum_statistics(self, exchange: Exchange) -> FeatureStatistics | None:
        if self.form.init in UNSOLVED:
            return None
        self.observer.on_step("statistics", 0)
        return self._pooling.statistics(StatisticsRequest(), exchange)

    def _standardise(self, stats: FeatureStatistics | None, exchange: Exchange) -> None:
        """Agree with the sites on the mean and scale that heads are trained under."""
        self.observer.on_step("standardise", 0)
        same_width = stats is not None and stats.num_features == self.backbone.num_features
        sums = stats if stats is not None and same_width else self._pooling.moments(exchange)
        self.form.standardisation = self._pooling.agree(sums, exchange)

    def _finish(
        self,
        history: list[Round],
        last: Version,
        kept: Version,
        stats: FeatureStatistics | None,
        exchange: Exchange,
    ) -> Outcome:
        """Have the kept head evaluated in detail and the sites diagnosed; deliver the head."""
        self.observer.on_step("finish", self.config.rounds)
        head = self.form.leave(kept.arrays)
        sites = {}
        if self.config.holdout:
            request = HeadRequest(kept.arrays, server_round=kept.number)
            sites = evaluate_in_detail(self._messenger, self._roster, self.manifest, request, head, stats, exchange)
        diagnoses: list[SiteDiagnosis] = []
        if stats is not None and self.sums is not None and self.config.diagnose and not self.config.multi_label:
            diagnoses = diagnose_sites(self._messenger, self._roster.nodes, self.manifest, self.sums, stats, exchange)
        all_rows = self.deliver and kept.number == 0 and stats is not None and self.config.holdout > 0
        if stats is not None and all_rows:
            held_out = self._pooling.statistics(StatisticsRequest(rows="held_out"), exchange)
            head = self.form.solve(stats + held_out).float()
        # Nothing more is made of the last exchange, so what it took belongs to the head that it evaluates.
        last.made_by.bytes_down += exchange.bytes_down
        last.made_by.bytes_up += exchange.bytes_up
        history.append(self._round(last, exchange))
        return Outcome(
            head=head,
            kept_round=kept.number,
            all_rows=all_rows,
            history=history,
            participants=sorted(self._roster.nodes),
            sites=sites,
            diagnoses=diagnoses,
            coverage=coverage(self._pooling.counts, self.manifest.classes) if stats is not None else [],
            refused=dict(sorted(self._roster.refused.items())),
            full_model_bytes=self._rounds.full_model_bytes,
            statistics=stats,
        )

    def _version(self, number: int, arrays: Arrays, made_by: Exchange) -> Version:
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        return Version(number, arrays, made_by, seconds)

    def _round(self, version: Version, evaluation: Exchange) -> Round:
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
        self.observer.on_round(finished)
        return finished
