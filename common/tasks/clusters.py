"""Clusters: a run groups rows without labels, and the model predicts their groups until people name them."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedhead.data import Samples
from fedhead.errors import UserError
from fedhead.tasks.classification import Classification
from fedhead.tasks.task import Targets, tasks
from fedhead.wording import counted

EVERY_ROW = "all rows"
"""The only class before the clusters are found."""


def cluster_names(clusters: int) -> tuple[str, ...]:
    """Return the names of clusters before people name them."""
    return tuple(f"cluster {number}" for number in range(clusters))


@tasks.register("clusters")
class Clusters(Classification):
    """Clustering: all rows have the one class `EVERY_ROW`, whatever their labels, until the run has found clusters."""

    name = "clusters"
    misfit = "This run has found its clusters already, and the site's rows have no labels in it."
    output_names = ("cluster", "clusters")
    compares_classes = False
    solvers: ClassVar[tuple[str, ...]] = ("lda", "lda-gcv")

    def check_columns(self) -> None:
        if not self.columns:
            raise UserError("A clustering needs the name of its rows or of its clusters.")

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return (EVERY_ROW,)

    @classmethod
    def require(cls, samples: Samples) -> None:
        """Accept any data: labels are not read."""

    def encode(self, samples: Samples) -> Targets:
        if len(self.columns) > 1:
            raise UserError(
                "The clusters of this model have no names that labels could be compared with: name them first, as in "
                "fedhead cluster name RUN 0=rose 1=tulip --out FOLDER."
            )
        return np.zeros(len(samples), np.int64)

    def unknown(self, samples: Samples) -> list[str]:
        return []

    @property
    def description(self) -> str:
        return f"a model that assigns rows to one of {counted(len(self.columns), 'cluster')}"

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"of {name}" for name in self.columns)


def is_unnamed(clusters: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether one of the classes of a model is a cluster of its run that nobody has named."""
    return bool(set(clusters) & set(classes))
