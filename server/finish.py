"""The end of a run of a head: the kept head evaluated and delivered, and the sites diagnosed."""

import logging
from typing import Any

from fedhead.adaptation import Adaptation
from fedhead.evaluation.diagnosis import SiteDiagnosis, delivered
from fedhead.evaluation.foreign import Foreign
from fedhead.evaluation.personal import PersonalHeads
from fedhead.heads import Head, unmapped
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import StatisticsRequest
from fedhead.server.adaptation import prove_adaptations
from fedhead.server.coordinator import Coordinator
from fedhead.server.evaluation import some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.foreign import foreign_test
from fedhead.server.personal import personalise
from fedhead.server.rounds import Version
from fedhead.server.runs.checkpoint import Progress
from fedhead.server.runs.history import Outcome
from fedhead.server.score_proof import choose_by_score
from fedhead.server.selection import BAR, Rival, choose_round, choose_tuned, compare_rivals
from fedhead.server.site_diagnosis import diagnose_sites
from fedhead.server.subgroups import evaluate_subgroups
from fedhead.server.tuned_form import TunedForm
from fedhead.server.tuning import Cost, decide
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import HELD_OUT
from fedhead.sums.sums import Arrays
from fedhead.tasks.task import Calibrated

logger = logging.getLogger(__name__)


