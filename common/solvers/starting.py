"""Closed-form solutions from pooled statistics, for initialising heads."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedhead.solvers.closed_form import ConstantTargetError, solve_head, solve_prototypes
from fedhead.solvers.filling import Filling
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import RandomProjection


@dataclass(frozen=True, eq=False)
class PooledSolutions:
    """Solutions of one set of statistics; see `fedhead.heads.Solutions`.

    Attributes:
        stats: the pooled statistics of all sites.
        projection: the projection from the features to those of the statistics, if any.
        columns: the names of the classes or targets, for errors.
        flags: the positions of each feature that may be missing and of its flag; see `fedhead.solvers.filling`.
    """

    stats: FeatureStatistics
    projection: RandomProjection | None = None
    columns: Sequence[str] = ()
    flags: Sequence[tuple[int, int]] = ()

    def affine(self, solver: str) -> tuple[Tensor, Tensor]:
        """Return the weight `[C, d]` and bias `[C]` of `solver`, float64, for the original features.

        Raises:
            UserError: if the statistics do not determine them.
        """
        filling = Filling.of(self.stats, self.flags) if self.flags and self.stats.rows else None
        stats = self.stats if filling is None else filling.filled(self.stats)
        try:
            solved = solve_head(stats, solver)
        except ConstantTargetError as error:
            name = self.columns[error.column] if self.columns else ""
            raise ConstantTargetError(error.column, error.rows, name) from None
        head = solved if self.projection is None else self.projection.widen(solved)
        weight, bias = head.affine()
        return (weight if filling is None else filling.unfilled(weight)), bias

    def prototypes(self) -> Tensor:
        """Return unit vectors `[C, d]`, the class means of standardised features.

        Raises:
            UserError: if no class has rows both inside and outside it.
        """
        return solve_prototypes(self.stats, self.stats.scale())

    def standardisation(self) -> tuple[Tensor, Tensor]:
        """Return the features' mean and scale, each `[d]`, float64."""
        return self.stats.mean(), self.stats.scale()
