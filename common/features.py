"""FeatureStore: run the backbone over a data set once, memory-map its features for ever."""

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.data import KeyArray, Samples, UnreadableSampleError, require_kind
from fedhead.devices import Precision, multiplying
from fedhead.errors import FedheadError, UserError
from fedhead.extraction import arranged, batch_size_for, read_ahead
from fedhead.files import disk_errors, home, write_atomically

logger = logging.getLogger(__name__)

FORMAT = "fedhead-features-1"
BLOCK = 1024
"""Rows after which an extraction is safe on disk; batches never straddle blocks, so resuming changes no bit."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class FeatureStore:
    """The features of a data set under a backbone, row by row as the data set counts them.

    Attributes:
        path: the folder that holds them.
        features: `[n, d]` float32, mapped from disk; zeros for skipped rows.
        keys: `[n]`, what rows are held out by.
        skipped: why each row that could not be read was skipped.
        extracted: how many rows this call ran the backbone over; 0 if all were there.
    """

    path: Path
    features: Tensor
    keys: KeyArray
    skipped: dict[int, str]
    extracted: int

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        samples: Samples,
        *,
        strict: bool = False,
        batch_size: int | None = None,
        precision: Precision = "float32",
        root: Path | None = None,
        progress: Progress = lambda done, total: None,
    ) -> Self:
        """Read the features of `samples` under `backbone`, after extracting what is not there yet.

        An interrupted extraction is resumed, a damaged store rebuilt; two processes that want the same one take
        turns. Memory does not grow with the data.

        Args:
            backbone: on the device that is to do the work.
            samples: the data set.
            strict: refuse data with unreadable rows instead of skipping them.
            batch_size: rows that go through the backbone at a time; None for what suits backbone and device.
            precision: `mixed` is faster on CUDA and good for two to three digits; such features are kept apart.
            root: the folder of all stores; by default in `fedhead.files.home()`.
            progress: called as rows are done.

        Raises:
            UserError: under `strict`, naming the first unreadable row; if the folder cannot be written; or if the
                backbone takes images and the data holds texts, or the reverse.
            FedheadError: if no row can be read, or the disk is full.
        """
        require_kind(backbone.spec, backbone.kind, samples.kind)
        made_by = backbone.digest if precision == "float32" else f"{backbone.digest} {precision}"
        key = hashlib.sha256(f"{made_by} {samples.fingerprint}".encode()).hexdigest()[:32]
        path = (root or home() / "features") / key
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                extracted = 0
                if not _is_whole(path):
                    extracted = _extract(backbone, samples, path, strict, batch_size, precision, progress)
        store = cls._map(path, extracted)
        if len(store.skipped) == len(samples):
            raise FedheadError(f"Not one row of {samples.spec} can be read. The first: {store.skipped[0]}")
        if strict and store.skipped:
            raise UserError(f"{next(iter(store.skipped.values()))} {len(store.skipped)} rows are unreadable.")
        return store

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map a store that is known to be whole, as another process has just opened it."""
        return cls._map(path, 0)

    @classmethod
    def _map(cls, path: Path, extracted: int) -> Self:
        meta = json.loads((path / "meta.json").read_text())
        shape = (meta["rows"], meta["features"])
        # Copy-on-write, because torch warns of tensors over read-only memory.
        mapped = np.memmap(path / "features.bin", dtype="<f4", mode="c", shape=shape)
        return cls(
            path=path,
            features=torch.from_numpy(mapped),
            keys=np.fromfile(path / "keys.bin", dtype="<u8"),
            skipped={int(row): reason for row, reason in meta["skipped"].items()},
            extracted=extracted,
        )

    def readable(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the numbers of the rows that were not skipped."""
        mask = np.ones(len(self.keys), dtype=bool)
        mask[list(self.skipped)] = False
        return np.flatnonzero(mask)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(path: Path) -> bool:
    """Tell whether a finished store is there; remove one whose content is not what was written."""
    if not path.exists():
        return False
    try:
        meta = json.loads((path / "meta.json").read_text())
        whole = bool(meta["format"] == FORMAT and list(_checksums(path, meta)) == meta["checksums"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        logger.warning("The features in %s are damaged; they are extracted again.", path)
        shutil.rmtree(path)
    return whole


def _checksums(path: Path, meta: dict[str, Any]) -> Iterator[int]:
    """Yield the CRC-32 of each block's features and keys; nothing for blocks that are cut short."""
    with (path / "features.bin").open("rb") as features, (path / "keys.bin").open("rb") as keys:
        for start in range(0, meta["rows"], BLOCK):
            rows = min(BLOCK, meta["rows"] - start)
            block = features.read(rows * meta["features"] * 4)
            if len(block) < rows * meta["features"] * 4:
                return
            yield zlib.crc32(keys.read(rows * 8), zlib.crc32(block))


def _extract(
    backbone: Backbone,
    samples: Samples,
    path: Path,
    strict: bool,
    batch_size: int | None,
    precision: Precision,
    progress: Progress,
) -> int:
    """Fill a partial folder block by block from where it stands, then rename it to `path`; return rows done."""
    partial = path.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    meta = _resume(partial, samples, backbone)
    needed = (len(samples) - meta["done"]) * (backbone.num_features * 4 + 8)
    if shutil.disk_usage(partial).free < needed:
        raise FedheadError(
            f"The features of {samples.spec} need {needed / 1e6:.0f} MB more in {path.parent}, where less is free. "
            "Free some space, or point FEDHEAD_HOME to another disk."
        )
    begun = int(meta["done"])
    forward = arranged(backbone, len(samples))
    with multiplying(precision, backbone.device):
        batch_size = min(batch_size or batch_size_for(forward), BLOCK)
    # Texts are small: a block of them is read at once, so that those of a length can go through together.
    chunk = BLOCK if backbone.kind == "text" else batch_size
    prepare = functools.partial(_prepare, samples, backbone)
    with (
        (partial / "features.bin").open("ab") as features,
        (partial / "keys.bin").open("ab") as keys,
        multiplying(precision, backbone.device),
        closing(read_ahead(prepare, range(begun, len(samples)), ahead=2 * chunk)) as prepared,
    ):
        for start in range(begun, len(samples), BLOCK):
            block, block_keys = [], []
            stop = min(start + BLOCK, len(samples))
            for first in range(start, stop, chunk):
                rows = range(first, min(first + chunk, stop))
                read = dict(zip(rows, islice(prepared, len(rows)), strict=True))
                _note_unreadable(read, meta["skipped"], strict)
                extracted, row_keys = _extract_rows(forward, list(read.values()), batch_size)
                block.append(extracted)
                block_keys.append(row_keys)
                progress(rows.stop, len(samples))
            features_bytes, keys_bytes = np.concatenate(block).tobytes(), np.concatenate(block_keys).tobytes()
            for file, content in ((features, features_bytes), (keys, keys_bytes)):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            meta["checksums"].append(zlib.crc32(keys_bytes, zlib.crc32(features_bytes)))
            meta["done"] = stop
            write_atomically(partial / "meta.json", json.dumps(meta))
    partial.rename(path)
    return len(samples) - begun


Prepared = tuple[int, Tensor] | UnreadableSampleError
"""A row's key and what the backbone takes of it, or why it cannot be read."""


def _prepare(samples: Samples, backbone: Backbone, row: int) -> Prepared:
    try:
        item = samples.read(row)
    except UnreadableSampleError as error:
        return error
    return samples.key(row, item), backbone.preprocessing(item)


def _note_unreadable(read: dict[int, Prepared], skipped: dict[str, str], strict: bool) -> None:
    for row, prepared in read.items():
        if isinstance(prepared, UnreadableSampleError):
            if strict:
                raise UserError(f"{prepared} Under strict data, one unreadable row stops the run.") from None
            logger.warning("%s It is skipped.", prepared)
            skipped[str(row)] = str(prepared)


def _extract_rows(
    backbone: Backbone, rows: list[Prepared], batch_size: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], KeyArray]:
    readable = {position: row for position, row in enumerate(rows) if not isinstance(row, UnreadableSampleError)}
    keys = np.zeros(len(rows), dtype="<u8")
    features = np.zeros((len(rows), backbone.num_features), dtype="<f4")
    # Images are all of one length; texts are padded to the longest of their batch.
    ordered = sorted(readable, key=lambda position: len(readable[position][1]))
    for start in range(0, len(ordered), batch_size):
        positions = ordered[start : start + batch_size]
        batch = backbone.preprocessing.collate([readable[position][1] for position in positions])
        features[positions] = backbone.features(batch).cpu().numpy()
        keys[positions] = [readable[position][0] for position in positions]
    return features, keys


def _resume(partial: Path, samples: Samples, backbone: Backbone) -> dict[str, Any]:
    """Return the state that a partial folder is in, its files cut back to what that state vouches for."""
    fresh = {
        "format": FORMAT,
        "rows": len(samples),
        "features": backbone.num_features,
        "done": 0,
        "checksums": [],
        "skipped": {},
    }
    try:
        meta: dict[str, Any] = json.loads((partial / "meta.json").read_text())
        done = {**meta, "rows": meta["done"]}
        if meta["format"] != FORMAT or list(_checksums(partial, done)) != meta["checksums"]:
            meta = fresh
    except (OSError, ValueError, KeyError, TypeError):
        meta = fresh
    for name, width in (("features.bin", meta["features"] * 4), ("keys.bin", 8)):
        with (partial / name).open("ab") as file:
            file.truncate(meta["done"] * width)
    return meta
