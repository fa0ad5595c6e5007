"""Layout of a secure sum: the names, shapes and kinds of its arrays, which become one vector of ring elements.

The layout is part of the context that all sites agree on, so that equal positions mean the same thing at every site.
The last element is 0 at a site whose values can be summed. A site whose values cannot sends random elements: whoever
sees the total learns that a site's values could not be summed, and neither whose nor why::

    layout = Layout.of(sums.to_arrays(), limbs=2)
    vector = layout.pack(sums.to_arrays(), terms=len(sites))     # uint64 [limbs, layout.size]
    arrays = layout.unpack(total)                                # int64 and float64 arrays by name
"""

import math
import secrets
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedhead.protocol.fields import Text
from fedhead.secure import SecureSumError, UnsummableError
from fedhead.secure.fixed_point import Elements, decode, decode_integers, encode, encode_integers
from fedhead.sums.sums import Arrays

MOST_ELEMENTS = 2**28
"""Limit on the length of a vector: 4 GiB of two limbs each."""

MOST_ARRAYS = 1024

Kind = Literal["integer", "real"]
Limbs = Annotated[int, Field(ge=1, le=2, strict=True)]
_Side = Annotated[int, Field(ge=0, le=MOST_ELEMENTS, strict=True)]


class Entry(BaseModel):
    """One array of a secure sum.

    Attributes:
        name: its name.
        shape: its shape.
        kind: `integer` arrays are summed exactly, `real` ones in fixed point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    shape: Annotated[tuple[_Side, ...], Field(max_length=8)]
    kind: Kind

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Layout(BaseModel):
    """The arrays of a secure sum.

    Attributes:
        limbs: 2 for statistics (128 bits, 64 of them fraction bits); 1 for heads, metrics and counts (64 bits, 32 of
            them fraction bits in `real` arrays).
        entries: the arrays in the order of their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limbs: Limbs
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MOST_ARRAYS)]

    @model_validator(mode="after")
    def _is_canonical(self) -> Self:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)):
            raise ValueError("names are repeated, or not sorted")
        if self.size > MOST_ELEMENTS:
            raise ValueError(f"it has {self.size} elements; at most {MOST_ELEMENTS} can be summed")
        return self

    @classmethod
    def of(cls, arrays: Arrays, limbs: int) -> Self:
        """Return the layout of arrays: integer and boolean ones are summed as integers, floating ones as real numbers.

        Raises:
            ValueError: if an array is of another type, or there are too many elements.
        """
        entries = []
        for name, array in sorted(arrays.items()):
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name!r} is {array.dtype}, which cannot be summed securely")
            kind: Kind = "real" if array.dtype.kind == "f" else "integer"
            entries.append(Entry(name=name, shape=array.shape, kind=kind))
        return cls(limbs=limbs, entries=tuple(entries))

    @property
    def size(self) -> int:
        """The number of ring elements: the arrays' and the last one."""
        return sum(entry.size for entry in self.entries) + 1

    def unsummable(self) -> Elements:
        """Return random elements `[limbs, size]`, in place of values that cannot be summed."""
        drawn = np.frombuffer(secrets.token_bytes(8 * self.limbs * self.size), np.uint64)
        return drawn.reshape(self.limbs, self.size).copy()

    def pack(self, arrays: Arrays, terms: int) -> Elements:
        """Encode one site's arrays as a vector `[limbs, size]`.

        Args:
            arrays: by name; integers of any width, real numbers of any width.
            terms: the number of sites of the sum, which bounds each value.

        Raises:
            SecureSumError: if names, shapes or kinds differ from the layout.
            UnsummableError: if a value is not finite or too large.
        """
        if arrays.keys() != {entry.name for entry in self.entries}:
            raise SecureSumError(f"The arrays to sum are {sorted(arrays)}, which the session's layout does not have.")
        vector = np.zeros((self.limbs, self.size), np.uint64)
        at = 0
        for entry in self.entries:
            array = arrays[entry.name]
            if array.shape != entry.shape or (array.dtype.kind == "f") != (entry.kind == "real"):
                raise SecureSumError(
                    f"The array {entry.name!r} is {array.dtype}{list(array.shape)}; the session's layout has "
                    f"{entry.kind}{list(entry.shape)}."
                )
            encoded = encode if entry.kind == "real" else encode_integers
            vector[:, at : at + entry.size] = encoded(array.reshape(-1), self.limbs, terms)
            at += entry.size
        return vector

    def unpack(self, vector: Elements) -> dict[str, npt.NDArray[Any]]:
        """Decode a sum of vectors to int64 and float64 arrays by name.

        Raises:
            SecureSumError: if the vector has another form, or a count is no integer.
            UnsummableError: if a site's values could not be summed.
        """
        self.check(vector)
        if vector[:, -1].any():
            raise UnsummableError(
                "The values of a site cannot be summed: they are too large or not finite, or a rule of the site "
                "withholds them. Its own log says why."
            )
        arrays: dict[str, npt.NDArray[Any]] = {}
        at = 0
        for entry in self.entries:
            part = vector[:, at : at + entry.size]
            arrays[entry.name] = (decode(part) if entry.kind == "real" else decode_integers(part)).reshape(entry.shape)
            at += entry.size
        return arrays

    def check(self, vector: npt.NDArray[Any]) -> None:
        """Check that a received vector is uint64 `[limbs, size]`.

        Raises:
            SecureSumError: if it is not.
        """
        if vector.dtype != np.uint64 or vector.shape != (self.limbs, self.size):
            raise SecureSumError(
                f"A vector to sum is {vector.dtype}{list(vector.shape)} instead of uint64{[self.limbs, self.size]}."
            )
