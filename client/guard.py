"""What may leave the site, and the ledger of what did.

The guard removes rows before anything is computed from them, so that nothing that leaves rests on a few rows of a
class; the ledger names every release before it leaves. Both prevent accidents. Neither hides a row from someone who
works on what one site sends.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
from flwr.app import RecordDict
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.data import BoolArray, IntArray, KeyArray
from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, home, safe_name, write_atomically
from fedhead.messages import PAYLOAD, RECORD, payload_bytes

MIN_CLASS_COUNT = 5
MIN_ROWS = 20

Sums = Mapping[str, KeyArray]
"""The keys of the rows behind each sum that leaves, by what a person would call those rows."""


@dataclass(frozen=True)
class GuardedRows:
    """A site's rows after the guard.

    Attributes:
        train: the rows left to train on.
        held_out: the rows left to evaluate on.
        counts: how many rows are left, by class name; a multi-label row counts for each of its classes.
        withheld: how many are not, by class name. For the site's own eyes: these are the small numbers.
        refusal: why the whole site is withheld; empty if it is not. May travel: it tells no number of rows.
    """

    train: IntArray
    held_out: IntArray
    counts: Mapping[str, int]
    withheld: Mapping[str, int]
    refusal: str = ""

    @property
    def num_rows(self) -> int:
        """How many rows are left."""
        return len(self.train) + len(self.held_out)


@dataclass(frozen=True)
class Guard:
    """A site's own limits on what may be computed from few rows; 0 is no limit.

    Attributes:
        min_class_count: the least number of rows of a class that are trained on, or summed.
        min_rows: the least number of rows of the site.

    Raises:
        UserError: if one is negative.
    """

    min_class_count: int = MIN_CLASS_COUNT
    min_rows: int = MIN_ROWS

    def __post_init__(self) -> None:
        for name in ("min_class_count", "min_rows"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"The guard's {name} must be 0 (off) or more, not {value}.")

    @classmethod
    def off(cls) -> Self:
        """Return a guard that removes nothing."""
        return cls(0, 0)

    def allowed_rows(
        self, rows: IntArray, labels: IntArray, held_out: BoolArray, classes: Sequence[str]
    ) -> GuardedRows:
        """Remove the rows of classes with few rows, then all of them where few remain.

        What sites train on and sum decides: a class with too few training rows goes, its held-out rows with it. Of
        held-out rows no more than counts leave, unless they are summed too: see `summable`. A multi-label row stays
        if all its classes do, and if the rows without each class that it lacks are enough: their sum is what the
        class's sum leaves of the total. What remains is the largest such set.

        Args:
            rows: `[n]`, the site's row numbers.
            labels: `[n]` class numbers, or `[n, C]` of 0 and 1 for multi-label rows.
            held_out: `[n]`, which of the rows are held out.
            classes: the `C` class names.
        """
        keep = self._largest(labels, ~held_out)
        refusal = ""
        if keep.sum() < self._fewest(np.array(len(rows))):
            keep[:] = False
            refusal = (
                f"This site's guard lets nothing leave, because too few rows are here: it asks for {self.min_rows} or "
                f"more in all, of classes with {self.min_class_count} or more among the training rows. Add rows, or "
                "lower --min-rows or --min-class-count at the site."
            )
        return GuardedRows(
            train=rows[keep & ~held_out],
            held_out=rows[keep & held_out],
            counts=_count(labels[keep], classes),
            withheld=_count(labels[~keep], classes),
            refusal=refusal,
        )

    def count_allowed(self, owners: IntArray, labels: IntArray, held_out: BoolArray, sites: int) -> IntArray:
        """Return `[sites]`, how many rows `allowed_rows` leaves of each of many sites; 0 of those that it refuses.

        Args:
            owners: `[n]`, of each row the number of its site.
            labels: `[n]` class numbers, or `[n, C]` of 0 and 1 for multi-label rows.
            held_out: `[n]`, which of the rows are held out.
            sites: how many there are.
        """
        left = np.bincount(owners[self._largest(labels, ~held_out, owners)], minlength=sites)
        return np.where(left < self._fewest(np.bincount(owners, minlength=sites)), 0, left)

    def _fewest(self, rows: IntArray) -> IntArray:
        """Return how many rows must be left of sites that have so many."""
        return np.maximum(self.min_rows, np.minimum(rows, 1))

    def summable(self, rows: IntArray, labels: IntArray) -> IntArray:
        """Return those of a site's held-out rows that may be summed: not the rows of classes with few of them.

        Args:
            rows: `[n]`, row numbers that `allowed_rows` left.
            labels: `[n]` class numbers, or `[n, C]` of 0 and 1 for multi-label rows.
        """
        return rows[self._largest(labels, np.ones(len(rows), dtype=np.bool_))]

    def _largest(self, labels: IntArray, counted: BoolArray, owners: IntArray | None = None) -> BoolArray:
        """Return which rows `[n]` are in the largest set without classes that have few of its `counted` rows.

        With `owners` `[n]`, the sites of the rows, each site's classes are counted by themselves.
        """
        positions, groups = _memberships(labels)
        if owners is not None and len(groups):
            groups = groups + (int(groups.max()) + 1) * owners[positions]
        keep = np.ones(len(labels), dtype=np.bool_)
        while True:
            counts = np.bincount(groups, weights=(keep & counted)[positions])
            thin = keep[positions] & (counts[groups] < self.min_class_count)
            if not thin.any():
                return keep
            keep[positions[thin]] = False


def released_sums(kind: str, rows: IntArray, keys: KeyArray, labels: IntArray, classes: Sequence[str]) -> Sums:
    """Name the rows behind each sum of statistics: of each class, and for multi-label rows of all without it.

    Args:
        kind: what the rows are, such as `training rows`.
        rows: `[n]`, what the statistics are of.
        keys: `[N]`, the identity of every row that `rows` may number.
        labels: `[N]` class numbers, or `[N, C]` of 0 and 1 for multi-label rows.
        classes: the `C` class names.
    """
    named = [f"of class {name!r}" for name in classes] + [f"not of class {name!r}" for name in classes]
    positions, groups = _memberships(labels[rows])
    order = groups.argsort(kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    parts = np.split(keys[rows[positions[order]]], starts[1:])
    return {f"{kind} {named[group]}": part for group, part in zip(present.tolist(), parts, strict=False)}


def _memberships(labels: IntArray) -> tuple[IntArray, IntArray]:
    """Return pairs of a row's position and a group it is in: its class; of multi-label rows also each class it lacks.

    Classes are the groups `0..C-1`, lacking them `C..2C-1`.
    """
    if labels.ndim == 1:
        return np.arange(len(labels)), labels
    positions, groups = np.nonzero(np.hstack([labels, 1 - labels]))
    return positions, groups


def _count(labels: IntArray, classes: Sequence[str]) -> dict[str, int]:
    _, groups = _memberships(labels)
    counts = np.bincount(groups, minlength=len(classes)).tolist()
    return {name: count for name, count in zip(classes, counts, strict=False) if count}


class Entry(BaseModel):
    """One release, as the ledger has it.

    Attributes:
        when: in UTC, just before it left.
        run: the id of the run that it left for.
        site: the site's name.
        action: the message that it answered.
        rows: how many rows it was computed from.
        classes: how many of each class.
        bytes: the payload's size.
        digest: the payload's SHA-256.
        row_set: the name of the file with the rows behind its sums; empty for other releases.
    """

    model_config = ConfigDict(frozen=True)

    when: AwareDatetime
    run: str
    site: str
    action: str
    rows: int
    classes: dict[str, int]
    bytes: int
    digest: str
    row_set: str = ""


class TooCloseError(FedheadError):
    """Sums differ from earlier ones by few rows; it says how many, which is for the site's own eyes."""


