"""The run as a reader would tell it: describe, install, statistics, train, finish."""

import logging
import time
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.diagnosis import SiteDiagnosis, coverage
from fedhead.errors import FedheadError, UserError
from fedhead.heads import Head
from fedhead.messages import METRICS, Arrays, HeadRequest, Manifest, StatisticsRequest
from fedhead.server.checkpoint import Checkpoint, Progress, new_run
from fedhead.server.contest import HELD_OUT, LOSS_SUM
from fedhead.server.evaluation import calibrate, evaluate_in_detail, some_sites, temperature_sums
from fedhead.server.exchange import EXAMPLES, TRAIN_LOSS, Exchange, Messenger
from fedhead.server.history import Calibrated, Outcome, Round
from fedhead.server.latecomers import Latecomers
from fedhead.server.observer import Observer
from fedhead.server.pooling import Pooling, standardise_content
from fedhead.server.roster import Roster
from fedhead.server.rounds import Rounds, Version
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.server.strategies import required_sites
from fedhead.server.weights_file import CHUNK_BYTES, WeightsFile
from fedhead.statistics import FeatureStatistics

logger = logging.getLogger(__name__)

CORRECT = METRICS.index("correct")


BETWEEN_WORDS = 5.0
"""Seconds between two lines in the log about one wait."""
RETURN_SECONDS = 60.0
"""For so long a resumed run waits for the sites that it had; those that come later join later."""


