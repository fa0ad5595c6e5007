"""Multi-label classification: any number of classes per row."""

from collections.abc import Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhead.data import IntArray
from fedhead.errors import UserError
from fedhead.sums.calibration import Calibration
from fedhead.sums.targets import LABELS
from fedhead.tasks.classification import ClassTask
from fedhead.tasks.losses import BinaryCrossEntropy
from fedhead.tasks.task import Targets, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.heads import Head


@tasks.register("multi-label")
class MultiLabel(ClassTask):
    """Any number of classes per row, including none: targets are `[n, C]` of 0 and 1."""

    name = "multi-label"
    score_name = "accuracy"
    score_title = "All labels correct"
    loss = BinaryCrossEntropy()
    kind = LABELS
    compares_losses = True
    answer_name = "probabilities"
    answer_meaning = (
        "Calibrated probabilities of each class separately; those above 0.5 are predicted; unlearned classes have 0."
    )

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of the rows with each class, then of the rows without each class (the total minus the class's sum)."""
        return (*super().groups, *(f"not {group}" for group in super().groups))

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        positions, groups = np.nonzero(np.hstack([targets, 1 - targets]))
        return positions, groups

    def strata(self, targets: Targets) -> IntArray:
        """Return `[n]`, the rarest class of each row, the first in a tie; -1 for rows without classes."""
        frequency = np.where(targets == 1, targets.sum(0), len(targets) + 1)
        return np.where(targets.any(1), frequency.argmin(1), -1)

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        return () if head.directional else super().inits(head)

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        return (outputs / temperature).masked_fill(unlearned, -float("inf")).sigmoid()

    @property
    def description(self) -> str:
        return f"a classifier of any number of {counted(len(self.columns), 'class', 'classes')}"

    def names(self, decision: tuple[str, ...]) -> tuple[str, ...]:
        return decision

    def recorded(self, decision: tuple[str, ...], by_class: Mapping[str, float]) -> dict[str, Any]:
        return {"labels": {name: by_class[name] for name in decision}}

    def decide(self, answers: "Tensor") -> list[tuple[str, ...]]:
        return [tuple(compress(self.columns, row)) for row in (answers > 0.5).tolist()]

    def regions(self, answers: "Tensor", calibration: Calibration, coverage: float) -> list[tuple[str, ...]]:
        raise UserError("Sets with a coverage need a model that predicts one class; this one is multi-label.")
