"""The interface of a task: everything that depends on the kind of prediction, from the targets to the report."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fedhead.config import LocalConfig
from fedhead.data import IntArray, Samples
from fedhead.data.labels import name_of
from fedhead.errors import UserError
from fedhead.registry import Registry
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Sums
from fedhead.sums.targets import TargetKind
from fedhead.tasks.losses import Loss
from fedhead.tasks.predictions import Predictions

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.evaluation.diagnosis import Diagnostics
    from fedhead.heads import Head
    from fedhead.sums.calibration import Calibration

Targets = npt.NDArray[Any]
"""Targets of `n` rows, `[n]` or `[n, C]`; only the task's own methods interpret them."""

SelectsBy = Literal["loss", "score", "token_loss"]
"""Figure by which heads of several rounds are compared: the loss of a row, the score, or the loss of a token, which
sites weigh by rows."""

tasks: Registry["type[Task]"] = Registry(
    "task",
    {
        "classification": "fedhead.tasks.classification",
        "clusters": "fedhead.tasks.clusters",
        "detection": "fedhead.tasks.detection",
        "generation": "fedhead.tasks.generation",
        "multi-label": "fedhead.tasks.multi_label",
        "ordinal": "fedhead.tasks.ordinal",
        "regression": "fedhead.tasks.regression",
        "segmentation": "fedhead.tasks.segmentation",
        "survival": "fedhead.tasks.survival",
        "tagging": "fedhead.tasks.tagging",
    },
)


@dataclass(frozen=True)
class Calibrated:
    """Calibration of a head, with the figures that evaluate it.

    Attributes:
        calibration: the calibration of the model.
        rows: the number of held-out rows that it was fitted on.
        figures: results on the other held-out rows, as JSON types.
    """

    calibration: "Calibration"
    rows: int
    figures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {**self.figures, "rows_chosen_on": self.rows}


