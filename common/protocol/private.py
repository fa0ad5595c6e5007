"""Messages of private runs: the terms in the manifest, and requests for noisy sums."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhead.config import MOST_EPSILON, PrivacyConfig
from fedhead.privacy.accountant import MOST_MU, mu_for
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.stages import LARGEST_WEIGHT, Stage, mechanism
from fedhead.protocol.fields import RoundNumber, wrong_fields
from fedhead.sums.sums import Arrays, check_form

if TYPE_CHECKING:
    from fedhead.protocol.messages import Payload

MOST_PARTIES = 1_000_000

Mu = Annotated[float, Field(gt=0, le=MOST_MU, allow_inf_nan=False, strict=True)]


class PrivacyTerms(BaseModel):
    """The differential privacy of a run, in its manifest.

    Attributes:
        epsilon: of each account.
        delta: of each account.
        unit: whether single rows or groups of rows are protected.
        noise: whether the noises of all sites add up to the variance, or each site adds all of it.
        max_colluding: the number of sites whose noise may be known to the coordinator, if it is shared.
        evaluate: the share of the held-out rows' `mu^2` that the evaluation spends.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: Annotated[float, Field(gt=0, le=MOST_EPSILON, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    unit: Literal["row", "group"]
    noise: Literal["shared", "own"]
    evaluate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    max_colluding: Annotated[int, Field(ge=0, le=MOST_PARTIES, strict=True)] = 1

    @property
    def mu(self) -> float:
        """Of the training rows' account."""
        return mu_for(self.epsilon, self.delta)

    def spends(self, account: Literal["train", "held_out"]) -> float:
        """Return the `mu` that the run spends of an account at most."""
        return self.mu * (1.0 if account == "train" else math.sqrt(self.evaluate))


def terms_of(config: PrivacyConfig) -> PrivacyTerms | None:
    """Return the terms of a run's configuration; None if it is not private."""
    if not config.on:
        return None
    return PrivacyTerms(**config.model_dump(include=set(PrivacyTerms.model_fields)))


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Stage
    mu: Mu
    step: RoundNumber = 0
    parties: Annotated[int, Field(ge=1, le=MOST_PARTIES, strict=True)] = 1


@dataclass(frozen=True)
class PrivateRequest:
    """A request for noisy sums.

    Attributes:
        stage: the sums.
        mu: that the release spends.
        arrays: `shift` `[d]`, except for the centre; for a gradient, calibration and evaluation also `weight`
            `[C, d]` and `bias` `[C]`.
        step: distinguishes repeated releases of one stage.
        parties: the number of sites whose noises add up to the variance, where sites share it; a real site checks it.
    """

    stage: Stage
    mu: float
    arrays: Arrays = field(default_factory=dict)
    step: int = 0
    parties: int = 1

    @property
    def account(self) -> Literal["train", "held_out"]:
        """The rows that are charged."""
        return "held_out" if self.stage == "evaluation" else "train"

    def values(self) -> dict[str, Any]:
        """Return the values of the message."""
        return {"stage": self.stage, "mu": self.mu, "step": self.step, "parties": self.parties}

    def mechanism(self, classes: int, features: int) -> Mechanism:
        """Return the noise of the reply.

        Raises:
            ValueError: if `mu` is too small.
        """
        return mechanism(self.stage, self.mu, classes, features)

    def key(self, manifest: str, parties: int) -> str:
        """Return the digest of a run's manifest, as JSON, and this request: equal requests get equal replies.

        Args:
            manifest: of the run.
            parties: the number of sites whose noises add up, as the site found it: one reply has noise for it alone.
        """
        digest = hashlib.sha256(json.dumps([manifest, self.stage, self.mu, self.step, parties]).encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + np.ascontiguousarray(self.arrays[name], "<f4").tobytes())
        return digest.hexdigest()

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        from fedhead.protocol.messages import Payload

        return Payload(self.values(), self.arrays).to_content()

    @classmethod
    def from_payload(cls, payload: "Payload", classes: int, features: int) -> Self:
        """Read and validate a received request.

        Raises:
            MessageError: if it is invalid.
        """
        from fedhead.protocol.messages import MessageError

        try:
            values = _Values(**payload.values)
        except (ValidationError, TypeError) as error:
            wrong = wrong_fields(error) if isinstance(error, ValidationError) else "its keys"
            raise MessageError(f"it is not a request for noisy sums ({wrong})") from None
        shapes: dict[str, tuple[int, ...]] = {}
        if values.stage != "centre":
            shapes["shift"] = (features,)
        if values.stage in ("gradient", "evaluation", "calibration"):
            shapes |= {"weight": (classes, features), "bias": (classes,)}
        try:
            check_form(
                payload.arrays, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, LARGEST_WEIGHT
            )
            request = cls(values.stage, values.mu, payload.arrays, values.step, values.parties)
            request.mechanism(classes, features)
        except ValueError as error:
            raise MessageError(f"{error}") from None
        return request


@dataclass(frozen=True, eq=False)
class NoisyReply:
    """Noisy sums; they add like exact ones. The number of rows is not part of them.

    Attributes:
        arrays: float64, by name.
    """

    arrays: Mapping[str, npt.NDArray[np.float64]]

    @property
    def rows(self) -> int:
        """0: unknown."""
        return 0

    @classmethod
    def zeros(cls, mechanism: Mechanism) -> Self:
        """Return the sums over no rows, without noise."""
        return cls({name: np.zeros(array.shape) for name, array in mechanism.arrays.items()})

    def __add__(self, other: Self) -> Self:
        return type(self)({name: array + other.arrays[name] for name, array in self.arrays.items()})

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return self.arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if a name, type or shape differs, or a value is not finite.
        """
        check_form(arrays, like.arrays, LARGEST_SUM)
        return cls({name: np.array(array) for name, array in arrays.items()})


LARGEST_SUM = 2.0**60
"""Bar on a noisy sum; sums over rows of norm 1 are no larger than the number of rows."""
