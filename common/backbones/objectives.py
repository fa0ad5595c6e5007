"""Backbones cut for tuning, with the objective of the tail."""

from collections.abc import Sequence
from typing import NamedTuple

from fedhead.backbones.backbone import Backbone
from fedhead.backbones.masked_language import masked_language
from fedhead.backbones.split import Split, split
from fedhead.heads.objectives import Objective, SupervisedContrast, ViewAgreement
from fedhead.tuning import ObjectiveName, TuneSpec


class Cut(NamedTuple):
    """A backbone cut for tuning.

    Attributes:
        split: the frozen part and the tail.
        objective: of the tail; None for the task's loss.
    """

    split: Split
    objective: Objective | None

    @property
    def num_parameters(self) -> int:
        """The number of parameters that train and travel, without those of the head."""
        own = self.objective.trainable() if self.objective is not None else {}
        return sum(value.numel() for value in [*self.split.tail.trainable().values(), *own.values()])


def cut(
    backbone: Backbone,
    tune: TuneSpec,
    objective: ObjectiveName = "task",
    *,
    stages: Sequence[TuneSpec] = (),
    pretrained: bool = False,
) -> Cut:
    """Cut a backbone before the first layer that trains, for an objective of these layers.

    Args:
        backbone: the whole.
        tune: the layers and parameters that train.
        objective: of the layers.
        stages: what trains in each stage of a schedule.
        pretrained: whether the objective's own parameters start from the backbone's files, if these hold any. Sites
            leave it off, because they train parameters from the coordinator and open no file that it names.

    Raises:
        UserError: if it cannot be cut so, or does not fit the objective.
    """
    parts = split(backbone, tune, stages=stages)
    made: Objective | None = None
    if objective == "supcon":
        made = SupervisedContrast()
    elif objective == "simsiam":
        made = ViewAgreement(backbone.num_features)
    elif objective == "mlm":
        made = masked_language(backbone, parts, pretrained=pretrained)
    return Cut(parts, made)
