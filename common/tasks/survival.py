"""Survival: the time to an event, where rows may be followed for less; hazards in time bins."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhead.data import IntArray, Samples
from fedhead.errors import UserError
from fedhead.evaluation.survival import SurvivalReport, survival_report, time_bins
from fedhead.sums.calibration import Calibration
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.survival import SurvivalSums, survival_sums
from fedhead.sums.targets import LABELS
from fedhead.tasks.losses import HazardLikelihood
from fedhead.tasks.task import Calibrated, Targets, Task, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import Head

EVENT, AT_RISK = "event until ", "at risk until "
"""Prefixes of the columns of a time bin, before its upper edge."""

MOST_BINS = 100
EVENTS_PER_BIN = 30
DEFAULT_BINS = 8
"""Time bins by default: quantiles of the events' times, at most this many, with `EVENTS_PER_BIN` events or more."""

LAST = 0.9
"""Share of the events until the last edge by default."""

_TARGETS = ("time", "event")


@tasks.register("survival")
class Survival(Task):
    """Times to an event in `B` bins: targets are `[n, 2 B]` of 0 and 1, the bin of the event and the bins at risk.

    A row that is followed for only a part of a bin without an event is not at risk in it.

    Args:
        columns: the upper edges of the bins, ascending; or the names of the columns that follow from them.
    """

    name = "survival"
    output_names = ("time bin", "time bins")
    score_name = "concordance"
    score_title = "Concordance"
    loss = HazardLikelihood()
    kind = LABELS
    answer_name = "hazards"
    answer_meaning = (
        "The hazard in each time bin (the probability of an event in it, given none before), then the probability of "
        "no event until its end."
    )
    family = "regression"
    misfit = "Its data has no times and events, or invalid ones; the site's own log has the details."
    scales_outputs = False
    pairs_losses = False
    counts_scores = False
    solvers = ("hazards",)
    baseline_solver = "hazards"

    def __init__(self, columns: Sequence[str]) -> None:
        self.edges = _edges(columns)
        names = [f"{edge:.12g}" for edge in self.edges]
        super().__init__([f"{prefix}{name}" for prefix in (EVENT, AT_RISK) for name in names])

    @property
    def num_bins(self) -> int:
        """`B`."""
        return len(self.edges)

    @property
    def groups(self) -> tuple[str, ...]:
        names = [column.removeprefix(EVENT) for column in self.columns[: self.num_bins]]
        return (
            *(f"with an event until {name}" for name in names),
            *(f"followed until {name}" for name in names),
            "not followed through the first bin",
        )

    @property
    def grid(self) -> tuple[float, ...]:
        return self.edges

    @property
    def counted(self) -> tuple[str, ...]:
        return self.columns[: self.num_bins]

    @classmethod
    def shown(cls, columns: Sequence[str]) -> Sequence[str]:
        return [name.removeprefix("event ") for name in columns if name.startswith(EVENT)] or columns

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        """Return time bins with about equally many of the data's events."""
        cls.require(samples)
        assert samples.targets is not None
        times = samples.targets[samples.targets[:, 1] == 1, 0]
        if len(times) < 2:
            raise UserError(
                f"{samples.spec} has {counted(len(times), 'event')} in {counted(len(samples), 'row')}; a survival "
                "model needs two or more."
            )
        bins = min(max(len(times) // EVENTS_PER_BIN, 1), DEFAULT_BINS)
        # Hardly any row is followed through a bin that ends with the last event.
        found = {float(f"{edge:.3g}") for edge in np.quantile(times, LAST * np.arange(1, bins + 1) / bins)}
        edges = sorted(edge for edge in found if edge > 0) or [float(times.max()) or 1.0]
        return cls([f"{edge:.12g}" for edge in edges]).columns

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.targets is None or samples.target_names != _TARGETS:
            raise UserError(
                "This run predicts the time to an event, but its data has none. Name the columns of times and events, "
                "as in 'csv:FILE?time=days&event=died'."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        assert samples.targets is not None
        times, events = samples.targets.T
        for wrong, said in (
            (~np.isfinite(times), "no finite time"),
            (times < 0, "a time before 0"),
            (~np.isin(events, (0, 1)), "an event that is neither 0 nor 1"),
        ):
            if wrong.any():
                raise UserError(f"{samples.name(int(np.argmax(wrong)))} has {said}; correct or remove it.")
        edges = np.array(self.edges)
        happened = (events == 1) & (times <= edges[-1])
        place = np.searchsorted(edges, times, side="left")
        marks = np.zeros((len(times), self.num_bins), np.int64)
        marks[np.flatnonzero(happened), place[happened]] = 1
        followed = times[:, None] >= edges
        return np.hstack([marks, (followed | (marks == 1)).astype(np.int64)])

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        """Return the cell of each row: the bin of its event, or the last bin through which it was followed."""
        return np.arange(len(targets)), self.strata(targets)

    def strata(self, targets: Targets) -> IntArray:
        event, risk = targets[:, : self.num_bins], targets[:, self.num_bins :]
        last = risk.sum(1) - 1
        followed = np.where(last < 0, 2 * self.num_bins, self.num_bins + last)
        return np.where(event.any(1), event.argmax(1), followed).astype(np.int64)

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        return () if head.directional else super().inits(head)

    def counts_of(self, stats: FeatureStatistics) -> "Tensor":
        return stats.counts[: self.num_bins]

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[SurvivalSums]:
        return survival_sums(outputs[:, : self.num_bins], targets, owners, num_sites)

    def no_rows(self, bins: ScoreBins | None = None) -> SurvivalSums:
        return SurvivalSums.zeros(self.num_bins)

    def score(self, score: float, loss: float, rows: float) -> float | None:
        """Return None: concordance compares pairs of rows, so it is known from the evaluation at the end only."""
        return None

    def score_of(self, sums: SurvivalSums) -> float | None:
        return self.report(sums).concordance.value

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        return self.score_of(self._summed(outputs, targets))

    def report(self, sums: SurvivalSums) -> SurvivalReport:
        return survival_report(sums, self.edges)

    def curves(self, sums: SurvivalSums) -> dict[str, Any]:
        return {"time_bins": time_bins(sums, self.edges)}

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> SurvivalSums:
        return self.no_rows() if outputs is None or targets is None else self._summed(outputs, targets)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> SurvivalSums:
        return self.choosing(outputs, targets, bins)

    def temperature(self, chosen: SurvivalSums) -> float:
        return 1.0

    def calibrated(self, chosen: SurvivalSums, judged: SurvivalSums) -> Calibrated:
        """Return no calibration; the figures compare expected and observed events."""
        return Calibrated(
            Calibration(),
            chosen.rows,
            {"rows_judged_on": judged.rows, "time_bins": time_bins(chosen + judged, self.edges)},
        )

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        import torch

        hazards = outputs[..., : self.num_bins].sigmoid()
        survival = [1 - hazards[..., :1]]
        for place in range(1, self.num_bins):
            survival.append(survival[-1] * (1 - hazards[..., place : place + 1]))
        return torch.cat([hazards, *survival], -1)

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> SurvivalSums:
        return self._summed(outputs, targets)

    def decide(self, answers: "Tensor") -> list[float]:
        """Return the probability of an event until the last edge."""
        return [1 - value for value in answers[:, -1].tolist()]

    def regions(self, answers: "Tensor", calibration: Calibration, coverage: float) -> list[Any]:
        raise UserError("A survival model has no prediction intervals: it predicts the probability of each time.")

    def covers(self, region: Any, target: Any) -> bool:
        raise UserError("A survival model has no prediction intervals.")

    def size(self, region: Any) -> float:
        raise UserError("A survival model has no prediction intervals.")

    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        raise UserError("A survival model has no prediction intervals.")

    @property
    def description(self) -> str:
        return f"a survival model of {counted(self.num_bins, 'time bin')} until {self.edges[-1]:g}"

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        names = [column.removeprefix(EVENT) for column in self.counted]
        return ["risk", *(f"survival {name}" for name in names), *(f"hazard {name}" for name in names if every)]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        if not answers:
            return [""] * len(self.header(every=every))
        shown = [decision, *answers[self.num_bins :], *(answers[: self.num_bins] if every else ())]
        return [f"{value:.4f}" for value in shown]

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        names = [column.removeprefix(EVENT) for column in self.counted]
        line = {"risk": decision, "survival": dict(zip(names, answers[self.num_bins :], strict=True))}
        return {**line, "hazards": dict(zip(names, answers, strict=False))} if every else line

    def _summed(self, outputs: "Tensor", targets: "Tensor") -> SurvivalSums:
        (sums,) = self.count(outputs, targets, np.zeros(len(targets), np.int64), 1, self.bins())
        return sums


def _edges(columns: Sequence[str]) -> tuple[float, ...]:
    """Return the upper edges of time bins from edges or column names.

    Raises:
        UserError: if they are not ascending positive numbers.
    """
    half = len(columns) // 2
    named = [column.removeprefix(EVENT) for column in columns[:half]]
    if half and list(columns) == [f"{prefix}{name}" for prefix in (EVENT, AT_RISK) for name in named]:
        columns = named
    try:
        edges = tuple(map(float, columns))
    except ValueError:
        edges = ()
    ascending = all(low < high for low, high in zip((0.0, *edges), edges, strict=False))
    if not edges or len(edges) > MOST_BINS or not ascending or not math.isfinite(edges[-1]):
        raise UserError(
            f"A survival run has classes = the upper edges of its time bins, 1 to {MOST_BINS} ascending numbers above "
            f"0, as in classes = ['90', '180', '365'], not {', '.join(map(repr, columns[:6]))}."
        )
    return edges
