"""Ordinal classification: one of several ordered classes, called levels, per row.

The head estimates the levels' probabilities linearly. Their sums above each level are the cumulative probabilities
`P(y > k)`, which equal those of a ridge regression on the cumulative columns, since both have the same Gram matrix and
the columns are sums of indicators. They are made monotone, and the median level is predicted.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedhead.config import LocalConfig
from fedhead.data import IntArray, Samples
from fedhead.errors import UserError
from fedhead.evaluation.ordinal import OrdinalReport, ordinal_report
from fedhead.sums.calibration import CalibrationSums, TemperatureSums
from fedhead.sums.evaluation import EvaluationSums, sums_by_site
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.tasks.classification import Classification
from fedhead.tasks.losses import RankedProbability
from fedhead.tasks.regression import STEADY_WIDTH
from fedhead.tasks.task import Calibrated, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import Head

LEAST = 1e-6
"""Lower bound of a level's probability where its logarithm is taken."""


@tasks.register("ordinal")
class Ordinal(Classification):
    """Ordered classes: targets are level numbers `[n]`; the columns are the levels, the lowest first."""

    name = "ordinal"
    loss = RankedProbability()
    answer_meaning = "Probabilities of the levels, which sum to 1; the median level is predicted."
    scales_outputs = False
    pairs_losses = False
    compares_classes = False
    solvers = ("ridge",)
    baseline_solver = "ridge"

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        try:
            return tuple(sorted(samples.classes, key=float))
        except ValueError:
            raise UserError(
                f"The levels {', '.join(map(repr, samples.classes[:5]))} are not numbers, so they have no order. Name "
                'them from the lowest to the highest, as in --set \'classes=["mild", "moderate", "severe"]\' or, in '
                "run.toml, classes = ['mild', 'moderate', 'severe']."
            ) from None

    def check_columns(self) -> None:
        if len(self.columns) < 2:
            named = f"only {self.columns[0]!r}" if self.columns else "none"
            raise UserError(f"An ordinal run needs two levels or more; this one has {named}.")

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        return () if head.directional else super().inits(head)

    def local(self, settings: LocalConfig, head: "Head") -> LocalConfig:
        """Reduce the learning rate of SGD on a linear head as for squared error, and by the number of levels."""
        if settings.optimizer != "sgd" or head.affine() is None:
            return settings
        share = min(1.0, STEADY_WIDTH / head.num_features) * min(1.0, 2 / len(self.columns))
        return settings.model_copy(update={"lr": settings.lr * share})

    def bins(
        self,
        head: "Head | None" = None,
        stats: FeatureStatistics | None = None,
        scale: "tuple[Tensor, Tensor] | None" = None,
    ) -> ScoreBins:
        """Return fixed bins: scores are log-odds of the levels' probabilities."""
        return ScoreBins.default(len(self.columns))

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[EvaluationSums]:
        logits = self.logarithms(outputs)
        decided = self.levels(logits.exp()).cpu().numpy()
        return sums_by_site(logits, targets, owners, num_sites, bins, kind=self.kind, decided=decided)

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        right = self.levels(self.logarithms(outputs).exp()) == targets
        return int(right.sum()) / len(targets) if len(targets) else None

    def report(self, sums: EvaluationSums) -> OrdinalReport:
        return ordinal_report(sums, self.columns)

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> TemperatureSums:
        return super().choosing(None if outputs is None else self.logarithms(outputs), targets, bins)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> CalibrationSums:
        return super().judging(None if outputs is None else self.logarithms(outputs), targets, temperature, bins)

    def temperature(self, chosen: TemperatureSums) -> float:
        return 1.0

    def calibrated(self, chosen: TemperatureSums, judged: CalibrationSums) -> Calibrated:
        found = super().calibrated(chosen, judged)
        calibration = replace(found.calibration, temperature=1.0)
        return Calibrated(calibration, found.rows, {**found.figures, "temperature": 1.0})

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        probabilities = self.probabilities(outputs).masked_fill(unlearned, 0.0)
        answers: Tensor = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=LEAST)
        return answers

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> EvaluationSums:
        (sums,) = self.count(outputs, targets, np.zeros(len(targets), np.int64), 1, self.bins())
        return sums

    def decide(self, answers: "Tensor") -> list[str]:
        return [self.columns[level] for level in self.levels(answers).tolist()]

    @property
    def description(self) -> str:
        return f"an ordinal classifier of {counted(len(self.columns), 'level')}"

    def probabilities(self, outputs: "Tensor") -> "Tensor":
        """Return the levels' probabilities `[n, C]` from outputs, with torch operations that exports support.

        The cumulative probabilities are replaced by the mean of their largest monotone minorant and least monotone
        majorant, clipped to 0 and 1.
        """
        import torch

        above = [outputs[..., level:].sum(-1) for level in range(1, outputs.shape[-1])]
        below, over = [above[0]], [above[-1]]
        for level in range(1, len(above)):
            below.append(torch.minimum(below[-1], above[level]))
            over.append(torch.maximum(over[-1], above[-1 - level]))
        monotone = torch.stack([(low + high) / 2 for low, high in zip(below, over[::-1], strict=True)], -1)
        ends = torch.ones_like(monotone[..., :1]), torch.zeros_like(monotone[..., :1])
        whole = torch.cat([ends[0], monotone.clamp(0, 1), ends[1]], -1)
        return whole[..., :-1] - whole[..., 1:]

    def logarithms(self, outputs: "Tensor") -> "Tensor":
        """Return the logarithms of the levels' probabilities `[n, C]`, float64."""
        return self.probabilities(outputs.double()).clamp(min=LEAST).log()

    def levels(self, probabilities: "Tensor") -> "Tensor":
        """Return the median level `[n]`, int64."""
        below = probabilities.cumsum(-1)[..., :-1]
        # Rounding must not move a median from a boundary of one half.
        return (below < below.new_tensor(0.5) - 1e-9).sum(-1)
