"""FeatureStore: run the backbone over a data set once, then memory-map its features.

A store's content, and so its key, is determined by the backbone's digest (spec, weights, layer, pooling,
preprocessing), the precision, and the fingerprint of the data (content or stamps of all files, labels, groups, and
options that select rows). Possibly temporary failures, such as a permission or a missing decoder, are not part of the
key: their rows are retried whenever the store is opened.
"""

import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.data import KeyArray, Samples, UnreadableSampleError, require_kind
from fedhead.data.samples import Former
from fedhead.devices import Precision
from fedhead.errors import FedheadError, UnreadableDataError, UserError
from fedhead.features.blocks import Block, Extract, extract_blocks
from fedhead.features.checkpoints import META, Blocks, Meta, intact_meta, is_whole, read_meta, truncate, write_meta
from fedhead.features.extraction import arranged, usable
from fedhead.files import disk_errors, home, locked, write_atomically

logger = logging.getLogger(__name__)

FORMAT = "fedhead-features-1"
BLOCK = 1024
"""Rows per checkpoint of an extraction; batches never span blocks, so that resuming changes no bit."""

BLOCK_VALUES = 2**22
"""Most values per checkpoint, for items with many."""

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the total."""


@dataclass(frozen=True)
class FeatureStore:
    """The features of a data set under a backbone, in the order of the data set's rows.

    Attributes:
        path: the store's folder.
        features: `[n, d]` float32, mapped from disk, or `[n, V]` if the backbone keeps maps; zeros for skipped rows.
        keys: `[n]`, the keys that decide which rows are held out.
        contents: `[n]`, the identity of each row's content, which rows of one group do not share.
        skipped: the reason for each unreadable row.
        extracted: the number of rows extracted by this call; 0 if all were cached.
        digest: of the features, the keys and the numbers of skipped rows.
    """

    path: Path
    features: Tensor
    keys: KeyArray
    contents: KeyArray
    skipped: dict[int, str]
    extracted: int
    digest: str

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        samples: Samples,
        *,
        strict: bool = False,
        empty: bool = False,
        batch_size: int | None = None,
        precision: Precision = "float32",
        root: Path | None = None,
        progress: Progress = lambda done, total: None,
        extract: Extract = extract_blocks,
    ) -> Self:
        """Return the features of `samples` under `backbone`, extracting missing ones first.

        An interrupted extraction is resumed and a damaged store rebuilt; concurrent processes take turns on one store.
        Memory does not grow with the data.

        Args:
            backbone: the backbone, on the device for extraction.
            samples: the data set.
            strict: whether unreadable rows are an error instead of being skipped.
            empty: whether the features may be those of no row, if none can be read.
            batch_size: rows per forward pass; None chooses by backbone and device.
            precision: `mixed` is faster on GPUs, and on CPUs that multiply bfloat16, and accurate to two or three
                digits; its features are stored apart. Where it is not `usable`, it is float32.
            root: the folder of all stores; by default in `fedhead.files.home()`.
            progress: called as rows are completed.
            extract: makes the blocks that are missing; this process alone writes them.

        Raises:
            UserError: under `strict`, naming the first unreadable row; if the folder cannot be written; or if the
                backbone and the data are of different kinds, such as images and texts.
            UnreadableDataError: if no row can be read, unless under `empty`.
            FedheadError: if the disk is full.
        """
        require_kind(backbone.spec, backbone.kind, samples.kind)
        precision = usable(precision, backbone)
        path = (root or home() / "features") / store_key(backbone, samples.fingerprint, precision)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if samples.former is not None and not path.exists():
                    before = path.with_name(store_key(backbone, samples.former.fingerprint, precision))
                    _adopt(before, path, samples.former, samples.spec)
                if _is_whole(path):
                    _fill_contents(samples, path)
                    extracted = _retry(backbone, samples, path, precision)
                else:
                    extracted = _extract(backbone, samples, path, strict, batch_size, precision, progress, extract)
        store = cls._map(path, extracted)
        if len(store.skipped) == len(samples) and not empty:
            raise UnreadableDataError(f"None of the rows of {samples.spec} can be read. The first: {store.skipped[0]}")
        if strict and store.skipped:
            raise UserError(f"{store.skipped[min(store.skipped)]} {len(store.skipped)} rows are unreadable.")
        return store

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map a store that another process has just validated."""
        return cls._map(path, 0)

    @classmethod
    def _map(cls, path: Path, extracted: int) -> Self:
        meta = read_meta(path)
        shape = (meta["rows"], meta["features"])
        # Copy-on-write, because torch warns about tensors over read-only memory.
        mapped = np.memmap(path / "features.bin", dtype="<f4", mode="c", shape=shape)
        return cls(
            path=path,
            features=torch.from_numpy(mapped),
            keys=np.fromfile(path / "keys.bin", dtype="<u8"),
            contents=np.fromfile(path / "contents.bin", dtype="<u8"),
            skipped={int(row): reason for row, reason in meta["skipped"].items()},
            extracted=extracted,
            digest=hashlib.sha256(repr((meta["checksums"], sorted(meta["skipped"]))).encode()).hexdigest(),
        )

    def readable(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the numbers of the rows that were not skipped."""
        mask = np.ones(len(self.keys), dtype=bool)
        mask[list(self.skipped)] = False
        return np.flatnonzero(mask)


def block_rows(num_values: int) -> int:
    """Return the rows per checkpoint of an extraction of so many values per row."""
    return max(1, min(BLOCK, BLOCK_VALUES // num_values))


def store_key(backbone: Backbone, fingerprint: str, precision: Precision) -> str:
    """Return the name of a store's folder, a hash of everything that determines its content."""
    made_by = backbone.digest if precision == "float32" else f"{backbone.digest} {precision}"
    return hashlib.sha256(f"{made_by} {fingerprint}".encode()).hexdigest()[:32]


def _adopt(before: Path, path: Path, former: Former, spec: str) -> None:
    """Migrate a store of the previous version if it is certainly of the same data; otherwise log the reason."""
    if not (before / META).is_file():
        return
    finished = (before / META).stat().st_mtime_ns
    changed = "files have changed, were renamed or got other permissions since" if former.changed >= finished else ""
    if fault := former.fault() or changed:
        logger.warning("The cached features for %s are extracted again: %s.", spec, fault)
        return
    with locked(before.with_suffix(".lock")):
        if _is_whole(before):
            before.rename(path)


_intact: dict[Path, tuple[tuple[int, int, int], ...]] = {}
"""The files of stores that this process has read and found intact."""


def _is_whole(path: Path) -> bool:
    def is_intact(meta: Meta) -> bool:
        files = [(path / name).stat() for name in (META, "features.bin", "keys.bin")]
        stamps = tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in files)
        if _intact.get(path) != stamps:
            if meta["format"] != FORMAT or list(_checksums(path, meta)) != meta["checksums"]:
                return False
            _intact[path] = stamps
        return True

    return is_whole(path, is_intact, "features")