Approve = Callable[[Entry], None]
"""Sees an entry before it is written, and raises `FedheadError` if the release must not leave."""


class Ledger:
    """What left a site: a file of JSON lines that only grows, and beside it the rows behind released sums.

    Rows are kept as the keys that the site's feature store has of them: 8 bytes each, twice, for every distinct set
    of rows. They are not salted, since whoever can read them can read the features.

    Args:
        path: the file; its folder is made with the first release.
        min_class_count: the least number of rows of a class by which two releases of sums to one run may differ.
        approve: has the last word on each release.
    """

    def __init__(
        self, path: Path, min_class_count: int = MIN_CLASS_COUNT, approve: Approve = lambda entry: None
    ) -> None:
        self.path = path
        self.row_sets = path.with_suffix(".rows")
        self.min_class_count = min_class_count
        self.approve = approve

    def record(
        self,
        payload: bytes,
        *,
        run: str,
        site: str,
        action: str,
        rows: int,
        classes: Mapping[str, int],
        sums: Sums | None = None,
    ) -> Entry:
        """Enter a release; once this returns the entry is on disk, and the release may leave.

        Sums are refused if in any class they differ from an earlier release to the same run by a few rows, because the
        difference of the two is the sum of these few. The same rows may be released again.

        Args:
            payload: what leaves.
            run: the id of the run that it leaves for.
            site: the site's name.
            action: the message that it answers.
            rows: how many rows it was computed from.
            classes: how many of each class.
            sums: the rows behind each sum in it, where it is sums that can be subtracted.

        Raises:
            UserError: if the ledger may not be written.
            FedheadError: if sums are refused, the release is not approved, the ledger is damaged, or the disk is
                full. Nothing may leave then.
        """
        with disk_errors(self.path), self._locked() as handle:
            entry = Entry(
                when=datetime.now(UTC),
                run=run,
                site=site,
                action=action,
                rows=rows,
                classes=dict(classes),
                bytes=len(payload),
                digest=hashlib.sha256(payload).hexdigest(),
                row_set="" if sums is None else self._keep_rows(sums, run, site),
            )
            self.approve(entry)
            _append(handle, entry.model_dump_json().encode() + b"\n")
            _sync_folder(self.path.parent)
        return entry

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.fchmod(handle, 0o600)
            yield handle
        finally:
            os.close(handle)

    def _keep_rows(self, sums: Sums, run: str, site: str) -> str:
        """Check `sums` against earlier releases, keep their rows, and return the name they are kept under."""
        content = {name: np.sort(keys).astype("<u8") for name, keys in sorted(sums.items()) if len(keys)}
        row_set = _name_of(content)
        earlier = {e.row_set: e for e in read_ledger(self.path) if e.row_set and (e.run, e.site) == (run, site)}
        if row_set not in earlier:
            for entry in earlier.values():
                self._check_difference(content, entry)
        path = self.row_sets / row_set
        if not path.exists():
            self.row_sets.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, save(content))
            _sync_folder(self.row_sets)
        return row_set

    def _check_difference(self, sums: Sums, earlier: Entry) -> None:
        before = self._read_rows(earlier)
        none = np.empty(0, dtype=np.uint64)
        for name in sorted(sums.keys() | before.keys()):
            differing = _count_differing(sums.get(name, none), before.get(name, none))
            if 0 < differing < self.min_class_count:
                raise TooCloseError(
                    f"Nothing was sent: {differing} of the {name} differ from those {_told(earlier)}, and subtracting "
                    f"the two releases would lay bare what changed. None may differ, or {self.min_class_count} or more "
                    "(--min-class-count). Put the data back as it was, or release again when more rows have changed."
                )

    def _read_rows(self, entry: Entry) -> Sums:
        path = self.row_sets / entry.row_set
        try:
            content = load(path.read_bytes())
            whole = _name_of(content) == entry.row_set
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            raise FedheadError(
                f"Nothing was sent: {path}, the rows {_told(entry)}, is missing or damaged, so it cannot be told how "
                "many have changed since. Restore it from a backup, or put the data back as it was."
            )
        return content