class Finish:
    """Chooses the head that a run keeps, and makes the outcome of the run.

    Args:
        run: after its last round.
        progress: its state.
    """

    def __init__(self, run: Coordinator, progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self.choices = run.choices
        self.family: Arrays | None = None

    def outcome(self) -> Outcome:
        """Evaluate the last head, and the one that is kept in detail; diagnose the sites; deliver."""
        progress = self.progress
        last, stats = progress.current, progress.stats
        last.made_by.add_traffic(self.run.attendance.await_sites(last.number + 1))
        self.run.observer.on_step("evaluate", last.number)
        exchange = self.run.rounds.evaluate(last.number, last.arrays)
        number, arrays, solved_again = self._kept(exchange)
        tuned = self.run.form if number and isinstance(self.run.form, TunedForm) else None
        self.run.observer.on_step("finish", last.number)
        # A temperature of its own comes with the head that is delivered.
        arrays = self.run.form.start(stats) if number == 0 and self.run.calibrates_start(stats) else arrays
        head = self.run.form.leave(arrays)
        # Sites decide which rows they hold out, not the run.
        held_out_rows = self.run.config.holdout > 0 or exchange.sums()[HELD_OUT] > 0
        sites: dict[str, Any] = {}
        calibrated, foreign = None, None
        subgroups: dict[str, Any] = {}
        request = HeadRequest(arrays, server_round=number)
        if held_out_rows:
            sites, calibrated = self._evaluated(request, head, exchange)
            subgroups = self._by_subgroup(request, calibrated, exchange)
            foreign = self._foreign(exchange)
        diagnoses, personal = self._diagnose(request, stats, exchange)
        adaptation = self._adaptation(stats, exchange)
        delivered_stats, all_rows = self._with_held_out(stats, number, exchange, held_out_rows=held_out_rows)
        if all_rows and delivered_stats is not None:
            head = self.run.form.deliver(delivered_stats).float()
        elif solved_again is not None:
            head, all_rows = self.run.form.leave(solved_again), True
        # No head comes of the last exchange, so its traffic belongs to the head that it evaluates.
        last.made_by.add_traffic(exchange)
        secure = self.run.messenger.summation is not None
        return Outcome(
            head=head,
            kept_round=number,
            all_rows=all_rows,
            history=[*progress.history, self.run.finished_round(last, exchange)],
            participants=sorted(self.run.roster.rows.keys() - self.run.roster.refused.keys()),
            sites=sites,
            calibrated=calibrated,
            diagnoses=diagnoses,
            coverage=self.run.task.coverage(self.run.pooling.counts) if stats is not None and not secure else [],
            refused=dict(sorted(self.run.roster.refused.items())),
            full_model_bytes=progress.full_model_bytes,
            statistics=stats,
            unlearned=() if delivered_stats is None else self.run.task.unlearned(delivered_stats),
            choices=self.choices,
            # A tuned backbone is on no machine.
            settled={**self.run.maps.settled, **({"with_backbone": True} if tuned else {})},
            foreign=foreign,
            adaptation=adaptation and adaptation.of_sums(delivered_stats),
            traffic=progress.traffic,
            personal=personal,
            subgroups=subgroups,
            tuning=self._tuning(tuned is not None),
        )

    def _evaluated(
        self, request: HeadRequest, head: Head, exchange: Exchange
    ) -> tuple[dict[str, Any], Calibrated | None]:
        """Have sites evaluate the kept head in detail; return each site's report, and the calibration of the head."""
        bins = self.run.task.bins(unmapped(head), self.progress.stats, self.run.form.target_standardisation)
        evaluation = self.run.evaluation(request, bins)
        if (evaluated := len(evaluation.nodes)) < len(self.run.roster.nodes):
            logger.info("%d of the sites, drawn at random, evaluate the head in detail.", evaluated)
        sites, calibrated = evaluation.by_site(), evaluation.calibrate()
        exchange.include(evaluation.exchange)
        return sites, calibrated

    def _by_subgroup(self, head: HeadRequest, calibrated: Calibrated | None, exchange: Exchange) -> dict[str, Any]:
        """Return how the kept head does in each subgroup of the run, as JSON types; empty if it has none."""
        run = self.run
        if not run.config.subgroups:
            return {}
        temperature = calibrated.calibration.temperature if calibrated else 1.0
        asked = some_sites(run.roster.nodes, run.config.seed)
        found, asking = evaluate_subgroups(
            run.messenger, asked, run.roster.rows, run.config, run.task, head, temperature
        )
        exchange.include(asking)
        return found

    def _foreign(self, exchange: Exchange) -> Foreign | None:
        """Return the test of inputs unlike the sites' rows, if the run asks for it."""
        if not self.run.config.foreign:
            return None
        asked = some_sites(self.run.roster.nodes, self.run.config.seed)
        foreign, asking = foreign_test(self.run.messenger, asked, self.run.roster.rows, self.run.probe, self.run.task)
        exchange.include(asking)
        return foreign

    def _tuning(self, kept: bool) -> dict[str, Any]:
        """Return figures of a tuned run, other than its choices; empty for other runs."""
        if not isinstance(self.run.form, TunedForm):
            return {}
        named = "personal" if self.family is not None else "tuned" if kept else "solved"
        return {"kept": named, "trainable_parameters": self.run.form.num_parameters}

    def _kept(self, exchange: Exchange) -> tuple[int, Arrays, Arrays | None]:
        """Return the round whose head is kept, and this head; a head from rounds must be proven better.

        Of a tuned run, the parameters with a head solved from all rows come third, if this is delivered.
        """
        progress = self.progress
        last, stats = progress.current, progress.stats
        if isinstance(self.run.form, TunedForm) and stats is not None:
            return self._kept_tuned(self.run.form, stats, exchange)
        progress.best.add(last.number, last.arrays, exchange, by=self.run.task.selects_by)
        kept = progress.best.choose(exchange) or last
        if kept.number and stats is not None and self.run.task.proves_by_score:
            return self._proven_by_score(kept.number, kept.arrays, stats, exchange)
        if not (kept.number and self.run.calibrates_start(stats) and self.run.task.pairs_losses):
            return kept.number, kept.arrays, None
        rivals = [Rival("round 0", self.run.form.start(stats)), Rival(f"round {kept.number}", kept.arrays)]
        nodes = some_sites(self.run.roster.nodes, self.run.config.seed)
        sums, asking = compare_rivals(self.run.messenger, nodes, self.run.roster.rows, rivals)
        exchange.include(asking)
        proven, choice = choose_round(rivals, sums)
        self.choices = [*self.choices, choice.to_dict()]
        choice.log()
        return kept.number if proven else 0, kept.arrays, None

    def _proven_by_score(
        self, number: int, arrays: Arrays, stats: FeatureStatistics, exchange: Exchange
    ) -> tuple[int, Arrays, Arrays | None]:
        """Return the round whose head is kept, and this head: the solved one, unless the other has a better score."""
        solved, found = self.run.form.start(stats), []
        for version, one in ((0, solved), (number, arrays)):
            evaluation = self.run.evaluation(HeadRequest(one, server_round=version), self.run.task.bins())
            found.append(evaluation.by_site())
            exchange.include(evaluation.exchange)
        proven, choice = choose_by_score(self.run.task, found[0], found[1], number)
        self.choices = [*self.choices, choice.to_dict()]
        choice.log()
        return (number, arrays, None) if proven else (0, solved, None)

    def _kept_tuned(
        self, form: TunedForm, stats: FeatureStatistics, exchange: Exchange
    ) -> tuple[int, Arrays, Arrays | None]:
        """Return the round whose tail is kept and the parameters, also as delivered; round 0 for the solved head."""
        progress = self.progress
        last = progress.current
        if form.personal:
            return 0, self._kept_family(form, stats, last, exchange), None
        # A version that no site could evaluate has diverged.
        if exchange.metrics:
            progress.best.add(last.number, last.arrays, exchange)
        kept = progress.best.choose(exchange) if exchange.metrics else None
        if kept is None:
            logger.info("Tuned versions could not be compared; the solved head is delivered.")
            return 0, form.start(stats), None
        decision = decide(
            self.run.messenger,
            self.run.roster,
            self.run.pooling,
            form,
            self.run.task,
            stats,
            (kept.number, form.evaluated(kept.arrays)),
            (last.number, form.evaluated(last.arrays)),
            Cost.of(progress.history, last, len(self.run.roster.nodes)),
            self.run.config.seed,
        )
        exchange.include(decision.exchange)
        self.choices = [*self.choices, decision.choice]
        return decision.number, decision.arrays, decision.delivered

    def _kept_family(self, form: TunedForm, stats: FeatureStatistics, last: Version, exchange: Exchange) -> Arrays:
        """Compare the solved head with the sites' own models of the last round; return the solved head.

        It is delivered in either case, since a part of each other model never leaves its site.
        """
        solved = form.start(stats)
        if not (last.number and exchange.metrics):
            return solved
        rivals = [
            Rival("the solved head", solved),
            Rival("each site's own adapters", last.arrays, "tail", trained=True),
        ]
        nodes = some_sites(self.run.roster.nodes, self.run.config.seed)
        sums, asking = compare_rivals(self.run.messenger, nodes, self.run.roster.rows, rivals)
        exchange.include(asking)
        proven, choice = choose_tuned(rivals, [0.0, BAR], sums)
        self.choices = [*self.choices, choice.to_dict()]
        choice.log()
        self.family = last.arrays if proven else None
        return solved

    def _diagnose(
        self, request: HeadRequest, stats: FeatureStatistics | None, exchange: Exchange
    ) -> tuple[list[SiteDiagnosis], PersonalHeads | None]:
        """Compare each site with the pool, and have sites make personal heads if the run asks for them."""
        diagnoses: list[SiteDiagnosis] = []
        if stats is not None and self.run.sums is not None and self.run.config.diagnose:
            diagnoses, asking = diagnose_sites(
                self.run.messenger,
                self.run.roster.nodes,
                self.run.roster.rows,
                self.run.manifest,
                self.run.task,
                self.run.sums,
                stats,
                self.run.form.num_features,
            )
            exchange.include(asking)
        mode = self.run.config.personal if self.family is None else "adapters"
        if mode == "none":
            return diagnoses, None
        personal, asking = personalise(self.run.messenger, self.run.roster, mode, request, stats, self.family)
        exchange.include(asking)
        return [delivered(one, personal) for one in diagnoses], personal

    def _adaptation(self, stats: FeatureStatistics | None, exchange: Exchange) -> Adaptation | None:
        """Have sites compare adaptations of the head to rows without labels, if the run asks for it."""
        if stats is None or not self.run.config.adapt:
            return None
        found, choice, asking = prove_adaptations(
            self.run.messenger, self.run.roster, self.run.form.init, stats, self.run.config.seed
        )
        exchange.include(asking)
        self.choices = [*self.choices, *([choice.to_dict()] if choice else [])]
        return found

    def _with_held_out(
        self, stats: FeatureStatistics | None, number: int, exchange: Exchange, *, held_out_rows: bool
    ) -> tuple[FeatureStatistics | None, bool]:
        """Ask for sums over held-out rows, if the kept head is solved or the value of sites is to be computed.

        Returns:
            The statistics that the delivered head rests on, and whether they include held-out rows.
        """
        all_rows = self.run.deliver and number == 0 and stats is not None and held_out_rows
        kept_for_worth = self.run.config.worth and self.run.sums is not None and held_out_rows
        if stats is None or not (all_rows or kept_for_worth):
            return stats, False
        held_out = self.run.pooling.statistics(StatisticsRequest(rows="held_out"))
        exchange.include(held_out.exchange)
        return (stats + held_out.total, True) if all_rows else (stats, False)
