"""The coordinator, which runs one configuration: describe, install, statistics, train, finish."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.diagnosis import SiteDiagnosis, delivered
from fedhead.evaluation.foreign import Foreign
from fedhead.evaluation.personal import PersonalHeads
from fedhead.heads import Head, unmapped
from fedhead.protocol.actions import STANDARDISE
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import (
    Manifest,
    StatisticsRequest,
)
from fedhead.secure.roster import Roster as MemberRoster
from fedhead.server.best_checkpoint import Candidate
from fedhead.server.evaluation import DetailedEvaluation, some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.foreign import foreign_test
from fedhead.server.latecomers import Latecomers
from fedhead.server.maps import FeatureMaps
from fedhead.server.masked_sum import MaskedSum
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer
from fedhead.server.personal import personalise
from fedhead.server.pooling import Pooling, standardise_content
from fedhead.server.robust_pooling import RobustPooling
from fedhead.server.roster import Roster
from fedhead.server.rounds import Rounds, Version
from fedhead.server.runs.checkpoint import Checkpoint, Progress, new_run
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.secure_sum import RingSum
from fedhead.server.selection import Rival, choose_round, compare_rivals
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.server.strategies import required_sites
from fedhead.server.timeout import Timeout
from fedhead.server.weights_file import CHUNK_BYTES, WeightsFile
from fedhead.sums.evaluation import ScoreBins
from fedhead.sums.features import HARDLY, FeatureStatistics
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, SCORE, TRAIN_LOSS
from fedhead.sums.sums import Arrays
from fedhead.tasks import Calibrated, make_task

logger = logging.getLogger(__name__)


RETURN_SECONDS = 60.0
"""A resumed run waits so long for the sites that it had; those that come later join later."""


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
        test: returns the score of a head on a pooled test set.
        checkpoint: where the run is saved, and resumed from.
        deliver: whether a statistics head that is kept is solved again of all rows, for use.
        members: the signed keys of real sites under secure summation; None where all sites are simulated.

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
        test: Callable[[Head], float | None] | None = None,
        checkpoint: Checkpoint | None = None,
        deliver: bool = True,
        members: MemberRoster | None = None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.observer = observer or Observer()
        self.sums = sums
        self.test = test
        self.checkpoint = checkpoint
        self.deliver = deliver
        self._saved = checkpoint.load() if checkpoint is not None else None
        self.task = make_task(config.task, classes)
        self.form = HeadForm(config, backbone.num_features, self.task)
        if config.pooling == "robust":
            self._require_robust_pooling()
        run = checkpoint.run if checkpoint is not None else new_run()
        self.manifest = Manifest.of(run, config, backbone, classes)
        self._messenger = Messenger(grid, config.round_deadline)
        if config.privacy.secure_sum:
            self._messenger.summation = (
                RingSum(self._messenger)
                if members is None
                else MaskedSum(
                    self._messenger,
                    members,
                    self.manifest,
                    self.observer,
                    config.min_sites,
                    config.privacy.max_colluding,
                )
            )
        # Taken once: sites sum about the mean of the very features that they are sent.
        self._probe = probe = backbone.probe()
        self._choices: list[Mapping[str, Any]] = []
        weights = WeightsFile(backbone, None if self._messenger.in_process else CHUNK_BYTES)
        self._roster = Roster(self._messenger, self.manifest, weights, probe, self.observer)
        self._latecomers = Latecomers(self._messenger, self._roster)
        self._needed = max(required_sites(strategy), config.min_sites)
        self._joined: list[str] = []
        self._pooling = Pooling(self._messenger, self.manifest, self._roster, probe, sums, self.task)
        self._pooling.wait = self._wait_to_sum_again
        self._maps = FeatureMaps(
            config,
            self.task,
            self._messenger,
            self._roster,
            self._latecomers,
            self._pooling,
            self.form,
            probe,
            sums,
        )
        self._rounds = Rounds(strategy, self._messenger, self.manifest, self._roster, self.task)
        self._marked = time.perf_counter()

    def _require_robust_pooling(self) -> None:
        """Check that there will be sums of single sites' to compare.

        Raises:
            UserError: if not.
        """
        if not self.task.kind.exclusive:
            raise UserError(f"pooling 'robust' is for rows of one class each, not for the task {self.task.name!r}.")
        if self.form.init in UNSOLVED:
            raise UserError(f"pooling 'robust' needs a head solved from sums, and init {self.form.init!r} needs none.")
        if self.sums is None or self.sums.keep != "folder":
            raise UserError("pooling 'robust' needs a run folder that keeps each site's sums.")

    def run(self) -> Outcome:
        """Run to the end, from the start or from where the checkpoint says.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        progress = self._start() if self._saved is None else self._go_on(self._saved)
        self._rounds.precondition(progress.stats, self.form.standardisation)
        for number in range(progress.current.number + 1, self.config.rounds + 1):
            current = progress.current
            exchange = self._train(number, current)
            made = self._rounds.aggregate(number, current.arrays, exchange)
            progress.best.add(current.number, current.arrays, exchange)
            progress.full_model_bytes += 2 * exchange.asked * self._whole_model(current.arrays)
            progress.history.append(self._round(current, exchange))
            progress.current = self._version(number, made, exchange)
            self._save(progress)
        return self._finish(progress)

    def _start(self) -> Progress:
        """Gather the sites and make the first head."""
        exchange = self._roster.gather()
        timeout = Timeout(self.config.round_deadline)
        while True:
            exchange.add_traffic(self._await_sites(0))
            # Of the sites that were late before, these are here now.
            exchange.forgive(self._roster.nodes)
            stats, asking = self._sum_statistics()
            exchange.include(asking)
            if self.form.standardises:
                exchange.include(self._standardise(stats))
            if stats is not None and self.config.pooling == "robust":
                stats = self._without_harmful_sites(stats, exchange)
            self._skip_late(exchange)
            self._roster.exclude(exchange.dropped)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            if not (shortage := self._roster.shortage(self._needed)) or self._messenger.summation is not None:
                break
            self._pause_before_repeat(timeout, shortage)
            self._pooling.forget()
            exchange.dropped.clear()
            exchange.late.clear()
        # Sites whose rows are in the statistics count as there from the start.
        self._joined = []
        head, asking = self._starting_head(stats)
        exchange.include(asking)
        progress = Progress(
            current=self._version(0, head, exchange),
            stats=stats,
            mapping=self._maps.current,
            settled=self._maps.settled,
            choices=self._choices,
            standardisation=self.form.standardisation,
            target_standardisation=self.form.target_standardisation,
            excluded=self._roster.excluded,
            counts=self._pooling.counts,
            traffic=self._messenger.traffic,
        )
        self._save(progress)
        return progress

    def _starting_head(self, stats: FeatureStatistics | None) -> tuple[Arrays, Exchange]:
        """Make the first head, and calibrate a solved one that rounds are to improve.

        Without a temperature, the less accurate of two heads could have the smaller loss, and the first gradients
        would mostly correct its scale.

        Returns:
            The head, and the exchange that calibrated it.
        """
        arrays = self.form.start(stats)
        if not self._calibrates_start(stats):
            return arrays, Exchange()
        evaluation = self._evaluation(HeadRequest(arrays, server_round=0), self.task.bins())
        temperature = self.task.temperature(evaluation.choose())
        self._skip_late(evaluation.exchange)
        return self.form.temperature_scaled(arrays, temperature), evaluation.exchange

    def _evaluation(self, request: HeadRequest, bins: ScoreBins) -> DetailedEvaluation:
        """Return the detailed evaluation of a head, at a thousand sites drawn at random where there are more."""
        asked = some_sites(self._roster.nodes, self.config.seed)
        return DetailedEvaluation(self._messenger, asked, self._roster.rows, self.task, request, bins)

    def _calibrates_start(self, stats: FeatureStatistics | None) -> bool:
        """Return whether the first head is calibrated: a solved one, with rounds to come and held-out rows."""
        calibrated = self.config.rounds > 0 and self.config.holdout > 0
        return stats is not None and self.task.scales_outputs and calibrated

    def _go_on(self, progress: Progress) -> Progress:
        """Gather the sites again, and tell them how features are standardised in this run."""
        exchange = progress.current.made_by
        self._messenger.traffic = progress.traffic
        self.form.standardisation = progress.standardisation
        self.form.target_standardisation = progress.target_standardisation
        self._roster.excluded.update(progress.excluded)
        self._pooling.counts.update(progress.counts)
        again = self._roster.gather()
        if progress.mapping is not None:
            again.include(self._maps.announce(progress.mapping))
        self._maps.settled, self._choices = progress.settled, progress.choices
        self.form.init = progress.settled.get("init", self.form.init)
        if progress.standardisation is not None:
            self.observer.on_step("standardise", progress.current.number)
            again.include(self._announce_standardisation())
            self._skip_late(again)
            self._roster.exclude(again.dropped)
        exchange.add_traffic(again)
        joined = set(self._roster.nodes) - set(progress.sites)
        timeout = Timeout(min(RETURN_SECONDS, self.config.round_deadline))
        while not self._messenger.in_process and not timeout.over:
            if not set(progress.sites) - self._roster.nodes.keys() - self._roster.refused.keys():
                break
            self._messenger.rest()
            self._messenger.poll()
            arrivals = self._latecomers.welcome(progress.current.number + 1)
            exchange.add_traffic(arrivals)
            joined |= set(arrivals.joined) - set(progress.sites)
        self._joined = sorted(joined)
        return progress

    def _await_sites(self, number: int, timeout: Timeout | None = None) -> Exchange:
        """Go on without sites that are gone, take in those that came, and wait until they are enough.

        Args:
            number: the next round.
            timeout: how long; by default for the deadline from now on.

        Returns:
            The traffic of sites that came.

        Raises:
            FedheadError: if they are not within the deadline; time in which sites receive weights does not count.
        """
        timeout = timeout or Timeout(self.config.round_deadline)
        received, exchange = self._latecomers.received, Exchange()
        while True:
            if not self._messenger.in_process:
                self._messenger.poll()
                arrivals = self._latecomers.welcome(number)
                exchange.add_traffic(arrivals)
                self._joined += arrivals.joined
            if self._latecomers.received > received:
                received = self._latecomers.received
                timeout.restart()
            if not (shortage := self._roster.shortage(self._needed)):
                return exchange
            self._wait_for_more(timeout, shortage)

    def _train(self, number: int, current: Version) -> Exchange:
        """Have the head trained by enough sites; where too few answer, the round is done again.

        Raises:
            FedheadError: if too few answered when the deadline had passed.
        """
        timeout = Timeout(self.config.round_deadline)
        spent = Exchange()
        while True:
            current.made_by.add_traffic(self._await_sites(number, timeout))
            self.observer.on_step("train", number)
            exchange = self._rounds.train(number, current.arrays)
            self._skip_late(exchange)
            exchange.add_traffic(spent)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            enough = bool(exchange.summed) or exchange.answered >= min(self._needed, exchange.asked)
            if self._messenger.in_process or enough:
                exchange.joined, self._joined = sorted(set(self._joined)), []
                return exchange
            spent = exchange
            self._pause_before_repeat(
                timeout,
                f"{exchange.answered} of {exchange.asked} sites answered in round {number}, and the run needs "
                f"{self._needed} or more; the round is done again.{exchange.first_reasons()}",
            )

    def _skip_late(self, exchange: Exchange) -> None:
        """Go on without sites that were late or gone; they take part again once they are there."""
        for site in sorted(exchange.late):
            self._roster.lose(site, exchange.dropped[site])
        self._roster.tell()

    def _wait_for_more(self, timeout: Timeout, shortage: str) -> None:
        """Wait a little for more sites, and say why.

        Raises:
            FedheadError: if the time is over, or waiting cannot help.
        """
        if self._messenger.in_process:
            raise FedheadError(shortage)
        if timeout.over:
            hint = f" {self.checkpoint.hint}" if self.checkpoint is not None else ""
            raise FedheadError(f"{shortage} This did not change within {timeout.seconds:.0f} s.{hint}")
        if shortage != timeout.reason:
            timeout.reason = shortage
            self.observer.on_waiting(shortage)
        self._messenger.rest()

    def _pause_before_repeat(self, timeout: Timeout, shortage: str) -> None:
        """Wait before sites are asked the same again, longer each time.

        One site that never answers usably would otherwise use up the other sites' budgets of releases.

        Raises:
            FedheadError: as `_wait_for_more` does.
        """
        self._wait_for_more(timeout, shortage)
        stop = time.monotonic() + timeout.next_pause()
        while time.monotonic() < stop and not timeout.over:
            self._messenger.rest()
            self._messenger.poll()

    def _save(self, progress: Progress) -> None:
        progress.sites = sorted(self._roster.nodes)
        if self.checkpoint is not None:
            self.checkpoint.record(progress)

    def _whole_model(self, head: Arrays) -> int:
        return self.backbone.num_bytes + sum(array.nbytes for array in head.values())

    def _wait_to_sum_again(self, failed: Exchange, timeout: Timeout) -> Exchange:
        """Wait for enough sites after a secure sum that too few finished; return the traffic of those that came.

        Raises:
            FedheadError: if they are not there until the deadline has passed.
        """
        self._skip_late(failed)
        self._pause_before_repeat(
            timeout,
            f"Too few sites finished a secure sum, which revealed nothing; it is done again.{failed.first_reasons()}",
        )
        return self._await_sites(0, timeout)

    def _sum_statistics(self) -> tuple[FeatureStatistics | None, Exchange]:
        if self.form.init in UNSOLVED:
            return None, self._maps.prepare()
        self.observer.on_step("statistics", 0)
        if self.config.lift == "auto":
            stats, choice, exchange = self._maps.choose()
            self._choices = [choice.to_dict()]
            logger.info("%s: %s. %s", choice.question, choice.taken, choice.reason)
        else:
            exchange = self._maps.prepare()
            collected = self._pooling.statistics(StatisticsRequest())
            exchange.include(collected.exchange)
            stats = collected.total
        if hardly := stats.hardly_varying:
            logger.warning(
                "%d of %d features vary so little beside the others that they count as constant (less than %g of the "
                "largest variance). If they matter, bring the features to similar scales.",
                hardly,
                stats.num_features,
                HARDLY,
            )
        return stats, exchange

    def _without_harmful_sites(self, stats: FeatureStatistics, exchange: Exchange) -> FeatureStatistics:
        """Leave out sites whose sums make the head worse at the others; return the sum of the other sites'."""
        sums = self.sums
        assert sums is not None
        robust = RobustPooling(
            lambda site: sums.read(site, "train"), self.form.start, lambda head: self._rounds.evaluate(0, head)
        )
        sites = self._pooling.counts.keys() & self._roster.nodes.keys()
        least = len(sites) // 2 + 1
        while len(sites) > least and (harmful := robust.most_harmful(stats, sites)):
            site, reason = harmful
            sites.remove(site)
            exchange.drop([site], reason)
            self._roster.exclude({site: reason})
            self._pooling.remove([site])
            stats = sums.pools(stats.num_classes)["train"]
            if self.form.standardises:
                exchange.include(self._standardise(stats))
        exchange.include(robust.exchange)
        return stats

    def _standardise(self, stats: FeatureStatistics | None) -> Exchange:
        """Agree with the sites on the mean and scale that heads are trained under."""
        self.observer.on_step("standardise", 0)
        exchange = Exchange()
        if stats is not None and stats.num_features == self.form.num_features:
            self.form.standardise(stats)
        else:
            collected = self._pooling.moments()
            exchange.include(collected.exchange)
            self.form.standardise(collected.total)
        exchange.include(self._announce_standardisation())
        return exchange

    def _announce_standardisation(self) -> Exchange:
        assert self.form.standardisation is not None
        content = standardise_content(self.form.standardisation, self.form.target_standardisation)
        self._latecomers.introduction[STANDARDISE] = content
        return self._pooling.announce(content)

    def _finish(self, progress: Progress) -> Outcome:
        """Evaluate the last head, and the one that is kept in detail; diagnose the sites; deliver."""
        last, stats = progress.current, progress.stats
        last.made_by.add_traffic(self._await_sites(last.number + 1))
        self.observer.on_step("evaluate", last.number)
        exchange = self._rounds.evaluate(last.number, last.arrays)
        progress.best.add(last.number, last.arrays, exchange)
        kept = progress.best.choose(exchange) or last
        if kept.number and self._calibrates_start(stats) and self.task.pairs_losses:
            proven, asking = self._prove(self.form.start(stats), kept.arrays, kept.number)
            exchange.include(asking)
            kept = kept if proven else Candidate(0, kept.arrays, np.empty(0))
        self.observer.on_step("finish", last.number)
        # A temperature of its own comes with the head that is delivered.
        arrays = self.form.start(stats) if kept.number == 0 and self._calibrates_start(stats) else kept.arrays
        head = self.form.leave(arrays)
        sites = {}
        calibrated: Calibrated | None = None
        # Sites decide which rows they hold out, whatever the run asks for.
        held_out_rows = self.config.holdout > 0 or exchange.sums()[HELD_OUT] > 0
        if held_out_rows:
            request = HeadRequest(arrays, server_round=kept.number)
            evaluation = self._evaluation(
                request, self.task.bins(unmapped(head), stats, self.form.target_standardisation)
            )
            if (number := len(evaluation.nodes)) < len(self._roster.nodes):
                logger.info("%d of the sites, drawn at random, evaluate the head in detail.", number)
            sites, calibrated = evaluation.by_site(), evaluation.calibrate()
            exchange.include(evaluation.exchange)
        foreign: Foreign | None = None
        if self.config.foreign and held_out_rows:
            asked = some_sites(self._roster.nodes, self.config.seed)
            foreign, asking = foreign_test(self._messenger, asked, self._roster.rows, self._probe, self.task)
            exchange.include(asking)
        diagnoses: list[SiteDiagnosis] = []
        if stats is not None and self.sums is not None and self.config.diagnose:
            diagnoses, asking = diagnose_sites(
                self._messenger,
                self._roster.nodes,
                self._roster.rows,
                self.manifest,
                self.task,
                self.sums,
                stats,
                self.form.num_features,
            )
            exchange.include(asking)
        personal: PersonalHeads | None = None
        if self.config.personal != "none":
            personal, asking = personalise(
                self._messenger, self._roster, self.config.personal, HeadRequest(arrays, kept.number), stats
            )
            exchange.include(asking)
            diagnoses = [delivered(one, personal) for one in diagnoses]
        stats_of_head, secure = stats, self._messenger.summation is not None
        all_rows = self.deliver and kept.number == 0 and stats is not None and held_out_rows
        kept_for_worth = self.config.worth and self.sums is not None and held_out_rows
        if stats is not None and (all_rows or kept_for_worth):
            held_out = self._pooling.statistics(StatisticsRequest(rows="held_out"))
            exchange.include(held_out.exchange)
            if all_rows:
                stats_of_head = stats + held_out.total
                head = self.form.deliver(stats_of_head).float()
        # No head comes of the last exchange, so its traffic belongs to the head that it evaluates.
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
            coverage=self.task.coverage(self._pooling.counts) if stats is not None and not secure else [],
            refused=dict(sorted(self._roster.refused.items())),
            full_model_bytes=progress.full_model_bytes,
            statistics=stats,
            unlearned=self._unlearned(stats_of_head),
            choices=self._choices,
            settled=self._maps.settled,
            foreign=foreign,
            traffic=progress.traffic,
            personal=personal,
        )

    def _prove(self, solved: Arrays, trained: Arrays, number: int) -> tuple[bool, Exchange]:
        """Return whether a head from rounds is better than the solved one beyond doubt; see `choose_round`."""
        rivals = [Rival("round 0", solved), Rival(f"round {number}", trained)]
        nodes = some_sites(self._roster.nodes, self.config.seed)
        sums, exchange = compare_rivals(self._messenger, nodes, self._roster.rows, rivals)
        taken, choice = choose_round(rivals, sums)
        self._choices = [*self._choices, choice.to_dict()]
        logger.info("%s: %s. %s", choice.question, choice.taken, choice.reason)
        return bool(taken), exchange

    def _unlearned(self, stats: FeatureStatistics | None) -> tuple[str, ...]:
        if stats is None:
            return ()
        return self.task.unlearned(stats)

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
            sites=version.made_by.trained,
            seconds=version.seconds,
            bytes_down=version.made_by.bytes_down,
            bytes_up=version.made_by.bytes_up,
            train_loss=float(trained[TRAIN_LOSS] / trained[EXAMPLES]) if trained[EXAMPLES] else None,
            loss=float(sums[LOSS_SUM] / held_out) if held_out else None,
            score=self.task.score(float(sums[SCORE]), float(sums[LOSS_SUM]), float(held_out)) if held_out else None,
            test_score=self.test(self.form.leave(version.arrays)) if self.test else None,
            dropped=dict(sorted(version.made_by.dropped.items())),
            joined=tuple(version.made_by.joined),
        )
        self.observer.on_round(finished)
        return finished
