"""The result of a run, simulated or over real sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedhead.config import RunConfig
from fedhead.model import TransferModel
from fedhead.server.runs.history import Outcome, Round
from fedhead.server.runs.summary import RunSummary
from fedhead.sums.evaluation import EvaluationSums
from fedhead.tasks import Task, make_task


@dataclass(frozen=True, kw_only=True)
class CompletedRun:
    """A finished run and its scores.

    Attributes:
        config: the run, including everything that its data decides.
        model: the delivered model.
        outcome: history, per-site scores, refusals and traffic.
        test_score: of the delivered model on the pooled test set; None without one.
        run_dir: the run folder, if there is one.
    """

    config: RunConfig
    model: TransferModel
    outcome: Outcome
    test_score: float | None = None
    run_dir: Path | None = None

    def write_to(self, folder: Path) -> None:
        """Write the figures, and anything else that only this kind of run has, to the run folder."""
        self.record.write(folder)

    @property
    def history(self) -> Sequence[Round]:
        """Every head of the run, from the starting head."""
        return self.outcome.history

    @property
    def sites(self) -> Mapping[str, EvaluationSums]:
        """The kept head's evaluation at each site with held-out rows."""
        return self.outcome.sites

    @cached_property
    def task(self) -> Task:
        """The task of the run."""
        return make_task(self.config.task, self.config.classes)

    @cached_property
    def evaluation(self) -> Any:
        """The task's report of the kept head on the pooled held-out rows, with 95 % intervals."""
        return self.task.report(self.task.pooled(self.sites.values()))

    @property
    def score(self) -> float | None:
        """The score on the pooled test set if there is one, else on the pooled held-out rows; None without either."""
        return self.test_score if self.test_score is not None else self.score_held_out

    @property
    def score_held_out(self) -> float | None:
        """The score of the kept head on the sites' held-out rows, pooled."""
        if noisy := self.outcome.privacy.get("evaluation"):
            return float(noisy["accuracy"][0])
        value: float | None = self.evaluation.score.value
        return value

    @property
    def score_one_exchange(self) -> float | None:
        """The score of the head solved from statistics, measured as `score` is; None if it was not solved."""
        if self.outcome.statistics is None:
            return None
        first = self.history[0]
        return first.test_score if first.test_score is not None else first.score

    @property
    def score_after_rounds(self) -> float | None:
        """The score of the last head, measured as `score` is; None without rounds."""
        last = self.history[-1]
        if last.number == 0:
            return None
        return last.test_score if last.test_score is not None else last.score

    @property
    def score_by_site(self) -> dict[str, float]:
        """The score of the kept head on each site's held-out rows, where it is defined."""
        scores = {name: self.task.score_of(sums) for name, sums in self.outcome.single_sites.items()}
        return {name: score for name, score in scores.items() if score is not None}

    @property
    def score_mean_site(self) -> float | None:
        """The mean over sites."""
        return float(np.mean(list(self.score_by_site.values()))) if self.score_by_site else None

    @property
    def score_worst_site(self) -> float | None:
        """The score of the worst site."""
        worst = max if self.task.lower_is_better else min
        return worst(self.score_by_site.values(), default=None)

    # A classifier's score is its accuracy.
    accuracy = score
    accuracy_held_out = score_held_out
    accuracy_one_exchange = score_one_exchange
    accuracy_after_rounds = score_after_rounds
    accuracy_by_site = score_by_site
    accuracy_mean_site = score_mean_site
    accuracy_worst_site = score_worst_site

    @property
    def test_accuracy(self) -> float | None:
        """The accuracy of the delivered classifier on the pooled test set; None without one."""
        return self.test_score

    @property
    def bytes_down(self) -> int:
        """Payload from the coordinator to all sites."""
        return sum(finished.bytes_down for finished in self.history)

    @property
    def bytes_up(self) -> int:
        """Payload from all sites to the coordinator."""
        return sum(finished.bytes_up for finished in self.history)

    @property
    def _score_solved(self) -> float | None:
        """The score of a tuned run's head before tuning, measured as `score` is; None for other runs."""
        if not self.outcome.tuning:
            return None
        if self.outcome.tuning["kept"] != "tuned":
            return self.score
        if self.history[0].test_score is not None:
            return self.history[0].test_score
        if self.outcome.before:
            return self.task.score_of(self.task.pooled(self.outcome.before.values()))
        score = self.outcome.choices[-1]["rivals"][0]["score"]
        return None if score is None else float(score)

    @property
    def record(self) -> RunSummary:
        """The figures that `result.json` holds."""
        return RunSummary(
            score=self.score,
            score_name=self.task.score_name,
            score_held_out=self.score_held_out,
            score_test=self.test_score,
            score_one_exchange=self.score_one_exchange,
            score_after_rounds=self.score_after_rounds,
            score_mean_site=self.score_mean_site,
            score_worst_site=self.score_worst_site,
            rounds=self.config.rounds,
            kept_round=self.outcome.kept_round,
            score_solved=self._score_solved,
            kept=self.outcome.tuning.get("kept"),
            trainable_parameters=self.outcome.tuning.get("trainable_parameters"),
            sites=len(self.outcome.participants),
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            bytes_full_model=self.outcome.full_model_bytes,
            sites_refused=dict(self.outcome.refused),
            choices=[dict(one) for one in self.outcome.choices],
            subgroups=list(self.outcome.subgroups.get("groups", ())),
            worst_subgroup=self.outcome.subgroups.get("sentence"),
            run_dir=str(self.run_dir) if self.run_dir else None,
        )

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run as plain values; the score's family has its own name, such as `accuracy`."""
        return self.record.to_dict()