def _fill_contents(samples: Samples, path: Path) -> None:
    """Add the content identities of rows to a store of the previous version if it lacks them."""
    file = path / "contents.bin"
    if file.exists() and file.stat().st_size == 8 * len(samples):
        return
    contents = np.zeros(len(samples), dtype="<u8")
    for row in range(len(samples)):
        with suppress(UnreadableSampleError):
            contents[row] = samples.keys(row, samples.read(row))[1]
    write_atomically(file, contents.tobytes())


def _checksums(path: Path, meta: Meta) -> Iterator[int]:
    """Yield the CRC-32 of each block's features and keys; nothing for truncated blocks."""
    with (path / "features.bin").open("rb") as features, (path / "keys.bin").open("rb") as keys:
        step = block_rows(meta["features"])
        for start in range(0, meta["rows"], step):
            rows = min(step, meta["rows"] - start)
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
    extract: Extract,
) -> int:
    """Fill a partial folder block by block, then rename it to `path`; return the number of rows done."""
    partial = path.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    meta = _resume(partial, samples, backbone)
    needed = (len(samples) - meta["done"]) * (backbone.num_values * 4 + 8)
    if shutil.disk_usage(partial).free < needed:
        raise FedheadError(
            f"The features of {samples.spec} need {needed / 1e6:.0f} MB more in {path.parent}, which has less free "
            "space. Free some space, or set FEDHEAD_HOME to a folder on another disk."
        )
    begun, step = int(meta["done"]), block_rows(backbone.num_values)
    blocks = [range(start, min(start + step, len(samples))) for start in range(begun, len(samples), step)]
    forward = arranged(backbone, len(samples), precision=precision)
    made = extract(
        forward,
        samples,
        blocks,
        precision=precision,
        batch_size=batch_size,
        progress=lambda done: progress(begun + done, len(samples)),
    )
    with (
        Blocks(partial, ("features.bin", "keys.bin", "contents.bin"), meta) as written,
        closing(made),
    ):
        for block in made:
            _note_unreadable(block, meta, strict)
            keys, contents = (column.tobytes() for column in block.keys.T)
            written.append((block.features.tobytes(), keys, contents), int(meta["done"]) + len(block.rows))
    partial.rename(path)
    return len(samples) - begun


