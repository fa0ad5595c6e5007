"""The coordinator of language models: rounds train adapters, which are kept if held-out conversations prove them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedhead.errors import FedheadError
from fedhead.protocol.heads import HeadRequest
from fedhead.server.evaluation import some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.head_run import HeadCoordinator
from fedhead.server.rounds import Version
from fedhead.server.runs.checkpoint import Progress
from fedhead.server.runs.history import Outcome
from fedhead.server.screening import LEAST_SITES, impossible_answers
from fedhead.server.selection import Choice, Rival, compare_rivals, errors_to_gain
from fedhead.server.tuned_form import AdapterForm
from fedhead.server.tuning import Cost
from fedhead.sums.heads import HELD_OUT
from fedhead.sums.rivals import RivalSums
from fedhead.sums.sums import Arrays

logger = logging.getLogger(__name__)

BASE = "base"
"""What is kept unless adapters are proven to be better: the model as it was."""


class GenerationCoordinator(HeadCoordinator):
    """Runs a configuration of the task `generation` on a Grid; see `Coordinator`."""

    def finish(self, progress: Progress) -> Outcome:
        """Choose between the base model and the best adapters, and evaluate both in detail.

        Raises:
            FedheadError: if no reply of any site could be used.
        """
        assert isinstance(self.form, AdapterForm)
        last = progress.current
        last.made_by.add_traffic(self.attendance.await_sites(last.number + 1))
        self.observer.on_step("evaluate", last.number)
        exchange = self.rounds.evaluate(last.number, last.arrays)
        if not (last.number or exchange.answered):
            raise FedheadError(f"Not one site could train or evaluate the model.{exchange.first_reasons()}")
        number, arrays = self._choose(progress, exchange)
        self.observer.on_step("finish", last.number)
        base = self.form.enter({})
        sites: dict[str, Any] = {}
        before: dict[str, Any] = {}
        if self.config.holdout > 0 or exchange.sums()[HELD_OUT] > 0:
            sites = self._by_site(number, arrays, exchange)
            before = self._by_site(0, base, exchange) if number else sites
        last.made_by.add_traffic(exchange)
        return Outcome(
            head=self.form.leave(arrays if number else {}),
            kept_round=number,
            all_rows=False,
            history=[*progress.history, self.finished_round(last, exchange)],
            participants=sorted(self.roster.rows.keys() - self.roster.refused.keys()),
            sites=sites,
            calibrated=None,
            diagnoses=[],
            coverage=[],
            refused=dict(sorted(self.roster.refused.items())),
            full_model_bytes=progress.full_model_bytes,
            statistics=None,
            choices=self.choices,
            # The folder has the adapters; weights of other origin may be on no other machine.
            settled={"with_backbone": True} if number and self.config.weights != "default" else {},
            traffic=progress.traffic,
            tuning={"kept": "tuned" if number else BASE, "trainable_parameters": self.form.num_parameters},
            before=before,
        )

    def _by_site(self, number: int, arrays: Arrays, exchange: Exchange) -> dict[str, Any]:
        evaluation = self.evaluation(HeadRequest(arrays, server_round=number), self.task.bins())
        found = evaluation.by_site()
        exchange.include(evaluation.exchange)
        assert self.form.longest is not None
        answers = {site: (one.rows, one.tokens, one.loss_sum) for site, one in found.items()}
        for site, reason in impossible_answers(answers, self.form.longest).items():
            exchange.drop([site], reason)
            del found[site]
        return found

    def _choose(self, progress: Progress, exchange: Exchange) -> tuple[int, Arrays]:
        """Return the round whose adapters are kept, and these; round 0 for the base model."""
        last, base = progress.current, self.form.enter({})
        best = self._best(progress, last, exchange)
        if best is None or not best[0]:
            logger.info("%s; the base model is delivered.", "No round was better" if best else "Nothing was compared")
            return 0, base
        rivals = [Rival("the base model", base, "tail"), Rival(f"round {best[0]}", best[1], "tail")]
        nodes = some_sites(self.roster.nodes, self.config.seed)
        by_site: dict[str, RivalSums] = {}

        def note(sites: tuple[str, ...], own: RivalSums, beside: Arrays) -> None:
            by_site[sites[0]] = own

        rows = self.roster.rows
        sums, asking = compare_rivals(self.messenger, nodes, rows, rivals, scaled=False, each=note)
        exchange.include(asking)
        cost = Cost.of(progress.history, last, len(self.roster.nodes))
        proven, choice = choose_adapters(rivals, sums, last.number, cost, by_site)
        self.choices = [*self.choices, choice.to_dict()]
        choice.log()
        return best if proven else (0, base)

    def _best(self, progress: Progress, last: Version, exchange: Exchange) -> tuple[int, Arrays] | None:
        # A version that no site could evaluate has diverged.
        if not exchange.metrics:
            return None
        progress.best.add(last.number, last.arrays, exchange, by=self.task.selects_by)
        found = progress.best.choose(exchange)
        return None if found is None else (found.number, found.arrays)


def choose_adapters(
    rivals: Sequence[Rival], sums: RivalSums, rounds: int, cost: Cost, by_site: Mapping[str, RivalSums]
) -> tuple[bool, Choice]:
    """Choose between the base model, first, and the best adapters, which must be proven better; see `choose_tuned`.

    Conversations are paired, each with the mean loss of a token of its answers. Of three or more sites, the others must
    prove the adapters without any one of them, so that a single site cannot have them kept.

    Args:
        rivals: the two, in this order.
        sums: their comparison.
        rounds: the number of rounds that the adapters are the best of.
        cost: of all rounds.
        by_site: the same comparison at each site; under secure summation, of all sites together.
    """
    needed = errors_to_gain(rounds)
    gain, error = sums.paired.gain(1, 0)
    proven = gain > needed * error
    decisive = _decisive(sums, by_site, needed) if proven else []
    proven &= not decisive
    rows = max(sums.rows, 1)
    reason = "There are too few held-out conversations for a proof."
    if sums.rows > 1:
        reason = (
            f"The loss of a token, averaged over {sums.rows} held-out conversations, is {abs(gain):.4f} "
            f"{'less' if gain > 0 else 'more'} with the adapters of {rivals[1].name} than without, with a paired "
            f"standard error of {error:.4f}; a proof for the best of {rounds} rounds takes {needed:.1f} of them. "
            f"{_without(decisive)}The adapters are {'proven' if proven else 'not proven'} to be better. They cost "
            f"{cost}."
        )
    found = [
        {"name": one.name, "loss": loss / rows, "score": None, "temperature": None}
        for one, loss in zip(rivals, sums.losses.tolist(), strict=True)
    ]
    return proven, Choice("Tuning", rivals[int(proven)].name, reason, sums.rows, found)


def _decisive(sums: RivalSums, by_site: Mapping[str, RivalSums], needed: float) -> list[str]:
    """Return the sites without which the others' conversations prove nothing; none of fewer than three."""
    judging = {site: own for site, own in by_site.items() if own.rows}
    if len(judging) < LEAST_SITES:
        return []
    rest = {site: (sums - own).paired.gain(1, 0) for site, own in judging.items()}
    return sorted(site for site, (gain, error) in rest.items() if gain <= needed * error)


def _without(decisive: Sequence[str]) -> str:
    return f"Without {decisive[0]} the other sites' conversations do not prove it. " if decisive else ""
