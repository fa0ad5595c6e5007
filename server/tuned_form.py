"""The trainable form of a tuned run: a tail of the backbone with its head, starting from the solved head."""

import numpy as np
import torch

from fedhead.backbones import Backbone, objectives
from fedhead.backbones.hf_causal import ConversationPreprocessing
from fedhead.backbones.objectives import Cut
from fedhead.config import RunConfig
from fedhead.heads import Head, TunedHead
from fedhead.heads.tail import HEAD, OBJECTIVE, TAIL, part_of
from fedhead.server.starting_head import HeadForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task
from fedhead.tasks.losses import LEAST_ROWS
from fedhead.tuning import parse_tune


def cut(backbone: Backbone, config: RunConfig) -> Cut:
    """Cut the backbone of a tuned run before the first layer that trains in any of its rounds.

    Raises:
        UserError: if it cannot be cut so.
    """
    schedule = config.tune.stages()
    stages = schedule.specs if schedule else ()
    tune = config.tune
    return objectives.cut(backbone, parse_tune(tune.layers), tune.objective, stages=stages, pretrained=True)


class TunedForm(HeadForm):
    """The form of a tail with its head: the tail starts as it is in the backbone, the head as it is solved.

    Args:
        config: of a tuned run.
        backbone: the whole.
        task: of the run.
        made: of the backbone, if it is cut already.

    Raises:
        UserError: if the backbone cannot be cut as `tune` says.
    """

    def __init__(self, config: RunConfig, backbone: Backbone, task: Task, made: Cut | None = None) -> None:
        super().__init__(config, backbone.num_features, task)
        made = made or cut(backbone, config)
        self._tail = made.split.tail
        self._schedule = config.tune.stages()
        self._sequences = backbone.kind == "text"
        self._own = {f"{TAIL}{name}": value.cpu().float().numpy() for name, value in self._tail.shared().items()}
        started = made.objective.trainable() if made.objective is not None else {}
        self._objective = {f"{OBJECTIVE}{name}": value.cpu().float().numpy() for name, value in started.items()}

    @property
    def personal(self) -> bool:
        """Whether a part of the tail stays at each site, so that the run makes a family of personal models."""
        return self._tail.tune.personal

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters, those of the head and of the objective included."""
        own = [*self._own.values(), *self._objective.values()]
        return sum(value.size for value in own) + sum(one.numel() for one in self.make().parameters())

    def trained_in(self, number: int, parameters: Arrays) -> Arrays:
        """Return the parameters that train in a round: all, or those of its stage with the head."""
        if self._schedule is None:
            return parameters
        names = {f"{TAIL}{name}" for name in self._tail.stages[self._schedule.stage(number)]}
        others = (HEAD, OBJECTIVE)
        return {name: value for name, value in parameters.items() if name.startswith(others) or name in names}

    def begins(self, number: int) -> bool:
        """Return whether a stage other than the first begins in a round."""
        return self._schedule is not None and self._schedule.begins(number)

    def share(self, stats: FeatureStatistics | None) -> None:
        """Keep each class's share of all rows, by which sites adjust their logits, if the run does."""
        if stats is None or not self.config.adjusts_shares:
            return
        counts = stats.counts.double().clamp(min=LEAST_ROWS)
        self.shares = (counts / counts.sum()).float()

    def enter(self, head: Arrays) -> Arrays:
        """Return the parameters that rounds start from: the head's, and the own ones of tail and objective."""
        return {**self.joined(head, self._own), **self._objective}

    def evaluated(self, parameters: Arrays) -> Arrays:
        """Return the parameters without those of the objective, which only trains."""
        return {name: value for name, value in parameters.items() if not name.startswith(OBJECTIVE)}

    def solved_on(self, tail: Arrays, stats: FeatureStatistics) -> Arrays:
        """Return the tail of other parameters with the head that is solved from statistics of its features."""
        return self.joined(self.start(stats), self.tail_of(tail))

    def tail_of(self, parameters: Arrays) -> Arrays:
        """Return the parameters of the tail alone, under their names on the wire."""
        return {name: value for name, value in parameters.items() if name.startswith(TAIL)}

    def joined(self, head: Arrays, tail: Arrays) -> Arrays:
        """Return the parameters of a head and of a tail together."""
        return {**{f"{HEAD}{name}": value for name, value in head.items()}, **tail}

    def leave(self, parameters: Arrays) -> Head:
        """Return a head for boundary activations; for features of the frozen backbone without a tail."""
        if not self.tail_of(parameters):
            return super().leave(parameters)
        made = TunedHead(
            self._tail,
            super().leave(part_of(parameters, HEAD)),
            sequences=self._sequences,
            names=self._tail.shared(),
        )
        tail = {name: torch.from_numpy(np.array(value)) for name, value in self.tail_of(parameters).items()}
        made.assign({**{f"{HEAD}{name}": value for name, value in made.head.trainable().items()}, **tail})
        return made

    def as_solved(self, number: int, parameters: Arrays) -> Arrays:
        return parameters if number else part_of(parameters, HEAD)


class AdapterForm(TunedForm):
    """The form of a language model's adapters: no head, and no standardisation of its outputs."""

    def __init__(self, config: RunConfig, backbone: Backbone, task: Task, made: Cut | None = None) -> None:
        super().__init__(config, backbone, task, made)
        assert isinstance(backbone.preprocessing, ConversationPreprocessing)
        self.longest = backbone.preprocessing.recipe.max_length

    @property
    def standardises(self) -> bool:
        return False