class Task(Predictions):
    """The kind of prediction of a run, and everything that depends on it.

    Args:
        columns: the names of the head's `C` outputs: classes, or real targets.

    Raises:
        UserError: if the columns do not fit the task.
    """

    score_name: ClassVar[str]
    """Name of the metric that models are judged by, in JSON."""

    score_title: ClassVar[str]
    """Name of this metric for readers."""

    loss: ClassVar[Loss]

    kind: ClassVar[TargetKind]
    """Kind of the targets in feature statistics."""

    output_names: ClassVar[tuple[str, str]] = ("class", "classes")
    """What one output of a model is, and several are, for readers."""

    row_name: ClassVar[str] = "row"
    """What held-out rows, and rows that sites count, are for readers, in the singular."""

    answer_name: ClassVar[str]
    """Kind of a model's output for each column: `probabilities` or `values`."""

    answer_meaning: ClassVar[str]
    """Description of these outputs in a sentence."""

    family: ClassVar[str]
    """Family of the task, as the suffix of the Hugging Face hub's task names: `classification` or `regression`."""

    misfit: ClassVar[str]
    """Message to the coordinator if `encode` rejects a site's data; the original message may contain a file name."""

    scales_outputs: ClassVar[bool] = True
    """Whether outputs are temperature-scaled, with a temperature chosen on held-out rows."""

    calibrates: ClassVar[bool] = True
    """Whether the delivered head's outputs are calibrated or checked on held-out rows."""

    pairs_losses: ClassVar[bool] = True
    """Whether heads can be compared by the losses of rows at a temperature."""

    counts_scores: ClassVar[bool] = True
    """Whether each row adds 0 or 1 to the score, so that a score is a number of rows."""

    lower_is_better: ClassVar[bool] = False
    """Whether a smaller score is a better one."""

    dense: ClassVar[bool] = False
    """Whether rows of sums and heads are places of items; see `fedhead.tasks.dense`."""

    proves_by_score: ClassVar[bool] = False
    """Whether a head from rounds must have a better score, and not only a smaller loss, than the solved one."""

    selects_by: ClassVar[SelectsBy] = "loss"
    """Figure by which heads of several rounds are compared."""

    divides_items: ClassVar[bool] = False
    """Whether an item, such as a text, has several rows, its `parts`, such as words."""

    standardises_targets: ClassVar[bool] = False
    """Whether heads are trained on standardised targets."""

    compares_classes: ClassVar[bool] = False
    """Whether sites can be compared with the pool class by class."""

    compares_losses: ClassVar[bool] = False
    """Whether sites can be compared with the pool by squared errors."""

    solvers: ClassVar[tuple[str, ...]] = ("ridge",)
    """Allowed closed-form initialisations of a head; the first that the head supports is the default."""

    baseline_solver: ClassVar[str] = "ridge"
    """Solver for comparing backbones."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.check_columns()

    @classmethod
    def kept_words(cls, number: int) -> str:
        """Name the model that a run keeps, for a sentence."""
        return f"head of round {number} is kept"

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups numbered by `memberships`, for the site's own log and ledger; one for each class.

        A run may write a number as a class in several ways.
        """
        return tuple(f"of class {name_of(name)!r}" for name in self.columns)

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of the leading groups whose rows are counted: the classes."""
        return self.columns

    @property
    def grid(self) -> tuple[float, ...]:
        """The thresholds by which the run, and not the data, divides rows into groups; none in most tasks."""
        return ()

    def check_columns(self) -> None:
        """Validate the names of the columns.

        Raises:
            UserError: if they do not fit the task.
        """
        if not self.columns:
            raise UserError(f"The task {self.name!r} needs the name of at least one output.")

    @classmethod
    def shown(cls, columns: Sequence[str]) -> Sequence[str]:
        """Return the names of a model's outputs for readers."""
        return columns

    # Data.

    @classmethod
    @abstractmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        """Return the column names given by the data itself."""

    @classmethod
    @abstractmethod
    def require(cls, samples: Samples) -> None:
        """Check that data has the labels that the task needs.

        Raises:
            UserError: if not. The message contains no file name.
        """

    @abstractmethod
    def encode(self, samples: Samples) -> Targets:
        """Return the targets of labelled data.

        Raises:
            UserError: if the data has other labels than the task needs, or unknown columns. May name a file.
        """

    def unknown(self, samples: Samples) -> list[str]:
        """Return the classes of rows that are unknown to the task, sorted."""
        return []

    @abstractmethod
    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        """Return pairs of a row's position and one of its groups: the sets of rows that sums distinguish.

        The guard removes small groups, and the ledger compares releases by group.
        """

    @abstractmethod
    def strata(self, targets: Targets) -> IntArray:
        """Return `[n]`, the stratum of each row, for partitions that skew sites."""

    def count_rows(self, targets: Targets, owners: IntArray | None = None, num_sites: int = 1) -> IntArray:
        """Return `[S, G]`, the rows of each site in each of the `counted` groups."""
        positions, groups = self.memberships(targets)
        chosen = groups < len(self.counted)
        sites = np.zeros(len(positions), np.int64) if owners is None else owners[positions]
        cells = sites[chosen] * len(self.counted) + groups[chosen]
        counts = np.bincount(cells, minlength=num_sites * len(self.counted))
        return counts.reshape(num_sites, len(self.counted)).astype(np.int64)

    # Heads.

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        """Return the allowed initialisations of a head, the default first; empty if the head does not fit the task."""
        allowed = {*self.solvers, "zeros", "random"}
        return tuple(init for init in head.inits if init in allowed)

    def local(self, settings: LocalConfig, head: "Head") -> LocalConfig:
        """Return the settings for training this head at a site, given those of the run."""
        return settings

    def statistics(self, num_features: int, origin: "Tensor | None" = None, device: "str" = "cpu") -> FeatureStatistics:
        """Return the feature statistics of no rows."""
        return FeatureStatistics.empty(num_features, len(self.columns), origin, kind=self.kind, device=device)

    def counts_of(self, stats: FeatureStatistics) -> "Tensor":
        """Return `[G]`, int64, the rows of statistics in each of the `counted` groups."""
        return stats.counts

    def coverage(self, counts: Mapping[str, "Tensor"]) -> list[Any]:
        """Return each class's coverage by sites, given rows `[G]` by site; empty for tasks without classes."""
        return []

    def to_standardise(self, features: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the columns to standardise `[n, m]`, given features `[n, d]`."""
        return features

    def origin_to_standardise(self, origin: "Tensor") -> "Tensor":
        """Return the origin `[m]` of these columns' moments, given that of the features `[d]`; 0 for targets."""
        import torch

        if not self.standardises_targets:
            return origin
        return torch.cat([origin, origin.new_zeros(len(self.columns))])

    def unlearned(self, stats: FeatureStatistics) -> tuple[str, ...]:
        """Return the columns without rows at any site."""
        return ()

    # Evaluation.

    def bins(
        self,
        head: "Head | None" = None,
        stats: FeatureStatistics | None = None,
        scale: "tuple[Tensor, Tensor] | None" = None,
    ) -> ScoreBins:
        """Return the bins in which every site counts the outputs of a head; by default fixed ones, for log-odds.

        Args:
            head: for unstandardised features.
            stats: the pooled statistics, if any.
            scale: the targets' mean and standard deviation, `[C]` each, if the task standardises targets.
        """
        return ScoreBins.default(len(self.columns))

    @abstractmethod
    def count(
        self,
        outputs: "Tensor",
        targets: "Tensor",
        owners: IntArray,
        num_sites: int,
        bins: ScoreBins,
    ) -> Iterator[Any]:
        """Yield the evaluation sums of sites `0` to `num_sites - 1`.

        Args:
            outputs: `[n, C]`, in the targets' original units.
            targets: of the same rows.
            owners: `[n]`, the site of each row.
            num_sites: `S`.
            bins: the bins of outputs.

        Raises:
            ValueError: if a shape does not fit or an output is not finite.
        """

    @abstractmethod
    def no_rows(self, bins: ScoreBins | None = None) -> Any:
        """Return the evaluation sums over no rows."""

    def pooled(self, sums: Iterable[Any]) -> Any:
        """Add the evaluation sums of any number of sites."""
        first, *others = sums or [self.no_rows()]
        for one in others:
            first = first + one
        return first

    @abstractmethod
    def score(self, score: float, loss: float, rows: float) -> float | None:
        """Return a head's score, given the sums of `Loss.score` and of the loss over `rows` rows, at least 1."""

    def mean_loss(self, score: float, loss: float, rows: float) -> float | None:
        """Return a head's mean loss, given the same sums."""
        return loss / rows

    @abstractmethod
    def score_of(self, sums: Any) -> float | None:
        """Return the score without an interval; None if it is undefined."""

    @abstractmethod
    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        """Return the score of outputs `[n, C]`; None if it is undefined."""

    @abstractmethod
    def report(self, sums: Any) -> Any:
        """Return metrics with intervals; the attribute `score` is the task's score."""

    @abstractmethod
    def curves(self, sums: Any) -> dict[str, Any]:
        """Return the data of the report's plots as JSON types."""

    @abstractmethod
    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> Any:
        """Evaluate a delivered model and return the evaluation sums.

        Args:
            outputs: `[n, C]`, of the head.
            targets: of the same rows.
            temperature: the divisor of outputs, if the task scales them.
            unlearned: `[C]`, bool, the columns without rows at any site.
        """

    # Sites against the pool.

    def diagnostics(self, sites: "Mapping[str, FeatureStatistics]", pool: FeatureStatistics) -> "Diagnostics | None":
        """Return how sites with these training sums are compared with their pool; None if they cannot be."""
        from fedhead.evaluation.target_diagnosis import TargetDiagnostics

        if not self.compares_losses or not pool.rows or not bool((pool.target_scatter() > 0).any()):
            return None
        return TargetDiagnostics(sites, pool, self.columns)

    def compare_heads(self, outputs: "Sequence[Tensor]", targets: "Tensor", scale: "Tensor | None") -> Sums:
        """Return the sums over rows that compare heads.

        Args:
            outputs: `[n, C]`, of each head of `Diagnostics.heads`.
            targets: of the same rows.
            scale: `[C]`, of `Diagnostics`; None if it has none.

        Raises:
            UserError: if the task does not compare sites.
        """
        from fedhead.evaluation.loss_comparison import scaled_losses

        if not self.compares_losses or scale is None:
            raise UserError(f"Sites of the task {self.name!r} are not compared.")
        return scaled_losses(outputs, targets, scale)

    def losses(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return each row's loss `[n]` by which tuned versions are compared, if outputs have no temperature."""
        return self.loss.values(outputs, targets)

    # Calibration.

    @abstractmethod
    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> Any:
        """Return sums over one half of the held-out rows, for choosing a calibration; over no rows for None."""

    @abstractmethod
    def judging(self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins) -> Any:
        """Return sums over the other half, for evaluating the calibration; over no rows for None."""

    @abstractmethod
    def temperature(self, chosen: Any) -> float:
        """Return the best temperature by the sums of `choosing`, above 0."""

    @abstractmethod
    def calibrated(self, chosen: Any, judged: Any) -> Calibrated:
        """Return the calibration, given sums over at least one row each."""


def make_task(name: str, columns: Sequence[str]) -> Task:
    """Return the task `name` for columns of these names.

    Raises:
        UserError: if there is no such task, or the columns do not fit it.
    """
    return tasks[name](columns)
