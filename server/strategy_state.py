"""The state of a strategy between rounds as plain values and arrays, so that it can be resumed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedhead.errors import UserError

AnyArray = npt.NDArray[Any]


class _NotStateError(TypeError):
    """A value is not a number, text, array or collection of these."""


def state_of(strategy: Strategy) -> tuple[dict[str, Any], dict[str, AnyArray]]:
    """Return the attributes of a strategy that are numbers, texts, arrays or collections of these.

    They are the whole state of Flower's strategies: moments, momentum, and the head that they sent. Functions that a
    strategy was built with are not included.

    Returns:
        The attributes as JSON values, and the arrays that they refer to.
    """
    values: dict[str, Any] = {}
    arrays: dict[str, AnyArray] = {}
    for name, value in vars(strategy).items():
        found: dict[str, AnyArray] = {}
        try:
            values[name] = _pack(value, found, name)
        except _NotStateError:
            continue
        arrays |= found
    return values, arrays


def restore(strategy: Strategy, values: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> None:
    """Set the state of a new strategy to the result of `state_of`.

    Raises:
        UserError: if the state is of another strategy.
    """
    unknown = sorted(values.keys() - vars(strategy).keys())
    if unknown:
        raise UserError(
            f"{type(strategy).__name__} has no {unknown[0]!r}, which the run's strategy had when it was saved; resume "
            "with the strategy, and the version of it, that the run was started with."
        )
    for name, value in values.items():
        setattr(strategy, name, _unpack(value, arrays))


def _pack(value: Any, arrays: dict[str, AnyArray], path: str) -> Any:
    # A NumPy float64 is a Python float too, but promotes float32 arrays in sums.
    if isinstance(value, np.generic | np.ndarray):
        arrays[path] = np.array(value)
        return {"scalar" if isinstance(value, np.generic) else "array": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ArrayRecord):
        return {"record": [[key, _pack(array.numpy(), arrays, f"{path}.{key}")] for key, array in value.items()]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, {}, ""), _pack(one, arrays, f"{path}.{key}")] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(one, arrays, f"{path}.{number}") for number, one in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise _NotStateError(type(value).__name__)


def _unpack(value: Any, arrays: Mapping[str, AnyArray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("array", "scalar"):
        array = np.array(arrays[content])
        return array[()] if kind == "scalar" else array
    if kind == "record":
        return ArrayRecord({key: Array(_unpack(one, arrays)) for key, one in content})
    if kind == "dict":
        return {key: _unpack(one, arrays) for key, one in content}
    items = [_unpack(one, arrays) for one in content]
    return tuple(items) if kind == "tuple" else items
