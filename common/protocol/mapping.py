"""The map of features that a coordinator asks for: settings and pooled moments, from which each site makes it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fedhead.config import MOST_LIFTED
from fedhead.errors import UserError
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.messages import MessageError, Payload, check_arrays
from fedhead.sums.sums import Arrays

if TYPE_CHECKING:
    from fedhead.heads import FeatureMap


class _MapValues(BaseModel):
    """Values of a `MapRequest`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    basis: Literal["none", "unit", "root"]
    lift: str = "none"


@dataclass(frozen=True, eq=False)
class MapRequest:
    """A map of features for all sums and heads from now on.

    Attributes:
        basis: of the rows; `none` for plain features, without a lift.
        lift: as in the settings.
        arrays: `mean` `[d]` and `covariance` `[d (d + 1) / 2]`, the upper triangle row by row, float64, of the rows in
            the basis, if the lift has landmarks.
    """

    basis: Literal["none", "unit", "root"]
    lift: str = "none"
    arrays: Arrays = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"basis": self.basis, "lift": self.lift}

    @property
    def digest(self) -> str:
        """Return the SHA-256 of values and arrays."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        for name in sorted(self.arrays):
            digest.update(np.ascontiguousarray(self.arrays[name], "<f8").tobytes())
        return digest.hexdigest()

    def payload(self) -> Payload:
        """Return the values and arrays for the wire."""
        return Payload(self.values, self.arrays)

    @classmethod
    def from_payload(cls, payload: Payload, num_features: int) -> Self:
        """Read and validate a received request.

        Args:
            payload: the message.
            num_features: of the backbone.

        Raises:
            MessageError: if it is no map of this many features.
        """
        return cls.from_values(payload.values, payload.arrays, num_features)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], arrays: Arrays, num_features: int) -> Self:
        """Read and validate values and arrays; see `from_payload`."""
        from fedhead.heads.feature_map import parse_lift

        try:
            read = _MapValues(**values)
            name, _ = parse_lift(read.lift)
        except ValidationError as error:
            raise MessageError(f"it is no map of features ({wrong_fields(error)})") from None
        except UserError:
            raise MessageError("it is no map of features (lift)") from None
        expected = {}
        if name and (read.basis == "none" or num_features > MOST_LIFTED):
            raise MessageError(f"only {MOST_LIFTED} features or fewer, as rows of unit length, can be lifted")
        if name == "landmarks":
            triangle = num_features * (num_features + 1) // 2
            expected = {"mean": np.zeros(num_features), "covariance": np.zeros(triangle)}
        check_arrays(arrays, expected)
        return cls(read.basis, read.lift, arrays)

    def build(self, num_features: int, seed: int) -> "FeatureMap | None":
        """Return the map; None for plain features.

        Raises:
            MessageError: if no rows of unit length have these moments.
        """
        content = tuple(self.arrays[name].tobytes() for name in sorted(self.arrays))
        return _built(self.basis, self.lift, content, num_features, seed)


@lru_cache(maxsize=4)
def _built(
    basis: Literal["none", "unit", "root"], lift: str, content: tuple[bytes, ...], num_features: int, seed: int
) -> "FeatureMap | None":
    import torch

    from fedhead.heads.feature_map import FeatureMap, MapForm, parse_lift

    name, width = parse_lift(lift)
    if basis == "none":
        return None
    if name == "relu":
        return FeatureMap.relu(basis, num_features, width, seed)
    if not name:
        return FeatureMap(MapForm(basis), num_features)
    upper, mean = (torch.from_numpy(np.frombuffer(part, "<f8").copy()) for part in content)
    covariance = torch.zeros(num_features, num_features, dtype=torch.float64)
    rows, columns = torch.triu_indices(num_features, num_features)
    covariance[rows, columns] = upper
    covariance[columns, rows] = upper
    try:
        return FeatureMap.landmarks(basis, mean, covariance, width, seed)
    except ValueError as error:
        raise MessageError(f"it is no map of features ({error})") from None


def moments_of(mean: Any, covariance: Any) -> Arrays:
    """Return the arrays of a `MapRequest` from a mean `[d]` and a covariance `[d, d]`, tensors in float64."""
    rows, columns = np.triu_indices(len(mean))
    return {"mean": mean.numpy(), "covariance": np.ascontiguousarray(covariance.numpy()[rows, columns])}
