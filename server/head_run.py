"""Runs of a head, solved and trained in rounds: describe, install, statistics, train, finish."""

import logging

from fedhead.errors import FedheadError
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import StatisticsRequest
from fedhead.server.coordinator import Coordinator
from fedhead.server.exchange import Exchange
from fedhead.server.finish import Finish
from fedhead.server.robust_pooling import RobustPooling
from fedhead.server.rounds import Version
from fedhead.server.runs.checkpoint import Progress
from fedhead.server.runs.history import Outcome
from fedhead.server.starting_head import UNSOLVED
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays
from fedhead.sums.totals import HARDLY

logger = logging.getLogger(__name__)


class HeadCoordinator(Coordinator):
    """Runs a configuration whose head is solved from sums, trained in rounds, or both; see `Coordinator`."""

    def run(self) -> Outcome:
        """Run to the end, from the start or from where the checkpoint says.

        Raises:
            FedheadError: if too few sites can take part, or no reply of an exchange can be used.
        """
        progress = self._start() if self.saved is None else self._go_on(self.saved)
        self.rounds.precondition(progress.stats, self.form.standardisation)
        for number in range(progress.current.number + 1, self.config.rounds + 1):
            current = progress.current
            exchange = self._train(number, current)
            try:
                made = self.rounds.aggregate(number, current.arrays, exchange)
            except FedheadError as error:
                if not self.config.tune.on:
                    raise
                current.made_by.include(exchange)
                logger.warning("Tuning ends before round %d: %s A smaller tune.lr may help.", number, error)
                break
            progress.best.add(current.number, current.arrays, exchange, by=self.task.selects_by)
            progress.full_model_bytes += 2 * exchange.asked * self._whole_model(current.arrays)
            progress.history.append(self.finished_round(current, exchange))
            progress.current = self.version(number, made, exchange)
            self._save(progress)
        return self.finish(progress)

    def finish(self, progress: Progress) -> Outcome:
        """Evaluate, choose what is kept, and return it."""
        return Finish(self, progress).outcome()

    def _start(self) -> Progress:
        """Gather the sites and make the first head."""
        exchange = self.roster.gather()
        timeout = self.attendance.timeout()
        while True:
            exchange.add_traffic(self.attendance.await_sites(0))
            # Of the sites that were late before, these are here now.
            exchange.forgive(self.roster.nodes)
            stats, asking = self._sum_statistics()
            exchange.include(asking)
            self.form.share(stats)
            if self.form.standardises:
                exchange.include(self.standardising.agree(stats))
            if stats is not None and self.config.pooling == "robust":
                stats = self._without_harmful_sites(stats, exchange)
            self.attendance.skip_late(exchange)
            self.roster.exclude(exchange.dropped)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            if not (shortage := self.attendance.shortage) or self.messenger.summation is not None:
                break
            self.attendance.pause_before_repeat(timeout, shortage)
            self.pooling.forget()
            exchange.dropped.clear()
            exchange.late.clear()
        # Sites whose rows are in the statistics count as there from the start.
        self.attendance.joined = []
        head, asking = self._starting_head(stats)
        exchange.include(asking)
        progress = Progress(
            current=self.version(0, head, exchange),
            stats=stats,
            mapping=self.maps.current,
            settled=self.maps.settled,
            choices=self.choices,
            standardisation=self.form.standardisation,
            target_standardisation=self.form.target_standardisation,
            excluded=self.roster.excluded,
            counts=self.pooling.counts,
            traffic=self.messenger.traffic,
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
        if not self.calibrates_start(stats):
            return self.form.enter(arrays), Exchange()
        evaluation = self.evaluation(HeadRequest(arrays, server_round=0), self.task.bins())
        temperature = self.task.temperature(evaluation.choose())
        self.attendance.skip_late(evaluation.exchange)
        return self.form.enter(self.form.temperature_scaled(arrays, temperature)), evaluation.exchange

    def _go_on(self, progress: Progress) -> Progress:
        """Gather the sites again, and send them the standardisation of this run."""
        exchange = progress.current.made_by
        self.messenger.traffic = progress.traffic
        self.form.standardisation = progress.standardisation
        self.form.target_standardisation = progress.target_standardisation
        self.form.share(progress.stats)
        self.roster.excluded.update(progress.excluded)
        self.pooling.counts.update(progress.counts)
        again = self.roster.gather()
        if progress.mapping is not None:
            again.include(self.maps.announce(progress.mapping))
        self.maps.settled, self.choices = progress.settled, progress.choices
        self.form.init = progress.settled.get("init", self.form.init)
        if progress.standardisation is not None:
            again.include(self.standardising.announce(progress.current.number))
            self.attendance.skip_late(again)
            self.roster.exclude(again.dropped)
        exchange.add_traffic(again)
        exchange.add_traffic(self.attendance.await_return(progress.sites, progress.current.number + 1))
        return progress

    def _train(self, number: int, current: Version) -> Exchange:
        """Have the head trained by enough sites; where too few answer, the round is done again.

        Raises:
            FedheadError: if too few answered when the deadline had passed.
        """
        timeout = self.attendance.timeout()
        spent = Exchange()
        while True:
            current.made_by.add_traffic(self.attendance.await_sites(number, timeout))
            self.observer.on_step("train", number)
            exchange = self.rounds.train(number, current.arrays)
            self.attendance.skip_late(exchange)
            exchange.add_traffic(spent)
            # A secure sum is opened once: the sites do not answer again for other survivors.
            enough = bool(exchange.summed) or exchange.answered >= min(self.attendance.needed, exchange.asked)
            # If all sites diverged, they would again.
            diverged = self.config.tune.on and not exchange.answered and not exchange.late and bool(exchange.dropped)
            if self.messenger.in_process or enough or diverged:
                exchange.joined = self.attendance.take_joined()
                return exchange
            spent = exchange
            self.attendance.pause_before_repeat(
                timeout,
                f"{exchange.answered} of {exchange.asked} sites answered in round {number}, and the run needs "
                f"{self.attendance.needed} or more; the round is done again.{exchange.first_reasons()}",
            )

    def _save(self, progress: Progress) -> None:
        progress.sites = sorted(self.roster.nodes)
        if self.checkpoint is not None:
            self.checkpoint.record(progress)

    def _whole_model(self, head: Arrays) -> int:
        return self.backbone.num_bytes + sum(array.nbytes for array in head.values())

    def _sum_statistics(self) -> tuple[FeatureStatistics | None, Exchange]:
        if self.form.init in UNSOLVED:
            return None, self.maps.prepare()
        self.observer.on_step("statistics", 0)
        if self.config.lift == "auto":
            stats, choice, exchange = self.maps.choose()
            self.choices = [choice.to_dict()]
            choice.log()
        else:
            exchange = self.maps.prepare()
            collected = self.pooling.statistics(StatisticsRequest())
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
            lambda site: sums.read(site, "train"), self.form.start, lambda head: self.rounds.evaluate(0, head)
        )

        def leave_out(site: str, reason: str) -> FeatureStatistics:
            exchange.drop([site], reason)
            self.roster.exclude({site: reason})
            self.pooling.remove([site])
            rest = sums.pools(stats.num_classes)["train"]
            if self.form.standardises:
                exchange.include(self.standardising.agree(rest))
            return rest

        rest = robust.without_harmful(stats, self.pooling.counts.keys() & self.roster.nodes.keys(), leave_out)
        exchange.include(robust.exchange)
        return rest