class Patience:
    """How long something is waited for.

    Args:
        seconds: from now.

    Attributes:
        said: what was said last about the wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.said = ""
        self._speak_at = 0.0
        self.renew()

    def renew(self) -> None:
        """Wait for so long from now on."""
        self._stop = time.monotonic() + self.seconds

    def speaks(self) -> bool:
        """Return whether the log is to be told: where hundreds of sites come one by one, not of each."""
        now = time.monotonic()
        if now < self._speak_at:
            return False
        self._speak_at = now + BETWEEN_WORDS
        return True

    @property
    def lasts(self) -> bool:
        """Whether the time is not over yet."""
        return time.monotonic() < self._stop


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
        checkpoint: where the run is saved, and resumed from.
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
        checkpoint: Checkpoint | None = None,
        deliver: bool = True,
    ) -> None:
        if len(classes) < 2:
            raise UserError(f"A classifier needs two classes or more; this run has {list(classes)}.")
        self.config = config
        self.backbone = backbone
        self.observer = observer or Observer()
        self.sums = sums
        self.test = test
        self.checkpoint = checkpoint
        self.deliver = deliver
        self._saved = checkpoint.load() if checkpoint is not None else None
        self.form = HeadForm(config, backbone.num_features, len(classes))
        self.manifest = Manifest(
            run=checkpoint.run if checkpoint is not None else new_run(),
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
        self._messenger = Messenger(grid, config.round_deadline)
        # Taken once: sites sum about the mean of the very features that they are sent.
        probe = backbone.probe()
        weights = WeightsFile(backbone, None if self._messenger.in_process else CHUNK_BYTES)
        self._roster = Roster(self._messenger, self.manifest, weights, probe, self.observer)
        self._latecomers = Latecomers(self._messenger, self._roster)
        self._needed = max(required_sites(strategy), config.min_sites)
        self._joined: list[str] = []
        self._pooling = Pooling(self._messenger, self.manifest, self._roster, probe, sums)
        self._rounds = Rounds(strategy, self._messenger, self.manifest, self._roster)
        self._marked = time.perf_counter()

    def run(self) -> Outcome:
        """Run to the end, from the start or from where the checkpoint says.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        progress = self._start() if self._saved is None else self._go_on(self._saved)
        for number in range(progress.current.number + 1, self.config.rounds + 1):
            current = progress.current
            exchange = self._train(number, current)
            made = self._rounds.aggregate(number, current.arrays, exchange)
            progress.contest.enter(current.number, current.arrays, exchange)
            progress.full_model_bytes += 2 * exchange.asked * self._whole_model(current.arrays)
            progress.history.append(self._round(current, exchange))
            progress.current = self._version(number, made, exchange)
            self._save(progress)
        return self._finish(progress)

    def _start(self) -> Progress:
        """Gather the sites and make the first head."""
        exchange = Exchange()
        self._roster.gather(exchange)
        patience = Patience(self.config.round_deadline)
        while True:
            self._await_sites(0, exchange)
            stats = self._sum_statistics(exchange)
            if self.form.standardises:
                self._standardise(stats, exchange)
            self._skip_late(exchange)
            self._roster.exclude(exchange.dropped)
            if not (shortage := self._roster.shortage(self._needed)):
                break
            self._be_patient(patience, shortage)
            self._pooling.forget()
            exchange.dropped.clear()
        # Whoever is in the statistics was there from the start.
        self._joined = []
        progress = Progress(
            current=self._version(0, self._starting_head(stats, exchange), exchange),
            stats=stats,
            standardisation=self.form.standardisation,
            excluded=self._roster.excluded,
            counts=self._pooling.counts,
            traffic=self._messenger.traffic,
        )
        self._save(progress)
        return progress

    def _starting_head(self, stats: FeatureStatistics | None, exchange: Exchange) -> Arrays:
        """Make the first head: a solved one that rounds are to better, as sure of itself as held-out rows justify.

        Its rivals learn how sure to be. Without a temperature, the less accurate of two heads could have the lesser
        loss, and gradients would first of all mend its scale.
        """
        arrays = self.form.start(stats)
        if not self._cools_start(stats):
            return arrays
        asked = some_sites(self._roster.nodes, self.config.seed)
        own = Exchange()
        request = HeadRequest(arrays, server_round=0)
        sums = temperature_sums(self._messenger, asked, self._roster, request, own)
        self._skip_late(own)
        exchange.add_traffic(own)
        exchange.dropped.update(own.dropped)
        return self.form.cooled(arrays, sums.best())

    def _cools_start(self, stats: FeatureStatistics | None) -> bool:
        """Tell whether the first head is calibrated: a solved one, where there are rounds and rows to do it on."""
        return stats is not None and self.config.rounds > 0 and self.config.holdout > 0

    def _go_on(self, progress: Progress) -> Progress:
        """Gather the sites again, and tell them how features are standardised in this run."""
        exchange = progress.current.made_by
        self._messenger.traffic = progress.traffic
        self.form.standardisation = progress.standardisation
        self._roster.excluded.update(progress.excluded)
        self._pooling.counts.update(progress.counts)
        again = Exchange()
        self._roster.gather(again)
        if progress.standardisation is not None:
            self.observer.on_step("standardise", progress.current.number)
            self._latecomers.standardise = standardise_content(progress.standardisation)
            self._pooling.tell(progress.standardisation, again)
            self._skip_late(again)
            self._roster.exclude(again.dropped)
        exchange.add_traffic(again)
        joined = set(self._roster.nodes) - set(progress.sites)
        patience = Patience(min(RETURN_SECONDS, self.config.round_deadline))
        while not self._messenger.in_process and patience.lasts:
            if not set(progress.sites) - self._roster.nodes.keys() - self._roster.refused.keys():
                break
            self._messenger.rest()
            self._messenger.poll()
            joined |= set(self._latecomers.welcome(progress.current.number + 1, exchange)) - set(progress.sites)
        self._joined = sorted(joined)
        return progress

    def _await_sites(self, number: int, exchange: Exchange, patience: "Patience | None" = None) -> None:
        """Go on without sites that are gone, take in those that came, and wait until they are enough.

        Args:
            number: the next round.
            exchange: takes the traffic.
            patience: how long; by default for the deadline from now on.

        Raises:
            FedheadError: if they are not within the deadline; time in which sites receive weights does not count.
        """
        patience = patience or Patience(self.config.round_deadline)
        received = self._latecomers.received
        while True:
            if not self._messenger.in_process:
                self._messenger.poll()
                self._joined += self._latecomers.welcome(number, exchange)
            if self._latecomers.received > received:
                received = self._latecomers.received
                patience.renew()
            if not (shortage := self._roster.shortage(self._needed)):
                return
            self._be_patient(patience, shortage)

    def _train(self, number: int, current: Version) -> Exchange:
        """Have the head trained by enough sites; where too few answer, the round is done again.

        Raises:
            FedheadError: if too few answered when the deadline had passed.
        """
        patience = Patience(self.config.round_deadline)
        spent = Exchange()
        while True:
            self._await_sites(number, current.made_by, patience)
            self.observer.on_step("train", number)
            exchange = self._rounds.train(number, current.arrays)
            self._skip_late(exchange)
            exchange.add_traffic(spent)
            if self._messenger.in_process or len(exchange.metrics) >= min(self._needed, exchange.asked):
                exchange.joined, self._joined = sorted(set(self._joined)), []
                return exchange
            spent = exchange
            self._be_patient(
                patience,
                f"{len(exchange.metrics)} of {exchange.asked} sites answered in round {number}, and the run needs "
                f"{self._needed} or more; the round is done again.{exchange.first_reasons()}",
            )

    def _skip_late(self, exchange: Exchange) -> None:
        """Go on without sites that were late or gone; they take part again once they are there."""
        for site in sorted(exchange.late):
            self._roster.lose(site, exchange.dropped[site])
        self._roster.tell()

    def _be_patient(self, patience: "Patience", shortage: str) -> None:
        """Wait a little for more sites, and say why.

        Raises:
            FedheadError: if it was waited for long enough, or waiting cannot help.
        """
        if self._messenger.in_process:
            raise FedheadError(shortage)
        if not patience.lasts:
            hint = f" {self.checkpoint.hint}" if self.checkpoint is not None else ""
            raise FedheadError(f"{shortage} This did not change within {patience.seconds:.0f} s.{hint}")
        if shortage != patience.said:
            patience.said = shortage
            self.observer.on_waiting(shortage)
            if patience.speaks():
                logger.warning("Waiting: %s", shortage)
        self._messenger.rest()

    def _save(self, progress: Progress) -> None:
        progress.sites = sorted(self._roster.nodes)
        if self.checkpoint is not None:
            self.checkpoint.record(progress)

    def _whole_model(self, head: Arrays) -> int:
        return self.backbone.num_bytes + sum(array.nbytes for array in head.values())

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
        # What the sites compute with is float32, so that is what must be folded back, if in float64.
        self.form.standardisation = (sums.mean().float().double(), sums.scale().float().double())
        self._latecomers.standardise = standardise_content(self.form.standardisation)
        self._pooling.tell(self.form.standardisation, exchange)

    def _finish(self, progress: Progress) -> Outcome:
        """Evaluate the last head, and the one that is kept in detail; diagnose the sites; deliver."""
        last, stats = progress.current, progress.stats
        self._await_sites(last.number + 1, last.made_by)
        self.observer.on_step("evaluate", last.number)
        exchange = self._rounds.evaluate(last.number, last.arrays)
        progress.contest.enter(last.number, last.arrays, exchange)
        kept = progress.contest.winner(exchange) or last
        self.observer.on_step("finish", last.number)
        # A temperature of its own comes with the head that is delivered.
        arrays = self.form.start(stats) if kept.number == 0 and self._cools_start(stats) else kept.arrays
        head = self.form.leave(arrays)
        sites = {}
        calibrated: Calibrated | None = None
        if self.config.holdout:
            request = HeadRequest(arrays, server_round=kept.number)
            asked = some_sites(self._roster.nodes, self.config.seed)
            if len(asked) < len(self._roster.nodes):
                logger.info("%d of the sites, drawn at random, evaluate the head in detail.", len(asked))
            sites = evaluate_in_detail(
                self._messenger, asked, self._roster, self.manifest, request, head, stats, exchange
            )
            calibrated = calibrate(self._messenger, asked, self._roster, self.manifest, request, exchange)
        diagnoses: list[SiteDiagnosis] = []
        if stats is not None and self.sums is not None and self.config.diagnose and not self.config.multi_label:
            diagnoses = diagnose_sites(self._messenger, self._roster.nodes, self.manifest, self.sums, stats, exchange)
        stats_of_head = stats
        all_rows = self.deliver and kept.number == 0 and stats is not None and self.config.holdout > 0
        if stats is not None and all_rows:
            held_out = self._pooling.statistics(StatisticsRequest(rows="held_out"), exchange)
            stats_of_head = stats + held_out
            head = self.form.solve(stats_of_head).float()
        # Nothing more is made of the last exchange, so what it took belongs to the head that it evaluates.
        last.made_by.add_traffic(exchange)
        history = [*progress.history, self._round(last, exchange)]
        return Outcome(
            head=head,
            kept_round=kept.number,
            all_rows=all_rows,
            history=history,
            participants=sorted(self._roster.rows.keys() - self._roster.refused.keys()),
            sites=sites,
            calibrated=calibrated,
            diagnoses=diagnoses,
            coverage=coverage(self._pooling.counts, self.manifest.classes) if stats is not None else [],
            refused=dict(sorted(self._roster.refused.items())),
            full_model_bytes=progress.full_model_bytes,
            statistics=stats,
            unlearned=self._unlearned(stats_of_head),
            traffic=progress.traffic,
        )

    def _unlearned(self, stats: FeatureStatistics | None) -> tuple[str, ...]:
        if stats is None:
            return ()
        return tuple(name for name, rows in zip(self.manifest.classes, stats.counts.tolist(), strict=True) if not rows)

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
            joined=tuple(version.made_by.joined),
        )
        self.observer.on_round(finished)
        return finished