def _note_unreadable(block: Block, meta: Meta, strict: bool) -> None:
    for row, error in sorted(block.unreadable.items()):
        if strict:
            raise UserError(f"{error} With strict data, one unreadable row stops the run.") from None
        logger.warning("%s It is skipped.", error)
        meta["skipped"][str(row)] = str(error)
        if not error.lasting:
            meta["passing"].append(row)


def _retry(backbone: Backbone, samples: Samples, path: Path, precision: Precision) -> int:
    """Retry rows that failed for possibly temporary reasons; return the number of extracted rows.

    A store of the previous version does not record these reasons: all rows that it skipped, and rows with features that
    are not finite, are retried once.
    """
    meta = read_meta(path)
    again = meta["passing"] if "passing" in meta else _doubtful(path, meta)
    if "passing" in meta and not again:
        return 0
    meta["passing"] = []
    if not again:
        write_meta(path, meta)
        return 0
    for row in again:
        meta["skipped"].pop(str(row), None)
    forward, step = arranged(backbone, len(again), precision=precision), block_rows(backbone.num_values)
    blocks = [again[start : start + step] for start in range(0, len(again), step)]
    retried = 0
    for block in extract_blocks(forward, samples, blocks, precision=precision):
        _note_unreadable(block, meta, strict=False)
        done = [row not in block.unreadable for row in block.rows]
        keys, contents = block.keys.T
        for name, values in (("features.bin", block.features), ("keys.bin", keys), ("contents.bin", contents)):
            with (path / name).open("r+b") as file:
                for position, row in enumerate(block.rows):
                    if done[position]:
                        file.seek(row * values[position].nbytes)
                        file.write(values[position].tobytes())
                file.flush()
                os.fsync(file.fileno())
        retried += sum(done)
    if retried:
        meta["checksums"] = list(_checksums(path, meta))
    write_meta(path, meta)
    return retried


def _doubtful(path: Path, meta: Meta) -> list[int]:
    """Return the rows of a store that were skipped or have features that are not finite."""
    width = meta["features"] * 4
    rows = {int(row) for row in meta["skipped"]}
    with (path / "features.bin").open("rb") as file:
        step = block_rows(meta["features"])
        for start in range(0, meta["rows"], step):
            block = np.frombuffer(file.read(step * width), dtype="<f4").reshape(-1, meta["features"])
            rows.update((start + np.flatnonzero(~np.isfinite(block).all(1))).tolist())
    return sorted(rows)


def _resume(partial: Path, samples: Samples, backbone: Backbone) -> Meta:
    """Return the state of a partial folder, with its files truncated to that state."""
    fresh: Meta = {
        "format": FORMAT,
        "rows": len(samples),
        "features": backbone.num_values,
        "done": 0,
        "checksums": [],
        "skipped": {},
        "passing": [],
    }

    def is_intact(meta: Meta) -> bool:
        done = {**meta, "rows": meta["done"]}
        meta.setdefault("passing", [int(row) for row in meta["skipped"]])
        whole = (partial / "contents.bin").stat().st_size >= 8 * meta["done"]
        return bool(meta["format"] == FORMAT and whole and list(_checksums(partial, done)) == meta["checksums"])

    meta = intact_meta(partial, is_intact) or fresh
    widths = {"features.bin": meta["features"] * 4, "keys.bin": 8, "contents.bin": 8}
    truncate(partial, {name: meta["done"] * width for name, width in widths.items()})
    return meta