def read_ledger(path: Path) -> list[Entry]:
    """Return what left, oldest first; what was being written when a process was killed did not leave.

    Raises:
        UserError: if there is no ledger, or it may not be read.
        FedheadError: if a line of it is damaged.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"There is no ledger {path}: nothing left this site, or it is kept elsewhere.") from None
    except OSError as error:
        raise UserError(f"The ledger {path} cannot be read: {error.strerror}.") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError:
            raise FedheadError(
                f"Line {number} of the ledger {path} is damaged or was changed by hand. Restore the file from a "
                "backup; sums leave this site again once the ledger can be read."
            ) from None
    return entries


def ledger_path(site: str) -> Path:
    """Return where the ledger of a site is kept: under its name, made safe for any file system."""
    return home() / "ledger" / f"{safe_name(site)}.jsonl"


def release(
    content: RecordDict,
    *,
    ledger: Ledger | None,
    run: str,
    site: str,
    action: str,
    rows: int = 0,
    classes: Mapping[str, int] | None = None,
    sums: Sums | None = None,
) -> RecordDict:
    """Enter a reply in the ledger, if there is one, and return it; nothing may come between this and sending.

    See `Ledger.record`.

    Raises:
        UserError: if the ledger may not be written.
        FedheadError: if the reply must not leave.
    """
    if ledger is not None:
        payload_bytes(content)  # Raises unless the blob is all that the reply carries.
        blob = content.config_records[RECORD][PAYLOAD]
        assert isinstance(blob, bytes)
        ledger.record(blob, run=run, site=site, action=action, rows=rows, classes=classes or {}, sums=sums)
    return content


def _told(entry: Entry) -> str:
    return f"released to run {entry.run} at {entry.when:%Y-%m-%d %H:%M:%S} UTC"


def _count_differing(first: KeyArray, second: KeyArray) -> int:
    """Return the size of the symmetric difference of two multisets."""
    _, values = np.unique(np.concatenate([first, second]), return_inverse=True)
    signs = np.repeat([1.0, -1.0], [len(first), len(second)])
    return int(np.abs(np.bincount(values, weights=signs)).sum())


def _name_of(sums: Sums) -> str:
    digest = hashlib.sha256()
    for name, keys in sorted(sums.items()):
        digest.update(f"{name!r} {len(keys)} ".encode())
        digest.update(keys.tobytes())
    return digest.hexdigest()


def _append(handle: int, line: bytes) -> None:
    """Write a line after the last whole one, and leave nothing of it if that fails."""
    end = _end_of_whole_lines(handle)
    os.ftruncate(handle, end)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise


def _end_of_whole_lines(handle: int) -> int:
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _sync_folder(path: Path) -> None:
    """Make the names of the files in a folder survive a power cut, as their contents do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
