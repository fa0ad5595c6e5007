"""Access to rows by position, for values of any library."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fedhead.errors import UserError


def column_names(values: Any) -> tuple[str, ...] | None:
    """Return the names of a frame's columns; None for anything else."""
    library = type(values).__module__.partition(".")[0]
    if library not in ("pandas", "polars", "pyarrow") or type(values).__name__ not in ("DataFrame", "Table"):
        return None
    return tuple(map(str, values.column_names if library == "pyarrow" else values.columns))


def as_plain(value: Any) -> Any:
    """Return a tensor in a form that NumPy reads: on this machine, dense, of a NumPy type; other values unchanged."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    if str(value.layout) != "torch.strided":
        value = value.to_dense()
    return (
        value.float() if str(value.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2") else value
    )


def by_position(values: Any, what: str) -> Any:
    """Return values with a length and access to position `i` by `[i]`.

    Series of pandas are indexed by their labels, which differ from positions after a shuffle or a filter; sets have no
    order; tensors may be on another device.

    Args:
        values: a list, a tuple, an array, a tensor, a Series or a frame (as `[n, columns]`) of pandas or polars, a
            column of Arrow, or any object with a length and `[i]`.
        what: the subject of messages, as in "The labels of data".

    Raises:
        UserError: for a single text, a dictionary, a set, or an object without rows.
    """
    if isinstance(values, str | bytes):
        raise UserError(f"{what} are a single text; expected a list with one entry for each row.")
    if isinstance(values, dict):
        raise UserError(f"{what} are a dictionary; expected a list with one entry for each row.")
    if isinstance(values, set | frozenset):
        raise UserError(f"{what} are a set, which has no order; expected a list with one entry for each row.")
    library = type(values).__module__.partition(".")[0]
    if library in ("pandas", "polars", "modin", "cudf"):
        # Series hold images and lists as objects, which an array must not unpack.
        return values.to_numpy() if getattr(values, "ndim", len(values.shape)) == 2 else list(values)
    if library == "pyarrow":
        return values.to_pandas().to_numpy() if hasattr(values, "column_names") else values.to_pylist()
    if library == "torch":
        return as_plain(values)
    if isinstance(values, list | tuple | np.ndarray):
        return values
    if hasattr(values, "__len__") and hasattr(values, "__getitem__"):
        return values
    if isinstance(values, Iterable):
        return list(values)
    raise UserError(f"{what} are of type {type(values).__name__}; expected a list with one entry for each row.")
