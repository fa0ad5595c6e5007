"""Regression: one or several real targets per row."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhead.config import LocalConfig
from fedhead.data import IntArray, Samples
from fedhead.errors import UserError
from fedhead.evaluation.regression import (
    RegressionReport,
    bin_edges,
    half_width,
    interval_coverage,
    prediction_curve,
    regression_report,
)
from fedhead.registry import suggest
from fedhead.sums.calibration import Calibration
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.regression import RegressionSums, ResidualSums, regression_sums
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.targets import VALUES
from fedhead.tasks.losses import SquaredError
from fedhead.tasks.task import Calibrated, Targets, Task, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import Head

STEADY_WIDTH = 20
"""Largest number of features for stable SGD on squared error with the default learning rate."""

STRATA = 10
"""Number of quantiles of the first target, by which partitions skew sites."""


@tasks.register("regression")
class Regression(Task):
    """Real targets: `[n, K]` float64."""

    name = "regression"
    output_names = ("target", "targets")
    score_name = "r2"
    score_title = "R2"
    loss = SquaredError()
    kind = VALUES
    answer_name = "values"
    answer_meaning = "Predicted values of the targets, in the order of `classes`."
    family = "regression"
    misfit = "Its data lacks a target of this run, or a finite value of one; the site's own log has the details."
    scales_outputs = False
    pairs_losses = False
    counts_scores = False
    standardises_targets = True
    compares_losses = True

    @property
    def groups(self) -> tuple[str, ...]:
        """A single group: every sum is over all rows."""
        return ("of all",)

    @property
    def counted(self) -> tuple[str, ...]:
        return ("all rows",)

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return samples.target_names

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.targets is None:
            raise UserError(
                "This run predicts numbers, but its data names classes. Name the columns of the targets, as in "
                "'csv:FILE?target=COLUMN', or run without --task regression."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        assert samples.targets is not None
        places = {name: place for place, name in enumerate(samples.target_names)}
        for name in self.columns:
            if name not in places:
                raise UserError(
                    f"This run predicts {name!r}, which is not a target of the data. "
                    f"{suggest(name, list(samples.target_names))}"
                )
        targets = np.asarray(samples.targets[:, [places[name] for name in self.columns]], dtype=np.float64)
        if len(bad := np.argwhere(~np.isfinite(targets))):
            row, column = bad[0].tolist()
            raise UserError(
                f"{samples.name(row)} has no finite number in {self.columns[column]!r}. Leave such rows out or "
                "fill in the number."
            )
        return targets

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        return np.arange(len(targets)), np.zeros(len(targets), np.int64)

    def strata(self, targets: Targets) -> IntArray:
        """Return `[n]`, the decile of each row's first target."""
        first = targets[:, 0]
        edges = np.quantile(first, np.arange(1, STRATA) / STRATA) if len(first) else np.empty(0)
        return np.searchsorted(edges, first, side="left").astype(np.int64)

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        return () if head.directional else super().inits(head)

    def local(self, settings: LocalConfig, head: "Head") -> LocalConfig:
        """Reduce the learning rate of SGD on a linear head to `lr * min(1, STEADY_WIDTH / d)`.

        The curvature of squared error grows with the squared norm of the features, which is `d` after
        standardisation, so that larger steps diverge (normalised least mean squares; Nagumo & Noda, IEEE Transactions
        on Automatic Control, 1967).
        """
        if settings.optimizer != "sgd" or head.affine() is None:
            return settings
        return settings.model_copy(update={"lr": settings.lr * min(1.0, STEADY_WIDTH / head.num_features)})

    def counts_of(self, stats: FeatureStatistics) -> "Tensor":
        return stats.counts.new_tensor([stats.rows]).long()

    def to_standardise(self, features: "Tensor", targets: "Tensor") -> "Tensor":
        """Return features and targets side by side."""
        import torch

        return torch.cat([features.double(), targets.double()], dim=1)

    def bins(
        self,
        head: "Head | None" = None,
        stats: FeatureStatistics | None = None,
        scale: "tuple[Tensor, Tensor] | None" = None,
    ) -> ScoreBins:
        """Return each target's pooled mean and standard deviation; 0 and 1 if unknown."""
        if scale is None and stats is not None:
            scale = stats.target_mean(), stats.target_scale()
        if scale is None:
            return ScoreBins(np.zeros(len(self.columns)), np.ones(len(self.columns)))
        mean, deviation = (part.detach().cpu().double().numpy() for part in scale)
        return ScoreBins(mean, deviation)

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[RegressionSums]:
        return regression_sums(outputs, targets, owners, num_sites, bins)

    def no_rows(self, bins: ScoreBins | None = None) -> RegressionSums:
        return RegressionSums.zeros(bins or self.bins())

    def score(self, score: float, loss: float, rows: float) -> float | None:
        """Return R2 about the pooled training mean."""
        return 1 - loss / score if score else None

    def score_of(self, sums: RegressionSums) -> float | None:
        return self.report(sums).r2.value

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        import torch

        return self.score_of(self.judged(outputs, targets, 1.0, torch.zeros(len(self.columns), dtype=torch.bool)))

    def report(self, sums: RegressionSums) -> RegressionReport:
        return regression_report(sums, self.columns)

    def curves(self, sums: RegressionSums) -> dict[str, Any]:
        places = zip(sums.bins.centre.tolist(), sums.bins.spread.tolist(), strict=True)
        return {"predictions": prediction_curve(sums), "edges": [bin_edges(*one) for one in places]}

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> ResidualSums:
        if outputs is None or targets is None:
            return ResidualSums.zeros(bins)
        return ResidualSums.from_outputs(outputs, targets, bins)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> ResidualSums:
        return self.choosing(outputs, targets, bins)

    def temperature(self, chosen: ResidualSums) -> float:
        return 1.0

    def calibrated(self, chosen: ResidualSums, judged: ResidualSums) -> Calibrated:
        """Compute intervals from the residuals of both halves; the figures evaluate the first half's on the second."""
        both = chosen + judged
        calibration = Calibration(residuals=tuple(map(tuple, both.counts.tolist())), spread=tuple(both.spread.tolist()))
        intervals = dict(zip(self.columns, interval_coverage(chosen, judged), strict=True))
        return Calibrated(calibration, chosen.rows, {"rows_judged_on": judged.rows, "intervals": intervals})

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        return outputs

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> RegressionSums:
        bins = self.bins()
        if len(targets):
            true = targets.double().numpy()
            deviation = true.std(0)
            bins = ScoreBins(true.mean(0), np.where(deviation > 0, deviation, 1.0))
        (sums,) = self.count(outputs, targets, np.zeros(len(targets), np.int64), 1, bins)
        return sums

    def covers(self, region: Sequence[tuple[float, float]], target: Sequence[float]) -> bool:
        return all(low <= value <= high for (low, high), value in zip(region, target, strict=True))

    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        return (
            "Intervals",
            f"contain the true values of {held} of rows (nominal {stated}); {size:.4g} wide on average",
        )

    def size(self, region: Sequence[tuple[float, float]]) -> float:
        return sum(high - low for low, high in region) / len(region)

    @property
    def description(self) -> str:
        return f"a regression of {counted(len(self.columns), 'target')}"

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        return [part for name in self.columns for part in (name, *([f"{name} low", f"{name} high"] if regions else []))]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        if not answers:
            return [""] * len(self.header(regions=regions))
        limits = region if regions else [()] * len(answers)
        return [f"{number:.6g}" for value, own in zip(answers, limits, strict=True) for number in (value, *own)]

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"values": dict(zip(self.columns, answers, strict=True))}
        if regions:
            # JSON has no infinity: an unbounded interval has null for both limits.
            finite = [[one if math.isfinite(one) else None for one in own] for own in region]
            line["intervals"] = dict(zip(self.columns, finite, strict=True))
        return line

    def decide(self, answers: "Tensor") -> list[Any]:
        """Return a number for each row, or a tuple of numbers if there are several targets."""
        rows = answers.tolist()
        return [row[0] for row in rows] if len(self.columns) == 1 else [tuple(row) for row in rows]

    def regions(
        self, answers: "Tensor", calibration: Calibration, coverage: float
    ) -> list[tuple[tuple[float, float], ...]]:
        """Return the lower and upper limit of each target's prediction interval, for each row."""
        if not calibration.residuals:
            raise UserError("Prediction intervals need held-out rows, but none were counted.")
        try:
            widths = [
                half_width(counts, spread, coverage)
                for counts, spread in zip(calibration.residuals, calibration.spread, strict=True)
            ]
        except ValueError as error:
            raise UserError(str(error)) from None
        return [
            tuple((value - width, value + width) for value, width in zip(row, widths, strict=True))
            for row in answers.tolist()
        ]
