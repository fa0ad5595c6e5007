"""Sums for the test of foreign inputs: over training rows of unit length, and held-out rows by distance."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedhead.client.labelled_features import LabelledFeatures
from fedhead.errors import FedheadError
from fedhead.evaluation.foreign import MOST_FEATURES, Distances
from fedhead.heads.feature_map import Basis, unit_rows
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.messages import MessageError, Payload
from fedhead.protocol.steps import Part
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.foreign import DistanceSums

BLOCK_ROWS = 2048


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["unit", "root"]


@dataclass(frozen=True, eq=False)
class DistancesRequest:
    """A request for sums over training rows, or with distances, for counts of held-out rows.

    Attributes:
        form: of the rows.
        distances: how far rows are; None for sums.
    """

    form: Basis
    distances: Distances | None

    @property
    def part(self) -> Part:
        """The rows that the reply rests on."""
        return "train" if self.distances is None else "held_out"

    @classmethod
    def from_payload(cls, payload: Payload, width: int, classes: int) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if the payload is invalid.
        """
        if width > MOST_FEATURES:
            raise MessageError(f"distances are of {MOST_FEATURES} features or less, and the backbone has {width}")
        try:
            form = _Values(**payload.values).form
        except ValidationError as error:
            raise MessageError(f"its values are invalid ({wrong_fields(error)})") from None
        if not payload.arrays:
            return cls(form, None)
        try:
            return cls(form, Distances.from_arrays(payload.arrays, width, classes, form))
        except ValueError as error:
            raise MessageError(str(error)) from None


def add_unit_rows(stats: FeatureStatistics, data: LabelledFeatures, rows: Tensor, form: Basis) -> None:
    """Add rows of unit length to statistics, block by block in float64.

    Args:
        stats: changed in place.
        data: features and targets.
        rows: `[n]`, among these.
        form: of the rows.
    """
    for block in torch.split(rows, BLOCK_ROWS):
        stats.update(unit_rows(data.features[block].cpu().double(), form), data.labels[block].cpu())


def count_distances(distances: Distances, data: LabelledFeatures, rows: Tensor) -> DistanceSums:
    """Count rows `[n]` by distance.

    Raises:
        FedheadError: if the distances overflow.
    """
    sums = DistanceSums()
    for block in torch.split(rows, BLOCK_ROWS):
        found = distances(data.features[block].cpu().double())
        if bool(found.isnan().any()):
            raise FedheadError("The distances of rows from those of all sites are not finite.")
        sums += DistanceSums.from_distances(found)
    return sums
