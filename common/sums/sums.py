"""Protocol of all results that leave a site: sums over its rows, which add across sites."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

Arrays = Mapping[str, npt.NDArray[Any]]
S = TypeVar("S", bound="DataclassInstance")


class Sums(Protocol):
    """Sums over `rows` rows."""

    @property
    def rows(self) -> int:
        """The number of rows."""

    def __add__(self, other: Self) -> Self:
        """Return the sums over both sets of rows.

        Raises:
            ValueError: if their sizes or kinds differ.
        """

    def to_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""

    @classmethod
    def from_arrays(cls, arrays: Arrays, like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Args:
            arrays: the received arrays.
            like: sums of the expected size and kind, over any rows.

        Raises:
            ValueError: if a name, type or shape differs, or no rows can have these sums.
        """


def added(first: S, second: S) -> S:
    """Return sums, a dataclass, whose fields are those of both, added."""
    return type(first)(*(getattr(first, one.name) + getattr(second, one.name) for one in fields(first)))


def check_form(arrays: Arrays, expected: Arrays, largest: float = math.inf) -> None:
    """Validate the names, number types, shapes and values of received arrays.

    Args:
        arrays: the received arrays.
        expected: arrays with the expected names, types and shapes.
        largest: the largest allowed magnitude of a real value.

    Raises:
        ValueError: if anything differs, or a value is not finite or too large.
    """
    if arrays.keys() != expected.keys():
        raise ValueError(f"it contains the arrays {sorted(arrays)} instead of {sorted(expected)}")
    for name, like in expected.items():
        array = arrays[name]
        if array.dtype != like.dtype or array.shape != like.shape:
            raise ValueError(f"{name!r} is {array.dtype}{list(array.shape)} instead of {like.dtype}{list(like.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} contains values that are not finite")
        if array.dtype.kind == "f" and (np.abs(array) > largest).any():
            raise ValueError(f"{name!r} contains a value beyond {largest:g}")


def as_float64(values: "npt.NDArray[np.float64] | Tensor") -> npt.NDArray[np.float64]:
    """Return values as a float64 array, without a copy if they already are one."""
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().double().numpy()
    return array.astype(np.float64, copy=False)
