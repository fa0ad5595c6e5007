"""BoundaryStore: the activations at the boundary between a frozen trunk and a tail, extracted once, then mapped.

Rows are kept one after the other, of any length: an image is one element `[*shape]`, a text as many `[d]` as it has
tokens. Values are float16 where the tail gives the same features to 1e-3, else float32.
"""

import functools
import hashlib
import logging
import shutil
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones.split import Tail, Trunk
from fedhead.data import IntArray, Samples, UnreadableSampleError
from fedhead.errors import FedheadError
from fedhead.features.blocks import Prepared, prepare
from fedhead.features.checkpoints import Blocks, Meta, intact_meta, is_whole, read_meta, truncate
from fedhead.features.extraction import arranged, batch_size_for, read_ahead
from fedhead.features.store import BLOCK, Progress
from fedhead.files import disk_errors, home, locked

logger = logging.getLogger(__name__)

FORMAT = "fedhead-boundary-2"
TOLERANCE = 1e-3
"""Largest difference of features from float16 activations, relative to the largest feature."""
BLOCK_VALUES = 2**24
"""Values of activations that are in memory at a time."""
LARGEST = 65504.0
"""Largest float16 value; larger activations are clipped to it."""

LONGEST = 512
"""Elements of a sequence, for the size of blocks."""

Kind = Literal["float16", "float32"]


@dataclass(frozen=True)
class BoundaryStore:
    """The boundary activations of a data set, mapped from disk.

    Attributes:
        path: the store's folder.
        values: `[elements, width]`, float16 or float32.
        starts: `[n + 1]`, where each row's elements start; unreadable rows have none.
        shape: of one element.
        sequences: whether rows have any number of elements.
        device: where `take` returns them.
        extracted: the number of rows extracted by this call.
    """

    path: Path
    values: npt.NDArray[Any]
    starts: IntArray
    shape: tuple[int, ...]
    sequences: bool
    device: torch.device
    extracted: int = 0

    @classmethod
    def open(
        cls,
        trunk: Trunk,
        tail: Tail,
        samples: Samples,
        rows: IntArray,
        *,
        root: Path | None = None,
        number: Kind | None = None,
        progress: Progress = lambda done, total: None,
    ) -> Self:
        """Return the activations of some rows of `samples`, extracting missing ones first.

        An interrupted extraction is resumed and a damaged store rebuilt. Memory does not grow with the data.

        Args:
            trunk: on the device for extraction; activations are returned there.
            tail: decides the type of values.
            samples: the data set.
            rows: `[k]`, the rows that can be read, ascending.
            root: the folder of all stores; by default in `fedhead.files.home()`.
            number: the type of values; None decides by the probes.
            progress: called as rows are completed.

        Raises:
            FedheadError: if the disk is too small.
        """
        number = number or number_for(trunk, tail)
        path = store_path(trunk, samples, rows, number, root or home() / "features")
        extracted = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if not _is_whole(path):
                    extracted = _extract(trunk, samples, rows, path, number, progress)
        return cls._map(path, trunk.device, extracted)

    @classmethod
    def _map(cls, path: Path, device: torch.device, extracted: int) -> Self:
        meta = read_meta(path)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(_lengths(path))])
        shape = tuple(meta["shape"])
        values = np.memmap(
            path / "values.bin",
            dtype="<f2" if meta["number"] == "float16" else "<f4",
            mode="r",
            shape=(int(starts[-1]), int(np.prod(shape))),
        )
        return cls(path, values, starts, shape, bool(meta["sequences"]), device, extracted)

    @property
    def num_bytes(self) -> int:
        """The size of the values in bytes."""
        return int(self.values.nbytes)

    def take(self, rows: IntArray) -> Tensor:
        """Return the activations `[n, *shape]` of rows `[n]`, float32.

        Sequences `[n, length, d + 1]` are padded with zeros; their last column is 1 for elements and 0 for padding.
        """
        if not self.sequences:
            taken = torch.from_numpy(self.values[self.starts[rows]].astype(np.float32))
            return taken.view(len(rows), *self.shape).to(self.device)
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        places = zip(starts.tolist(), lengths.tolist(), strict=True)
        return padded([self.values[start : start + length] for start, length in places]).to(self.device)


