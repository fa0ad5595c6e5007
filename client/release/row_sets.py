"""Sets of rows that releases rested on, as files, and the comparison of any two of them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.data import IntArray, KeyArray
from fedhead.errors import FedheadError
from fedhead.files import sync_folder, write_atomically
from fedhead.tasks import Targets, Task

Keys = Mapping[str, KeyArray]
"""The keys of rows by part and group, as a person would call those rows."""

TRAINING_ROWS, HELD_OUT_ROWS = "training rows", "held-out rows"


def keys_of(part: str, rows: IntArray, keys: KeyArray, targets: Targets, task: Task) -> Keys:
    """Name the rows of one part, group by group; see `Task.memberships`.

    Args:
        part: `TRAINING_ROWS` or `HELD_OUT_ROWS`.
        rows: `[n]`, of this part.
        keys: `[N]`, the identity of every row that `rows` may number.
        targets: `[N, ...]`, of these rows.
        task: names the groups.
    """
    positions, groups = task.memberships(targets[rows])
    order = groups.argsort(kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    parts = np.split(keys[rows[positions[order]]], starts[1:])
    return {f"{part} {task.groups[group]}": of_group for group, of_group in zip(present.tolist(), parts, strict=False)}


def sorted_keys(keys: Keys) -> Keys:
    """Return keys in the order in which they are kept."""
    return {name: np.sort(own).astype("<u8") for name, own in sorted(keys.items()) if len(own)}


def name_of(keys: Keys) -> str:
    """Return the digest of sorted keys."""
    digest = hashlib.sha256()
    for name, own in sorted(keys.items()):
        digest.update(f"{name!r} {len(own)} ".encode())
        digest.update(own.tobytes())
    return digest.hexdigest()


class RowSets:
    """A folder of sets of rows, each named by its digest.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, name: str, keys: Keys) -> None:
        """Write a set, if it is not there."""
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, save(dict(keys)))
            sync_folder(self.folder)

    def read(self, name: str) -> Keys:
        """Return a set.

        Raises:
            FedheadError: if it is missing or damaged.
        """
        path = self.folder / name
        try:
            keys = load(path.read_bytes())
            whole = name_of(keys) == name
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            raise FedheadError(
                f"Nothing was sent: {path}, the rows of an earlier release, is missing or damaged, so it cannot be "
                "told how many have changed since. Restore it from a backup, or put the data back as it was."
            )
        return keys


def few_differing(first: Keys, second: Keys, enough: int, *, whole: bool) -> tuple[int, str] | None:
    """Return how many rows of which part and group differ, if it is fewer than `enough` and more than none.

    A class that has fewer than `enough` held-out rows may come and go with all of them: the larger release counted
    these few rows by themselves.

    Args:
        first: all training and held-out rows of a release.
        second: of another release.
        enough: from so many on, rows may differ.
        whole: whether `second` are all rows, too; else those of one part, which is compared alone.
    """
    none = np.empty(0, dtype=np.uint64)
    differing: dict[str, list[int]] = {}
    for part in (TRAINING_ROWS, HELD_OUT_ROWS):
        mine, theirs = _of_part(first, part), _of_part(second, part)
        if not whole and not theirs:
            continue
        for group in sorted(mine.keys() | theirs.keys()):
            one, other = mine.get(group, none), theirs.get(group, none)
            count = _count_differing(one, other)
            comes_whole = part == HELD_OUT_ROWS and not (len(one) and len(other))
            if 0 < count < enough and not comes_whole:
                return count, f"{part} {group}"
            differing.setdefault(group, []).append(count)
    parts = (_of_part(keys, part) for keys in (first, second) for part in (TRAINING_ROWS, HELD_OUT_ROWS))
    train, held_out, their_train, their_held_out = parts
    for group, counts in differing.items():
        # Where one part is equal, the other was judged above.
        if whole and all(counts):
            one = np.concatenate([train.get(group, none), held_out.get(group, none)])
            other = np.concatenate([their_train.get(group, none), their_held_out.get(group, none)])
            if 0 < (count := _count_differing(one, other)) < enough:
                return count, f"rows {group}"
    return None


def _of_part(keys: Keys, part: str) -> Keys:
    return {name.removeprefix(f"{part} "): own for name, own in keys.items() if name.startswith(f"{part} ")}


def _count_differing(first: KeyArray, second: KeyArray) -> int:
    """Return the size of the symmetric difference of two multisets."""
    if np.array_equal(first, second):
        return 0
    _, values = np.unique(np.concatenate([first, second]), return_inverse=True)
    signs = np.repeat([1.0, -1.0], [len(first), len(second)])
    return int(np.abs(np.bincount(values, weights=signs)).sum())
