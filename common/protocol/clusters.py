"""Requests about clusters: sums by cluster, likelihoods of mixtures, or statistics with clusters as classes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhead.protocol.fields import Digest, wrong_fields
from fedhead.protocol.messages import MessageError, Payload, check_arrays
from fedhead.sums.sums import Arrays

if TYPE_CHECKING:
    from fedhead.solvers.clusters import Clusterings, Directions, Mixtures

MOST_CENTRES = 4096
"""Largest number of centres in a request, over all clusterings."""

MOST_CLUSTERS = 200
"""Largest number of clusters of one clustering, in a configuration and in a request."""

MOST_AXES = 256

Stage = Literal["sums", "likelihood", "statistics"]
Rows = Literal["train", "held_out"]

_LARGEST = 1e12


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Stage
    rows: Rows
    sizes: Annotated[
        tuple[Annotated[int, Field(ge=2, le=MOST_CLUSTERS, strict=True)], ...], Field(min_length=1, max_length=1024)
    ]
    map: Digest | Literal[""] = ""


@dataclass(frozen=True, eq=False)
class ClusterRequest:
    """A request about clusters.

    Attributes:
        stage: `sums` for rows and sums by cluster; `likelihood` for the log-likelihood of mixtures; `statistics` for
            feature statistics with the clusters of the only clustering as classes.
        rows: the rows to sum: training rows, or held-out ones.
        directions: the map of features to directions.
        clusterings: the centres.
        mixtures: for the stage `likelihood`; None otherwise.
        map: the digest of the map of features that the coordinator takes the site to have; empty for plain features.
    """

    stage: Stage
    rows: Rows
    directions: "Directions"
    clusterings: "Clusterings"
    mixtures: "Mixtures | None" = None
    map: str = ""

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        values = {"stage": self.stage, "rows": self.rows, "sizes": list(self.clusterings.sizes), "map": self.map}
        arrays: dict[str, npt.NDArray[Any]] = {
            "mean": self.directions.mean.numpy(),
            "axes": self.directions.axes.numpy(),
            "centres": self.clusterings.centres,
        }
        if self.mixtures is not None:
            arrays |= {"log_shares": self.mixtures.log_shares, "concentrations": self.mixtures.concentrations}
        return Payload(values, arrays).to_content()

    @classmethod
    def from_payload(cls, payload: Payload, num_features: int) -> Self:
        """Read and validate a received request.

        Args:
            payload: the message.
            num_features: of the sums.

        Raises:
            MessageError: if it is invalid.
        """
        import torch

        from fedhead.solvers.clusters import Clusterings, Directions, Mixtures

        try:
            values = _Values(**payload.values)
        except ValidationError as error:
            raise MessageError(f"its values are invalid ({wrong_fields(error)})") from None
        centres = sum(values.sizes)
        if centres > MOST_CENTRES:
            raise MessageError(f"it has {centres} centres, and sites take {MOST_CENTRES} or fewer")
        if values.stage == "likelihood" and values.rows != "held_out":
            raise MessageError("likelihoods are summed over held-out rows")
        if values.stage == "sums" and values.rows != "train":
            raise MessageError("clusters are summed over training rows")
        if values.stage == "statistics" and len(values.sizes) > 1:
            raise MessageError("statistics are of one clustering")
        axes = payload.arrays.get("axes", np.empty(0))
        width = axes.shape[1] if axes.ndim == 2 and 2 <= axes.shape[1] <= MOST_AXES else 2
        expected: Arrays = {
            "mean": np.zeros(num_features),
            "axes": np.zeros((num_features, width)),
            "centres": np.zeros((centres, width)),
        }
        if values.stage == "likelihood":
            expected = {**expected, "log_shares": np.zeros(centres), "concentrations": np.zeros(len(values.sizes))}
        check_arrays(payload.arrays, expected)
        given = {name: np.array(array) for name, array in payload.arrays.items()}
        if any((np.abs(array) > _LARGEST).any() for array in given.values()):
            raise MessageError(f"it contains a value beyond {_LARGEST:g}")
        clusterings = Clusterings(values.sizes, given["centres"])
        mixtures = None
        if values.stage == "likelihood":
            if (given["concentrations"] <= 0).any() or (given["concentrations"] > 1e8).any():
                raise MessageError("its concentrations must be above 0 and at most 1e8")
            mixtures = Mixtures(clusterings, given["log_shares"], given["concentrations"])
        directions = Directions(torch.from_numpy(given["mean"]), torch.from_numpy(given["axes"]))
        return cls(values.stage, values.rows, directions, clusterings, mixtures, values.map)
