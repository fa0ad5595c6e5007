"""Several heads to compare on the same held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhead.protocol.fields import Coefficient, wrong_fields
from fedhead.protocol.messages import MessageError, Payload, check_arrays
from fedhead.sums.heads import FloatArray
from fedhead.sums.sums import Arrays

MOST_RIVALS = 8

Level = Literal["plain", "basis", "map", "tail"]
"""The features of a head: plain ones, in the basis of the run's map, mapped and standardised as the run says, or the
activations of a tuned run's boundary, which a tail and its head take together."""


class _RivalValues(BaseModel):
    """Values that accompany rival heads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=MOST_RIVALS)]
    temperatures: tuple[Coefficient, ...]


@dataclass(frozen=True, eq=False)
class RivalsRequest:
    """Heads to compare on held-out rows.

    Attributes:
        heads: the parameters of each.
        levels: the features of each.
        temperatures: `[H]`, above 0, by which logits are divided before their losses are multiplied.
    """

    heads: Sequence[Arrays]
    levels: Sequence[Level]
    temperatures: FloatArray

    def payload(self) -> Payload:
        """Return the values and arrays for the wire."""
        arrays = {f"{at}.{name}": array for at, head in enumerate(self.heads) for name, array in head.items()}
        return Payload({"levels": list(self.levels), "temperatures": self.temperatures.tolist()}, arrays)

    @classmethod
    def from_payload(cls, payload: Payload, expected: Mapping[Level, Arrays]) -> Self:
        """Read and validate a received request.

        Args:
            payload: the message.
            expected: the form of a head at each level.

        Raises:
            MessageError: if a head has another form, or a temperature is not positive.
        """
        try:
            values = _RivalValues(**payload.values)
        except ValidationError as error:
            raise MessageError(f"its values are invalid ({wrong_fields(error)})") from None
        if len(values.temperatures) != len(values.levels) or not all(values.temperatures):
            raise MessageError("it does not have a positive temperature for each head")
        if unknown := [level for level in values.levels if level not in expected]:
            raise MessageError(f"it has a head of the level {unknown[0]!r}, which this run does not have")
        wanted: dict[str, Any] = {
            f"{at}.{name}": array for at, level in enumerate(values.levels) for name, array in expected[level].items()
        }
        check_arrays(payload.arrays, wanted)
        heads = [
            {name: payload.arrays[f"{at}.{name}"] for name in expected[level]} for at, level in enumerate(values.levels)
        ]
        return cls(heads, values.levels, np.array(values.temperatures))
