"""Classification: one class per row."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedhead.data import IntArray, Samples, relabel, require_labels
from fedhead.errors import UserError
from fedhead.evaluation.coverage import ClassCoverage, coverage
from fedhead.evaluation.metrics import EvaluationReport, reliability, report, roc_points
from fedhead.sums.calibration import Calibration, CalibrationSums, TemperatureSums
from fedhead.sums.comparison import ComparisonSums
from fedhead.sums.evaluation import EvaluationSums, sums_by_site
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.targets import CLASSES
from fedhead.tasks.losses import CrossEntropy, Loss
from fedhead.tasks.task import Calibrated, Targets, Task, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.evaluation.diagnosis import Diagnostics
    from fedhead.heads import Head


SEPARATOR = ";"
"""Separator of several classes in one field, in predictions and in input data."""


class ClassTask(Task):
    """Base of the tasks whose columns are classes; targets are int64."""

    family = "classification"
    misfit = "Its data has a class that this run does not know; the site's own log names the class and the file."

    def check_columns(self) -> None:
        if len(self.columns) < 2:
            named = f"only {self.columns[0]!r}" if self.columns else "none"
            raise UserError(f"A classifier needs two classes or more; this run has {named}.")

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return samples.classes

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.targets is not None:
            raise UserError(
                f"This run predicts classes, but its data has real targets ({', '.join(samples.target_names[:5])}). "
                "Name a column of classes, as in ?label=COLUMN, instead of ?target=; or run with --task regression."
            )
        require_labels(samples, multi_label=not cls.kind.exclusive)

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        return relabel(samples, self.columns)

    def unknown(self, samples: Samples) -> list[str]:
        known = {name: place for place, name in enumerate(samples.classes)}
        own = type(self)(samples.classes) if len(samples.classes) > 1 else None
        counts = own.count_rows(own.encode(samples))[0] if own else np.ones(len(known), np.int64)
        return sorted(name for name, place in known.items() if counts[place] and name not in self.columns)

    def coverage(self, counts: Mapping[str, "Tensor"]) -> list[ClassCoverage]:
        return coverage(counts, self.columns)

    def unlearned(self, stats: FeatureStatistics) -> tuple[str, ...]:
        return tuple(name for name, rows in zip(self.columns, stats.counts.tolist(), strict=True) if not rows)

    def bins(
        self,
        head: "Head | None" = None,
        stats: FeatureStatistics | None = None,
        scale: "tuple[Tensor, Tensor] | None" = None,
    ) -> ScoreBins:
        affine = head.affine() if head is not None else None
        if affine is None or stats is None or stats.num_features != affine[0].shape[1]:
            return ScoreBins.default(len(self.columns))
        weight, bias = (part.double() for part in affine)
        covariance = weight @ (stats.scatter() / stats.rows) @ weight.T
        mean = (weight @ stats.mean() + bias).numpy()
        return ScoreBins.from_moments(mean, covariance.numpy(), kind=self.kind)

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[EvaluationSums]:
        return sums_by_site(outputs, targets, owners, num_sites, bins, kind=self.kind)

    def no_rows(self, bins: ScoreBins | None = None) -> EvaluationSums:
        return EvaluationSums.zeros(len(self.columns), kind=self.kind)

    def score(self, score: float, loss: float, rows: float) -> float:
        return score / rows

    def score_of(self, sums: EvaluationSums) -> float | None:
        return sums.correct / sums.rows if sums.rows else None

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        return int(self.loss.score(outputs, targets).sum()) / len(targets) if len(targets) else None

    def report(self, sums: EvaluationSums) -> EvaluationReport:
        return report(sums, self.columns)

    def curves(self, sums: EvaluationSums) -> dict[str, Any]:
        return {
            "confusion": sums.confusion.tolist(),
            "reliability": reliability(sums).to_dict(),
            "roc": [None if points is None else points.round(5).tolist() for points in roc_points(sums)],
        }

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> TemperatureSums:
        if outputs is None or targets is None:
            return TemperatureSums()
        return TemperatureSums.from_logits(outputs, targets, kind=self.kind)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> CalibrationSums:
        if outputs is None or targets is None:
            return CalibrationSums.zeros(len(self.columns), kind=self.kind)
        return CalibrationSums.from_logits(outputs, targets, temperature, kind=self.kind)

    def temperature(self, chosen: TemperatureSums) -> float:
        return chosen.best()

    def calibrated(self, chosen: TemperatureSums, judged: CalibrationSums) -> Calibrated:
        temperature, before, after = chosen.best(), judged.before, judged.after
        scores = tuple(judged.scores.tolist()) if self.kind.exclusive else ()
        figures = {
            "temperature": temperature,
            "rows_judged_on": before.rows,
            "before": {"loss": before.loss_sum / max(before.rows, 1), "reliability": reliability(before).to_dict()},
            "after": {"loss": after.loss_sum / max(after.rows, 1), "reliability": reliability(after).to_dict()},
        }
        return Calibrated(Calibration(temperature, scores), chosen.rows, figures)

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> EvaluationSums:
        logits = outputs.double() / temperature
        # Unlearned classes are never predicted: their logits are below all others.
        logits = logits.where(~unlearned, logits.min() - 50) if len(logits) else logits
        bins = ScoreBins.default(len(self.columns))
        if len(logits) > 1:
            table = logits.numpy()
            bins = ScoreBins.from_moments(table.mean(0), np.cov(table.T), kind=self.kind)
        (sums,) = self.count(logits, targets, np.zeros(len(logits), np.int64), 1, bins)
        return sums

    def covers(self, region: Sequence[str], target: int) -> bool:
        return self.columns[target] in region

    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        return "Sets", f"contain the true class for {held} of rows (nominal {stated}); {size:.2f} classes on average"

    def size(self, region: Sequence[str]) -> float:
        return len(region)

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        return ["label", "probability", *(["set"] if regions else []), *(self.columns if every else [])]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        if not answers:
            return [""] * len(self.header(every=every, regions=regions))
        names, by_class = self.names(decision), dict(zip(self.columns, answers, strict=True))
        return [
            SEPARATOR.join(names),
            SEPARATOR.join(f"{by_class[name]:.4f}" for name in names),
            *([SEPARATOR.join(region)] if regions else []),
            *((f"{value:.4f}" for value in answers) if every else ()),
        ]

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        by_class = dict(zip(self.columns, answers, strict=True))
        line = self.recorded(decision, by_class)
        if regions:
            line["set"] = list(region)
        if every:
            line["probabilities"] = by_class
        return line

    @abstractmethod
    def names(self, decision: Any) -> tuple[str, ...]:
        """Return the predicted classes."""

    @abstractmethod
    def recorded(self, decision: Any, by_class: Mapping[str, float]) -> dict[str, Any]:
        """Return a prediction with its probabilities as JSON types."""


@tasks.register("classification")
class Classification(ClassTask):
    """Single-label classification: targets are class numbers `[n]`."""

    name = "classification"
    score_name = "accuracy"
    score_title = "Accuracy"
    loss: ClassVar[Loss] = CrossEntropy()
    kind = CLASSES
    answer_name = "probabilities"
    answer_meaning = "Calibrated class probabilities that sum to 1; unlearned classes have 0."
    compares_classes = True
    solvers: ClassVar[tuple[str, ...]] = ("lda", "lda-gcv", "ridge", "nearest-mean")
    baseline_solver = "lda"

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        return np.arange(len(targets)), targets

    def strata(self, targets: Targets) -> IntArray:
        return targets

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        return (outputs / temperature).masked_fill(unlearned, -float("inf")).softmax(-1)

    def diagnostics(self, sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics) -> "Diagnostics | None":
        from fedhead.evaluation.class_diagnosis import ClassDiagnostics

        return ClassDiagnostics(sites, pool, self.columns) if self.compares_classes else None

    def compare_heads(self, outputs: "Sequence[Tensor]", targets: "Tensor", scale: "Tensor | None") -> ComparisonSums:
        """Count the rows that each combination of heads predicts correctly."""
        from fedhead.evaluation.comparison import joint_counts

        return ComparisonSums(joint_counts([one.argmax(1) for one in outputs], targets).numpy())

    @property
    def description(self) -> str:
        return f"a classifier of one of {counted(len(self.columns), 'class', 'classes')}"

    def names(self, decision: str) -> tuple[str, ...]:
        return (decision,)

    def recorded(self, decision: str, by_class: Mapping[str, float]) -> dict[str, Any]:
        return {"label": decision, "probability": by_class[decision]}

    def decide(self, answers: "Tensor") -> list[str]:
        return [self.columns[index] for index in answers.argmax(-1).tolist()]

    def regions(self, answers: "Tensor", calibration: Calibration, coverage: float) -> list[tuple[str, ...]]:
        try:
            least = calibration.least_probability(coverage)
        except ValueError as error:
            raise UserError(str(error)) from None
        values, order = answers.sort(stable=True, dim=1, descending=True)
        sizes = (values >= least).sum(1).clamp(min=1).tolist()
        return [
            tuple(self.columns[index] for index in row[:size]) for row, size in zip(order.tolist(), sizes, strict=True)
        ]
