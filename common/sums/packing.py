"""Feature statistics as named tensors, for the wire and for files, validated on reading."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.sums.sums import Arrays
from fedhead.sums.targets import CLASSES, LABELS, PLACES, VALUES

if TYPE_CHECKING:
    from fedhead.sums.features import FeatureStatistics

_FORMAT = "fedhead.statistics 1"
_COMMON = {
    "gram": (torch.float64, 1),
    "origin": (torch.float64, 1),
    "rows": (torch.int64, 1),
    "sums": (torch.float64, 2),
    "total": (torch.float64, 1),
}
_OF_CLASSES = {"counts": (torch.int64, 1), "multi_label": (torch.bool, 1)}
_OF_VALUES = {"target_squares": (torch.float64, 1), "target_totals": (torch.float64, 1)}
_OF_PLACES = {**_OF_VALUES, "items": (torch.int64, 1)}
NARROWED = frozenset({"gram", "sums", "total"})
"""The sums that may travel as float32; numbers of rows and the origin, which has to be the same everywhere, do not."""
LARGEST = 1e100
"""More than 2^53 rows of float32 features can sum to; larger sums may overflow when added."""
_MOST_ROWS = 2**53
# Contradictions between sums below this share of the largest sum are attributed to rounding.
_CONSISTENCY = 1e-6


def pack(stats: "FeatureStatistics") -> dict[str, Tensor]:
    """Return statistics as tensors on the CPU; the Gram matrix is packed as its upper triangle, row by row."""
    packed = torch.cat([row[start:] for start, row in enumerate(stats.upper)])
    tensors = {
        "gram": packed,
        "origin": stats.origin,
        "rows": torch.tensor([stats.rows]),
        "sums": stats.sums,
        "total": stats.total,
    }
    if stats.kind.real:
        tensors |= {"target_squares": stats.squares, "target_totals": stats.counts}
        if stats.kind.of_places:
            tensors["items"] = torch.tensor([stats.items])
    else:
        tensors |= {"counts": stats.counts, "multi_label": torch.tensor([not stats.kind.exclusive])}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of statistics from tensors by name.

    Raises:
        ValueError: if a name, number type or shape differs, or a value is not finite.
    """
    real, places = "target_totals" in tensors, "items" in tensors
    _check_names(tensors, {**_COMMON, **(_OF_PLACES if places else _OF_VALUES if real else _OF_CLASSES)})
    totals = tensors["target_totals" if real else "counts"]
    d, columns = len(tensors["origin"]), len(totals)
    if d == 0 or columns == 0:
        raise ValueError("Statistics need at least one feature and one class.")
    shapes: dict[str, tuple[int, ...]] = {
        "gram": (d * (d + 1) // 2,),
        "rows": (1,),
        "sums": (columns, d),
        "total": (d,),
        **({"target_squares": (columns,)} if real else {"multi_label": (1,)}),
        **({"items": (1,)} if places else {}),
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"Statistics of {d} features and {columns} targets need {name!r} as {list(shape)}, "
                f"not {list(tensors[name].shape)}."
            )
    kind = PLACES if places else VALUES if real else LABELS if bool(tensors["multi_label"]) else CLASSES
    packed = tensors["gram"]
    upper = torch.zeros(d, d, dtype=torch.float64, device=packed.device)
    upper.masked_scatter_(_upper_mask(d, packed.device), packed)
    return {
        "origin": tensors["origin"].clone(),
        "rows": int(tensors["rows"]),
        "counts": totals.clone(),
        "sums": tensors["sums"].clone(),
        "total": tensors["total"].clone(),
        "upper": upper,
        "kind": kind,
        "squares": tensors["target_squares"].clone() if real else torch.zeros(0, dtype=torch.float64),
        "items": int(tensors["items"]) if places else 0,
    }


def narrowed(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return packed statistics with their sums of features as float32.

    Raises:
        ValueError: if a sum is too large for float32.
    """
    made = dict(arrays)
    for name in NARROWED & arrays.keys():
        if np.abs(arrays[name]).max(initial=0) > np.finfo(np.float32).max:
            raise ValueError(f"{name!r} has a sum that is too large for float32")
        made[name] = arrays[name].astype(np.float32)
    return made


def widened(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Undo `narrowed`, to the precision of float32.

    Raises:
        ValueError: if sums of features are not float32.
    """
    made = dict(arrays)
    for name in NARROWED & arrays.keys():
        if arrays[name].dtype != np.float32:
            raise ValueError(f"{name!r} is {arrays[name].dtype} instead of float32")
        made[name] = arrays[name].astype(np.float64)
    return made


def check_consistency(stats: "FeatureStatistics") -> None:
    """Validate that some rows can have these sums.

    Raises:
        ValueError: if not.
    """
    counts, diagonal = stats.counts, stats.upper.diagonal()
    if stats.rows < 0 or (not stats.kind.real and bool((counts < 0).any())):
        raise ValueError("Statistics cannot have a negative number of rows.")
    if not 0 <= stats.items <= stats.rows:
        raise ValueError(f"There are {stats.items} items of {stats.rows} places.")
    if stats.rows > _MOST_ROWS:
        raise ValueError(f"No site has {stats.rows} rows.")
    if not stats.kind.real and bool((counts > stats.rows).any()):
        raise ValueError(f"A class has more rows than the total of {stats.rows}.")
    if stats.kind.exclusive and int(counts.sum()) != stats.rows:
        raise ValueError(f"The classes have {int(counts.sum())} rows, but there are {stats.rows}.")
    if bool((diagonal < 0).any()) or bool((stats.squares < 0).any()):
        raise ValueError("A sum of squares is negative.")
    if stats.rows == 0 and bool(stats.upper.any() | stats.squares.any()):
        raise ValueError("There are no rows, but a sum of squares is not 0.")
    if not stats.kind.real and bool((stats.sums[counts == 0] != 0).any()):
        raise ValueError("A class without rows has a nonzero sum.")
    # Cauchy-Schwarz: no sum of n values exceeds the square root of n times their sum of squares.
    root = diagonal.sqrt()
    slack = _CONSISTENCY * root.max()
    largest = root + slack
    numbers = stats.target_squares.sqrt()
    if bool((stats.total.abs() > stats.rows**0.5 * largest).any()) or bool(
        (stats.sums.abs() > numbers[:, None] * (1 + _CONSISTENCY * stats.kind.real) * largest).any()
    ):
        raise ValueError("A sum of features is larger than their sum of squares allows.")
    if bool((stats.target_totals.abs() > stats.rows**0.5 * numbers * (1 + _CONSISTENCY)).any()):
        raise ValueError("A sum of targets is larger than their sum of squares allows.")
    if bool((stats.upper.abs() > torch.outer(largest, largest)).any()):
        raise ValueError("The Gram matrix is invalid: an entry exceeds the bound from its diagonal.")
    if stats.kind.exclusive:
        difference = (stats.sums.sum(0) - stats.total).abs()
        if bool((difference > stats.rows**0.5 * slack).any()):
            raise ValueError("The classes' sums do not add up to the sum of all rows.")


def check_shares(stats: "FeatureStatistics", shares: int) -> None:
    """Validate that the first targets of some rows can be shares, from 0 to 1, such as those of classes in a cell.

    Raises:
        ValueError: if not.
    """
    totals, squares = stats.target_totals[:shares], stats.target_squares[:shares]
    slack = _CONSISTENCY * (1 + stats.rows)
    if bool((totals < -slack).any() | (totals > stats.rows + slack).any() | (squares > totals + slack).any()):
        raise ValueError("A target that is a share has a sum that no shares have.")


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write packed statistics as a safetensors file, atomically.

    Raises:
        UserError: if the file cannot be written.
        FedheadError: if the disk is full.
    """
    content = dict(tensors)
    write_atomically(Path(path), save(content, {"format": _FORMAT, "sha256": _digest(content)}))


def read_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read packed statistics.

    Raises:
        UserError: if the file is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} does not contain feature statistics in a format that this version reads.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"There are no feature statistics at {path}.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"The feature statistics at {path} cannot be read: {error}.") from error
    if metadata.get("sha256") != _digest(tensors):
        raise UserError(f"The feature statistics at {path} are damaged: their digest differs.")
    return tensors


def _upper_mask(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu_()


def _check_names(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, int]]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"Statistics consist of {sorted(expected)}, not {sorted(tensors)}.")
    for name, (dtype, ndim) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.ndim != ndim:
            raise ValueError(
                f"Statistics need {name!r} with {ndim} dimensions of {dtype}, not {tensor.ndim} of {tensor.dtype}."
            )
        if dtype == torch.float64 and not bool((tensor.abs() <= LARGEST).all()):
            raise ValueError(f"In the statistics, {name!r} has a value that is not finite or beyond {LARGEST}.")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