def padded(sequences: Sequence[npt.NDArray[Any]]) -> Tensor:
    """Return sequences `[length, d]` as `[n, longest, d + 1]`, float32, with zeros after the end.

    The last column is 1 for elements and 0 for padding.
    """
    longest = max(1, *map(len, sequences))
    rows = np.zeros((len(sequences), longest, sequences[0].shape[1] + 1), np.float32)
    for row, values in enumerate(sequences):
        rows[row, : len(values), :-1] = values
        rows[row, : len(values), -1] = 1
    return torch.from_numpy(rows)


def store_path(trunk: Trunk, samples: Samples, rows: IntArray, number: Kind, folder: Path) -> Path:
    """Return the folder of the activations of some rows, among those of all stores."""
    chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    key = hashlib.sha256(f"{trunk.digest} {number} {samples.fingerprint} {chosen}".encode()).hexdigest()[:32]
    return folder / f"boundary-{key}"


def number_for(trunk: Trunk, tail: Tail) -> Kind:
    """Return `float16` if the tail gives the same features of the probes from it, to 1e-3; else `float32`."""
    batch = trunk.probe_batch()
    with torch.inference_mode():
        values, mask = trunk.boundary(batch)
        exact = tail(values, mask)
        rounded = tail(values.half().float(), mask)
    close = bool((rounded - exact).abs().max() <= TOLERANCE * exact.abs().max())
    # Activations of other inputs may be larger than those of the probes.
    return "float16" if close and float(values.abs().max()) < LARGEST / 16 else "float32"


def _is_whole(path: Path) -> bool:
    def is_intact(meta: Meta) -> bool:
        return bool(meta["format"] == FORMAT and _checksums(path, meta, _lengths(path)) == meta["checksums"])

    return is_whole(path, is_intact, "activations")


def _lengths(path: Path) -> npt.NDArray[np.int64]:
    return np.fromfile(path / "lengths.bin", dtype="<i8")


