"""The head that a run starts from, and the coordinates it is trained in."""

import numpy as np
import torch
from torch import Tensor

from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.heads import CosineHead, Head, make_head
from fedhead.messages import Arrays
from fedhead.solvers import solve_head, solve_prototypes
from fedhead.statistics import FeatureStatistics, projection_for

UNSOLVED = ("zeros", "random")
"""What a head may start from without statistics."""


def resolve_init(config: RunConfig, head: Head) -> str:
    """Return what `config.init` says, or the head's default.

    Raises:
        UserError: if the head cannot start so.
    """
    inits, where = (head.multi_label_inits, " in a multi-label run") if config.multi_label else (head.inits, "")
    if not inits:
        raise UserError(f"A head {config.head!r} does not fit multi-label data; take 'linear' or 'mlp:256'.")
    init = config.init or inits[0]
    if init not in inits:
        raise UserError(f"A head {config.head!r} cannot start from {init!r}{where}, only from: {', '.join(inits)}.")
    return init


class HeadForm:
    """The form of a run's heads: features as they are outside, standardised features inside training.

    Gradient steps on standardised features converge evenly; `(x - mean) / scale` is folded back into the head when
    it leaves.

    Args:
        config: names the head and its init.
        num_features: `d`.
        num_classes: `C`.
    """

    def __init__(self, config: RunConfig, num_features: int, num_classes: int) -> None:
        self.config = config
        self.num_features = num_features
        self.num_classes = num_classes
        self.init = resolve_init(config, self.make())
        self.standardisation: tuple[Tensor, Tensor] | None = None

    def make(self) -> Head:
        """Return a new head."""
        return make_head(self.config.head, self.num_features, self.num_classes)

    @property
    def standardises(self) -> bool:
        """Whether sites are to standardise: where heads are trained, or mean and scale belong to the form itself."""
        return self.config.rounds > 0 or isinstance(self.make(), CosineHead)

    def solve(self, stats: FeatureStatistics) -> Head:
        """Solve the float64 head that `init` names, for features as they are.

        Raises:
            UserError: if these statistics do not determine it.
        """
        if isinstance(self.make(), CosineHead):
            head = CosineHead(self.num_features, self.num_classes).double()
            head.assign({"weight": solve_prototypes(stats, stats.scale()), "sharpness": head.sharpness})
            head.absorb_standardisation(stats.mean(), stats.scale())
            return head
        solved = solve_head(stats, self.init)
        project = projection_for(self.num_features, self.config.seed)
        return solved if project is None else project.widen(solved)

    def start(self, stats: FeatureStatistics | None) -> Arrays:
        """Return the parameters to start from, in the coordinates of training."""
        head = self.make()
        if self.init == "random":
            head.randomise(torch.Generator().manual_seed(self.config.seed))
        elif stats is not None:
            head = self.solve(stats)
            if self.standardisation is not None:
                mean, scale = self.standardisation
                head.absorb_standardisation(-mean / scale, 1 / scale)
        return {name: value.float().numpy() for name, value in head.trainable().items()}

    def cooled(self, parameters: Arrays, temperature: float) -> Arrays:
        """Return the parameters of the head whose logits are those of `parameters` divided by `temperature`."""
        head = self.make()
        head.assign({name: torch.from_numpy(value) for name, value in parameters.items()})
        head.absorb_temperature(temperature)
        return {name: value.numpy() for name, value in head.trainable().items()}

    def leave(self, parameters: Arrays) -> Head:
        """Return the head for features as they are, of parameters in the coordinates of training."""
        head = self.make().double()
        head.assign({name: torch.from_numpy(np.array(value)) for name, value in parameters.items()})
        if self.standardisation is not None:
            head.absorb_standardisation(*self.standardisation)
        return head.float()
