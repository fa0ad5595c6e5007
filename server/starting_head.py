"""The first head of a run, and the coordinates of its training."""

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones.identity import flags_of
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.heads import FeatureMap, Head, LinearHead, behind, make_head
from fedhead.solvers.starting import PooledSolutions
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

UNSOLVED = ("zeros", "random")
"""Initialisations that need no statistics."""


def resolve_init(config: RunConfig, head: Head, task: Task) -> str:
    """Return the run's `init`, or the default of its head and task.

    Raises:
        UserError: if the head does not fit the task or the `init`.
    """
    inits = task.inits(type(head))
    if not inits:
        raise UserError(f"A head {config.head!r} does not fit the task {task.name!r}; take 'linear' or 'mlp:256'.")
    compared = task.pairs_losses or task.solvers == ("ridge",)
    if config.lift == "auto" and not (isinstance(head, LinearHead) and compared):
        raise UserError(
            f"A lift is chosen for linear classifiers and ridge regression only, not for a head {config.head!r} in the "
            f"task {task.name!r}; name one, as in 'landmarks:1024'."
        )
    init = config.init or _default_init(config, inits)
    if init not in inits:
        where = "" if inits == head.inits else f" in the task {task.name!r}"
        raise UserError(f"A head {config.head!r} cannot start from {init!r}{where}, only from: {', '.join(inits)}.")
    return init


def _default_init(config: RunConfig, inits: tuple[str, ...]) -> str:
    """Return the default initial head: on mapped features, shrinkage is chosen by cross-validation."""
    if config.lift.startswith("relu") and "ridge" in inits:
        return "ridge"
    mapped = config.basis != "none" or config.lift.startswith("landmarks")
    return "lda-gcv" if mapped and "lda-gcv" in inits else inits[0]


class HeadForm:
    """The form of a run's heads: for raw features outside training, for standardised features inside.

    Gradient steps on standardised features converge evenly; `(x - mean) / scale` is folded into the head after
    training.

    Args:
        config: names the head and its init.
        num_features: `d`.
        task: of the run.
        mapping: of the features, before standardisation.

    Attributes:
        longest: the limit of tokens of a row, of a language model.
    """

    def __init__(self, config: RunConfig, num_features: int, task: Task, mapping: FeatureMap | None = None) -> None:
        self.config = config
        self.plain = num_features
        self.task = task
        self.mapping = mapping
        self.init = resolve_init(config, self.make(), task)
        self.standardisation: tuple[Tensor, Tensor] | None = None
        self.target_standardisation: tuple[Tensor, Tensor] | None = None
        self.shares: Tensor | None = None
        self.longest: int | None = None

    @property
    def num_features(self) -> int:
        """The number of mapped features."""
        return self.plain if self.mapping is None else self.mapping.width

    def make(self) -> Head:
        """Return a new head."""
        return make_head(self.config.head, self.num_features, len(self.task.columns))

    @property
    def standardises(self) -> bool:
        """Whether sites standardise features: for rounds, or because the head or the task needs it."""
        return self.config.rounds > 0 or self.make().standardises or self.task.standardises_targets

    def standardise(self, sums: FeatureStatistics | FeatureMoments) -> None:
        """Set mean and scale from pooled sums, also of the targets if the task standardises them.

        Sites compute in float32, so the values are rounded to float32 before they are folded back in float64.
        """
        features = sums if isinstance(sums, FeatureStatistics) else sums.columns(0, self.num_features)
        self.standardisation = _as_float32(features.mean(), features.scale())
        if not self.task.standardises_targets:
            return
        if isinstance(sums, FeatureStatistics):
            self.target_standardisation = _as_float32(sums.target_mean(), sums.target_scale())
        else:
            targets = sums.columns(self.num_features)
            self.target_standardisation = _as_float32(targets.mean(), targets.scale(hardly=0))

    def share(self, stats: FeatureStatistics | None) -> None:
        """Keep the pool's shares of classes for rounds; a head alone needs none."""

    def solve(self, stats: FeatureStatistics) -> Head:
        """Solve the float64 head named by `init`, for mapped features.

        Raises:
            UserError: if these statistics do not determine it.
        """
        head = self.make().double()
        project = projection_for(self.num_features, self.config.seed)
        # Maps and projections mix numbers with flags.
        flags = flags_of(self.config.backbone) if self.mapping is None and project is None else ()
        head.initial(self.init, self._generator(), PooledSolutions(stats, project, self.task.columns, flags))
        return head

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed)

    def start(self, stats: FeatureStatistics | None) -> Arrays:
        """Return the initial parameters, in the coordinates of training."""
        head = self.make()
        if self.init in UNSOLVED:
            head.initial(self.init, self._generator())
        elif stats is not None:
            head = self.solve(stats)
            if self.standardisation is not None:
                mean, scale = self.standardisation
                head.fold(-mean / scale, 1 / scale)
            if self.target_standardisation is not None:
                mean, scale = self.target_standardisation
                head.rescale(-mean / scale, 1 / scale)
        return {name: value.float().numpy() for name, value in head.trainable().items()}

    def temperature_scaled(self, parameters: Arrays, temperature: float) -> Arrays:
        """Return the parameters of the head whose logits are those of `parameters` divided by `temperature`."""
        head = self.make()
        head.assign({name: torch.from_numpy(value) for name, value in parameters.items()})
        head.absorb_temperature(temperature)
        return {name: value.numpy() for name, value in head.trainable().items()}

    def deliver(self, stats: FeatureStatistics) -> Head:
        """Solve the float64 head named by `init`, for raw features.

        Raises:
            UserError: if these statistics do not determine it.
        """
        return behind(self.mapping, self.solve(stats))

    def enter(self, head: Arrays) -> Arrays:
        """Return the parameters that rounds start from, given the first head."""
        return head

    def trained_in(self, number: int, parameters: Arrays) -> Arrays:
        """Return the parameters that train in a round."""
        return parameters

    def evaluated(self, parameters: Arrays) -> Arrays:
        """Return the parameters that sites evaluate a version by."""
        return parameters

    def begins(self, number: int) -> bool:
        """Return whether other parameters train from a round on."""
        return False

    def as_solved(self, number: int, parameters: Arrays) -> Arrays:
        """Return the parameters of a version as they are measured: of round 0, those of the head alone."""
        return parameters

    def leave(self, parameters: Arrays) -> Head:
        """Return the head for raw features from parameters in the coordinates of training."""
        head = self.make().double()
        head.assign({name: torch.from_numpy(np.array(value)) for name, value in parameters.items()})
        if self.standardisation is not None:
            head.fold(*self.standardisation)
        if self.target_standardisation is not None:
            head.rescale(*self.target_standardisation)
        return behind(self.mapping, head.float())


def _as_float32(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round to float32, and return float64 tensors."""
    return mean.float().double(), scale.float().double()