def _block_rows(meta: Meta) -> int:
    """Return the number of rows in a block: fewer where the activations of one are large."""
    elements = LONGEST if meta["sequences"] else 1
    return max(1, min(BLOCK, BLOCK_VALUES // max(int(np.prod(meta["shape"])) * elements, 1)))


def _bytes_an_element(meta: Meta) -> int:
    return int(np.prod(meta["shape"])) * (2 if meta["number"] == "float16" else 4)


def _checksums(path: Path, meta: Meta, lengths: IntArray) -> list[int]:
    """Return the CRC-32 of each block's values and lengths, without truncated blocks."""
    found = []
    with (path / "values.bin").open("rb") as values:
        rows = _block_rows(meta)
        for start in range(0, len(lengths), rows):
            block = lengths[start : start + rows]
            size = int(block.sum()) * _bytes_an_element(meta)
            read = values.read(size)
            if len(read) < size:
                break
            found.append(zlib.crc32(block.tobytes(), zlib.crc32(read)))
    return found


def _extract(trunk: Trunk, samples: Samples, rows: IntArray, path: Path, number: Kind, progress: Progress) -> int:
    """Fill a partial folder block by block, then rename it to `path`; return the number of rows done."""
    partial = path.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    readable = set(rows.tolist())
    meta = _resume(partial, trunk, number)
    begun = int(meta["done"])
    forward = arranged(trunk, len(samples))
    assert isinstance(forward, Trunk)
    block_rows = _block_rows(meta)
    batch_size = min(batch_size_for(trunk), block_rows)
    chunk = batch_size if trunk.kind == "image" else block_rows
    wanted = [row for row in range(begun, len(samples)) if row in readable]
    read_row = functools.partial(prepare, samples, trunk)
    with (
        Blocks(partial, ("values.bin", "lengths.bin"), meta) as blocks,
        closing(read_ahead(read_row, wanted, ahead=2 * chunk)) as prepared,
    ):
        for start in range(begun, len(samples), block_rows):
            stop = min(start + block_rows, len(samples))
            parts: list[npt.NDArray[Any]] = []
            counts = np.zeros(stop - start, "<i8")
            for first in range(start, stop, chunk):
                here = [row for row in range(first, min(first + chunk, stop)) if row in readable]
                made = activations_of(forward, dict(zip(here, islice(prepared, len(here)), strict=True)), batch_size)
                for row in here:
                    if row in made:
                        counts[row - start] = len(made[row])
                        parts.append(as_number(made[row], number))
                progress(min(first + chunk, stop), len(samples))
            block = b"".join(part.tobytes() for part in parts)
            if shutil.disk_usage(partial).free < len(block):
                raise FedheadError(
                    f"The activations of {samples.spec} at the boundary do not fit on the disk of {path.parent}. Free "
                    "some space, set FEDHEAD_HOME to a folder on another disk, tune fewer layers, or set activations = "
                    "'recompute'."
                )
            blocks.append((block, counts.tobytes()), stop)
    partial.rename(path)
    return len(wanted)


def as_number(activations: npt.NDArray[np.float32], number: Kind) -> npt.NDArray[Any]:
    """Return activations as they are stored."""
    if number == "float32":
        return activations.astype("<f4")
    return activations.clip(-LARGEST, LARGEST).astype("<f2")


def activations_of(
    trunk: Trunk, read: dict[int, Prepared], batch_size: int, *, as_error: bool = False
) -> dict[int, npt.NDArray[np.float32]]:
    """Return the elements `[length, *shape]` of each row that can be read, sequences without their padding.

    Args:
        trunk: the frozen part.
        read: the rows, prepared for it.
        batch_size: rows of one forward pass.
        as_error: whether a row that cannot be read is an error.

    Raises:
        FedheadError: if there is such a row, and it is one.
    """
    rows: dict[int, tuple[tuple[int, int], Tensor]] = {}
    for row, one in read.items():
        if isinstance(one, UnreadableSampleError):
            if as_error:
                raise FedheadError(f"{one} It could be read before: the data changed during the run.")
            logger.warning("%s It is skipped.", one)
        else:
            rows[row] = one
    made: dict[int, npt.NDArray[np.float32]] = {}
    ordered = sorted(rows, key=lambda row: len(rows[row][1]))
    for start in range(0, len(ordered), batch_size):
        some = ordered[start : start + batch_size]
        values, mask = trunk.boundary(trunk.preprocessing.collate([rows[row][1] for row in some]))
        values = values.cpu()
        for at, row in enumerate(some):
            elements = values[at][mask[at].bool().cpu()] if mask is not None else values[at][None]
            made[row] = elements.contiguous().numpy()
    return made


def _resume(partial: Path, trunk: Trunk, number: Kind) -> Meta:
    """Return the state of a partial folder, with its files cut off at that state."""
    values, mask = trunk.boundary(trunk.probe_batch())
    sequences = mask is not None
    shape = list(values.shape[2:] if sequences else values.shape[1:])
    form = {"format": FORMAT, "number": number, "shape": shape}
    fresh: Meta = {**form, "sequences": sequences, "done": 0, "checksums": []}

    def is_intact(meta: Meta) -> bool:
        lengths = _lengths(partial)[: meta["done"]]
        same = all(meta[name] == value for name, value in form.items())
        return same and len(lengths) == meta["done"] and _checksums(partial, meta, lengths) == meta["checksums"]

    meta = intact_meta(partial, is_intact) or fresh
    elements = int(_lengths(partial)[: meta["done"]].sum()) if meta["done"] else 0
    truncate(partial, {"values.bin": elements * _bytes_an_element(meta), "lengths.bin": 8 * meta["done"]})
    return meta
