"""The coordinator, which runs one configuration: describe, install, statistics, train, finish."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedhead.adaptation import Adaptation
from fedhead.backbones import Backbone
from fedhead.config import RunConfig
from fedhead.errors import FedheadError
from fedhead.evaluation.diagnosis import SiteDiagnosis, delivered
from fedhead.evaluation.foreign import Foreign
from fedhead.evaluation.personal import PersonalHeads
from fedhead.heads import Head, unmapped
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import (
    Manifest,
    StatisticsRequest,
)
from fedhead.secure.roster import Roster as MemberRoster
from fedhead.server.adaptation import prove_adaptations
from fedhead.server.attendance import Attendance
from fedhead.server.evaluation import DetailedEvaluation, some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.foreign import foreign_test
from fedhead.server.latecomers import Latecomers
from fedhead.server.maps import FeatureMaps
from fedhead.server.masked_sum import MaskedSum
from fedhead.server.messenger import Messenger
from fedhead.server.observer import Observer
from fedhead.server.personal import personalise
from fedhead.server.pooling import Pooling
from fedhead.server.robust_pooling import RobustPooling, require_robust_pooling
from fedhead.server.roster import Roster
from fedhead.server.rounds import Rounds, Version
from fedhead.server.runs.checkpoint import Checkpoint, Progress, new_run
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.secure_sum import RingSum, Summation
from fedhead.server.selection import Rival, choose_round, compare_rivals
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.site_sums import SiteSums
from fedhead.server.standardising import Standardising
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.server.strategies import required_sites
from fedhead.server.tuned_form import TunedForm
from fedhead.server.tuning import Cost, decide
from fedhead.server.weights_file import CHUNK_BYTES, WeightsFile
from fedhead.sums.evaluation import ScoreBins
from fedhead.sums.features import HARDLY, FeatureStatistics
from fedhead.sums.heads import EXAMPLES, HELD_OUT, LOSS_SUM, SCORE, TRAIN_LOSS
from fedhead.sums.sums import Arrays
from fedhead.tasks import make_task

logger = logging.getLogger(__name__)


class Coordinator:
    """Runs one configuration on a Grid.

    Args:
        config: the run; its `simulation` table is not read.
        grid: reaches the sites.
        backbone: the backbone that every site needs.
        classes: the names of the head's outputs.
        strategy: Flower's, or the user's own.
        observer: notified of steps, sites and rounds; the caller notifies it of start and end.
        sums: the store of each site's statistics; sites are diagnosed only with one.
        test: returns the score of a head on a pooled test set.
        checkpoint: saves and resumes the run.
        deliver: whether a solved head is solved again from all rows for use.
        members: the signed keys of real sites under secure summation; None if all sites are simulated.

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
        self.form: HeadForm = (
            TunedForm(config, backbone, self.task)
            if config.tune.on
            else HeadForm(config, backbone.num_features, self.task)
        )
        if config.pooling == "robust":
            require_robust_pooling(self.task, self.form, sums)
        run = checkpoint.run if checkpoint is not None else new_run()
        self.manifest = Manifest.of(run, config, backbone, classes)
        self._messenger = Messenger(grid, config.round_deadline)
        if config.privacy.secure_sum:
            self._messenger.summation = self._secure_sum(members)
        # Taken once: sites sum about the mean of the very features that they are sent.
        self._probe = probe = backbone.probe()
        self._choices: list[Mapping[str, Any]] = []
        weights = WeightsFile(backbone, None if self._messenger.in_process else CHUNK_BYTES)
        self._roster = Roster(self._messenger, self.manifest, weights, probe, self.observer)
        self._latecomers = Latecomers(self._messenger, self._roster)
        self._attendance = Attendance(
            self._messenger,
            self._roster,
            self._latecomers,
            self.observer,
            max(required_sites(strategy), config.min_sites),
            config.round_deadline,
            checkpoint.hint if checkpoint is not None else "",
        )
        self._pooling = Pooling(self._messenger, self.manifest, self._roster, probe, sums, self.task, config.wire)
        self._pooling.wait = self._attendance.wait_to_sum_again
        self._standardising = Standardising(self.form, self._pooling, self._latecomers, self.observer)
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

    def _secure_sum(self, members: MemberRoster | None) -> Summation:
        if members is None:
            return RingSum(self._messenger)
        least, colluding = self.config.min_sites, self.config.privacy.max_colluding
        return MaskedSum(self._messenger, members, self.manifest, self.observer, least, colluding)

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
            try:
                made = self._rounds.aggregate(number, current.arrays, exchange)
            except FedheadError as error:
                if not self.config.tune.on or (number == 1 and not exchange.metrics):
                    raise
                logger.warning("Tuning ends before round %d: %s A smaller tune.lr may help.", number, error)
                break
            progress.best.add(current.number, current.arrays, exchange)
            progress.full_model_bytes += 2 * exchange.asked * self._whole_model(current.arrays)
            progress.history.append(self._round(current, exchange))
            progress.current = self._version(number, made, exchange)
            self._save(progress)
        return self._finish(progress)

    def _start(self) -> Progress:
        """Gather the sites and make the first head."""
        exchange = self._roster.gather()
        timeout = self._attendance.timeout()
        while True:
            exchange.add_traffic(self._attendance.await_sites(0))
            # Of the sites that were late before, these are here now.
            exchange.forgive(self._roster.nodes)
            stats, asking = self._sum_statistics()
            exchange.include(asking)
            self.form.share(stats)
            if self.form.standardises:
                exchange.include(self._standardising.agree(stats))
            if stats is not None and self.config.pooling == "robust":
                stats = self._without_harmful_sites(stats, exchange)
            self._attendance.skip_late(exchange)
            self._roster.exclude(exchange.dropped)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            if not (shortage := self._attendance.shortage) or self._messenger.summation is not None:
                break
            self._attendance.pause_before_repeat(timeout, shortage)
            self._pooling.forget()
            exchange.dropped.clear()
            exchange.late.clear()
        # Sites whose rows are in the statistics count as there from the start.
        self._attendance.joined = []
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
            return self.form.enter(arrays), Exchange()
        evaluation = self._evaluation(HeadRequest(arrays, server_round=0), self.task.bins())
        temperature = self.task.temperature(evaluation.choose())
        self._attendance.skip_late(evaluation.exchange)
        return self.form.enter(self.form.temperature_scaled(arrays, temperature)), evaluation.exchange

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
        self.form.share(progress.stats)
        self._roster.excluded.update(progress.excluded)
        self._pooling.counts.update(progress.counts)
        again = self._roster.gather()
        if progress.mapping is not None:
            again.include(self._maps.announce(progress.mapping))
        self._maps.settled, self._choices = progress.settled, progress.choices
        self.form.init = progress.settled.get("init", self.form.init)
        if progress.standardisation is not None:
            again.include(self._standardising.announce(progress.current.number))
            self._attendance.skip_late(again)
            self._roster.exclude(again.dropped)
        exchange.add_traffic(again)
        exchange.add_traffic(self._attendance.await_return(progress.sites, progress.current.number + 1))
        return progress

    def _train(self, number: int, current: Version) -> Exchange:
        """Have the head trained by enough sites; where too few answer, the round is done again.

        Raises:
            FedheadError: if too few answered when the deadline had passed.
        """
        timeout = self._attendance.timeout()
        spent = Exchange()
        while True:
            current.made_by.add_traffic(self._attendance.await_sites(number, timeout))
            self.observer.on_step("train", number)
            exchange = self._rounds.train(number, current.arrays)
            self._attendance.skip_late(exchange)
            exchange.add_traffic(spent)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            enough = bool(exchange.summed) or exchange.answered >= min(self._attendance.needed, exchange.asked)
            if self._messenger.in_process or enough:
                exchange.joined = self._attendance.take_joined()
                return exchange
            spent = exchange
            self._attendance.pause_before_repeat(
                timeout,
                f"{exchange.answered} of {exchange.asked} sites answered in round {number}, and the run needs "
                f"{self._attendance.needed} or more; the round is done again.{exchange.first_reasons()}",
            )

    def _save(self, progress: Progress) -> None:
        progress.sites = sorted(self._roster.nodes)
        if self.checkpoint is not None:
            self.checkpoint.record(progress)

    def _whole_model(self, head: Arrays) -> int:
        return self.backbone.num_bytes + sum(array.nbytes for array in head.values())

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

        def leave_out(site: str, reason: str) -> FeatureStatistics:
            exchange.drop([site], reason)
            self._roster.exclude({site: reason})
            self._pooling.remove([site])
            rest = sums.pools(stats.num_classes)["train"]
            if self.form.standardises:
                exchange.include(self._standardising.agree(rest))
            return rest

        rest = robust.without_harmful(stats, self._pooling.counts.keys() & self._roster.nodes.keys(), leave_out)
        exchange.include(robust.exchange)
        return rest

    def _finish(self, progress: Progress) -> Outcome:
        """Evaluate the last head, and the one that is kept in detail; diagnose the sites; deliver."""
        last, stats = progress.current, progress.stats
        last.made_by.add_traffic(self._attendance.await_sites(last.number + 1))
        self.observer.on_step("evaluate", last.number)
        exchange = self._rounds.evaluate(last.number, last.arrays)
        number, arrays = self._kept(progress, exchange)
        tuned = self.form if number and isinstance(self.form, TunedForm) else None
        self.observer.on_step("finish", last.number)
        # A temperature of its own comes with the head that is delivered.
        arrays = self.form.start(stats) if number == 0 and self._calibrates_start(stats) else arrays
        head = self.form.leave(arrays)
        # Sites decide which rows they hold out, not the run.
        held_out_rows = self.config.holdout > 0 or exchange.sums()[HELD_OUT] > 0
        sites, calibrated = {}, None
        foreign: Foreign | None = None
        request = HeadRequest(arrays, server_round=number)
        if held_out_rows:
            bins = self.task.bins(unmapped(head), stats, self.form.target_standardisation)
            evaluation = self._evaluation(request, bins)
            if (evaluated := len(evaluation.nodes)) < len(self._roster.nodes):
                logger.info("%d of the sites, drawn at random, evaluate the head in detail.", evaluated)
            sites, calibrated = evaluation.by_site(), evaluation.calibrate()
            exchange.include(evaluation.exchange)
        if self.config.foreign and held_out_rows:
            asked = some_sites(self._roster.nodes, self.config.seed)
            foreign, asking = foreign_test(self._messenger, asked, self._roster.rows, self._probe, self.task)
            exchange.include(asking)
        diagnoses, personal = self._diagnose(request, stats, exchange)
        adaptation = self._adaptation(stats, exchange)
        delivered_stats, all_rows = self._with_held_out(stats, number, exchange, held_out_rows=held_out_rows)
        if all_rows and delivered_stats is not None:
            head = self.form.deliver(delivered_stats).float()
        # No head comes of the last exchange, so its traffic belongs to the head that it evaluates.
        last.made_by.add_traffic(exchange)
        secure = self._messenger.summation is not None
        return Outcome(
            head=head,
            kept_round=number,
            all_rows=all_rows,
            history=[*progress.history, self._round(last, exchange)],
            participants=sorted(self._roster.rows.keys() - self._roster.refused.keys()),
            sites=sites,
            calibrated=calibrated,
            diagnoses=diagnoses,
            coverage=self.task.coverage(self._pooling.counts) if stats is not None and not secure else [],
            refused=dict(sorted(self._roster.refused.items())),
            full_model_bytes=progress.full_model_bytes,
            statistics=stats,
            unlearned=() if delivered_stats is None else self.task.unlearned(delivered_stats),
            choices=self._choices,
            # A tuned backbone is on no machine.
            settled={**self._maps.settled, **({"with_backbone": True} if tuned else {})},
            foreign=foreign,
            adaptation=adaptation and adaptation.of_sums(delivered_stats),
            traffic=progress.traffic,
            personal=personal,
            tuning=self._tuning(tuned is not None),
        )

    def _tuning(self, kept: bool) -> dict[str, Any]:
        """Return what is known of a tuned run beside its choices; nothing of others."""
        if not isinstance(self.form, TunedForm):
            return {}
        return {"kept": "tuned" if kept else "solved", "trainable_parameters": self.form.num_parameters}

    def _kept(self, progress: Progress, exchange: Exchange) -> tuple[int, Arrays]:
        """Return the round whose head is kept, and this head; a head from rounds must be proven better."""
        last, stats = progress.current, progress.stats
        if isinstance(self.form, TunedForm) and stats is not None:
            return self._kept_tuned(self.form, progress, stats, exchange)
        progress.best.add(last.number, last.arrays, exchange)
        kept = progress.best.choose(exchange) or last
        if not (kept.number and self._calibrates_start(stats) and self.task.pairs_losses):
            return kept.number, kept.arrays
        rivals = [Rival("round 0", self.form.start(stats)), Rival(f"round {kept.number}", kept.arrays)]
        nodes = some_sites(self._roster.nodes, self.config.seed)
        sums, asking = compare_rivals(self._messenger, nodes, self._roster.rows, rivals)
        exchange.include(asking)
        proven, choice = choose_round(rivals, sums)
        self._choices = [*self._choices, choice.to_dict()]
        logger.info("%s: %s. %s", choice.question, choice.taken, choice.reason)
        return kept.number if proven else 0, kept.arrays

    def _kept_tuned(
        self, form: TunedForm, progress: Progress, stats: FeatureStatistics, exchange: Exchange
    ) -> tuple[int, Arrays]:
        """Return the round whose tail is kept and the parameters; round 0 for the solved head."""
        last = progress.current
        # A version that no site could evaluate has diverged.
        if exchange.metrics:
            progress.best.add(last.number, last.arrays, exchange)
        kept = progress.best.choose(exchange) if exchange.metrics else None
        if kept is None or not kept.number:
            reason = "No round was better" if kept else "Tuned versions could not be compared"
            logger.info("%s; the solved head is delivered.", reason)
            return 0, form.start(stats)
        decision = decide(
            self._messenger,
            self._roster,
            self._pooling,
            form,
            self.task,
            stats,
            (kept.number, kept.arrays),
            Cost.of(progress.history, len(self._roster.nodes)),
            self.config.seed,
        )
        exchange.include(decision.exchange)
        self._choices = [*self._choices, decision.choice]
        return (kept.number if decision.tuned else 0), decision.arrays

    def _diagnose(
        self, request: HeadRequest, stats: FeatureStatistics | None, exchange: Exchange
    ) -> tuple[list[SiteDiagnosis], PersonalHeads | None]:
        """Compare each site with the pool, and have sites make personal heads if the run asks for them."""
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
        if self.config.personal == "none":
            return diagnoses, None
        personal, asking = personalise(self._messenger, self._roster, self.config.personal, request, stats)
        exchange.include(asking)
        return [delivered(one, personal) for one in diagnoses], personal

    def _adaptation(self, stats: FeatureStatistics | None, exchange: Exchange) -> Adaptation | None:
        """Have sites compare adaptations of the head to rows without labels, if the run asks for it."""
        if stats is None or not self.config.adapt:
            return None
        found, choice, asking = prove_adaptations(
            self._messenger, self._roster, self.form.init, stats, self.config.seed
        )
        exchange.include(asking)
        self._choices = [*self._choices, *([choice.to_dict()] if choice else [])]
        return found

    def _with_held_out(
        self, stats: FeatureStatistics | None, number: int, exchange: Exchange, *, held_out_rows: bool
    ) -> tuple[FeatureStatistics | None, bool]:
        """Ask for sums over held-out rows, if the kept head is solved or the value of sites is to be computed.

        Returns:
            The statistics that the delivered head rests on, and whether they include held-out rows.
        """
        all_rows = self.deliver and number == 0 and stats is not None and held_out_rows
        kept_for_worth = self.config.worth and self.sums is not None and held_out_rows
        if stats is None or not (all_rows or kept_for_worth):
            return stats, False
        held_out = self._pooling.statistics(StatisticsRequest(rows="held_out"))
        exchange.include(held_out.exchange)
        return (stats + held_out.total, True) if all_rows else (stats, False)

    def _version(self, number: int, arrays: Arrays, made_by: Exchange) -> Version:
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        return Version(number, arrays, made_by, seconds)

    def _round(self, version: Version, evaluation: Exchange) -> Round:
        sums = evaluation.sums()
        trained = version.made_by.sums()
        held_out = sums[HELD_OUT]
        measured = self.form.as_solved(version.number, version.arrays)
        finished = Round(
            number=version.number,
            sites=version.made_by.trained,
            seconds=version.seconds,
            bytes_down=version.made_by.bytes_down,
            bytes_up=version.made_by.bytes_up,
            train_loss=float(trained[TRAIN_LOSS] / trained[EXAMPLES]) if trained[EXAMPLES] else None,
            loss=float(sums[LOSS_SUM] / held_out) if held_out else None,
            score=self.task.score(float(sums[SCORE]), float(sums[LOSS_SUM]), float(held_out)) if held_out else None,
            test_score=self.test(self.form.leave(measured)) if self.test else None,
            dropped=dict(sorted(version.made_by.dropped.items())),
            joined=tuple(version.made_by.joined),
        )
        self.observer.on_round(finished)
        return finished
