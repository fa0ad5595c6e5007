"""The ledger: a file at the site that names every reply before it leaves."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from fedhead.client.release.guard import MIN_CLASS_COUNT
from fedhead.client.release.row_sets import Keys, RowSets, few_differing, name_of, sorted_keys
from fedhead.client.release.tuned import tuned_parameters, tunes
from fedhead.client.settings import RELEASES_PER_DAY
from fedhead.errors import FedheadError, UserError
from fedhead.files import BINARY, disk_errors, home, safe_name, sync_folder
from fedhead.locks import lock
from fedhead.protocol.messages import Payload
from fedhead.protocol.steps import Basis, Release, Step

logger = logging.getLogger(__name__)


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
        share: of its rows, the site held out so much.
        seed: of the run; it draws minibatches and projections.
        backbone: its spec.
        layer: of the backbone.
        weights: the digest of the backbone's weights.
        features: the form of the map of features; empty for the backbone's own. Sums of more features say more of rows.
        tuned: the layers of the backbone whose trained parameters it holds; empty for none.
        tuned_parameters: how many of these. They say more of rows than a head alone.
        row_set: the digest of the rows that releases rested on, the name of the file with them; empty for none.
        whole: whether these are all the training and held-out rows; else only those of one sum.
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
    share: float | None = None
    seed: int | None = None
    backbone: str = ""
    layer: str = ""
    weights: str = ""
    features: str = ""
    tuned: str = ""
    tuned_parameters: int = 0
    row_set: str = ""
    whole: bool = False


def entry_of(payload: Payload, release: Release) -> Entry:
    """Return the ledger's entry of a payload that is about to leave."""
    basis = Basis(0, {}) if release.basis is None else release.basis()
    manifest, tuned = release.manifest, tuned_parameters(payload)
    return Entry(
        when=datetime.now(UTC),
        run=release.run,
        site=release.site,
        action=release.action,
        rows=basis.rows,
        classes=dict(basis.classes),
        bytes=len(payload.blob),
        digest=hashlib.sha256(payload.blob).hexdigest(),
        share=basis.share,
        seed=None if manifest is None else manifest.seed,
        backbone="" if manifest is None else manifest.backbone,
        layer="" if manifest is None else manifest.layer,
        weights="" if manifest is None else manifest.weights_digest,
        features=release.features,
        tuned=tunes(manifest) if manifest is not None and tuned else "",
        tuned_parameters=tuned,
    )


class TooCloseError(FedheadError):
    """Rows differ from those of earlier releases by few; it says how many, which is for the site's own eyes."""


class _Index:
    """What the next release is compared with.

    Attributes:
        row_sets: an entry for each distinct set of rows, by its digest.
        day: the day of the latest release about rows, in UTC.
        released: how many releases about rows left on that day.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.row_sets: dict[str, Entry] = {}
        self.day: date | None = None
        self.released = 0
        for entry in entries:
            self.take(entry)

    def take(self, entry: Entry) -> None:
        """Take in the next entry."""
        if entry.row_set:
            self.row_sets.setdefault(entry.row_set, entry)
        if entry.rows:
            self.released = self.released + 1 if entry.when.date() == self.day else 1
            self.day = entry.when.date()


Note = Callable[[Entry], None]
"""Learns of an entry once it is on disk."""


class Ledger(Step):
    """What left a site: a file of JSON lines that only grows, and beside it the rows that releases rested on.

    Rows are kept as the keys that the site's feature store has of them: 8 bytes each, twice, for every distinct set
    of rows. They are not salted: a reader of the keys can read the features, too.

    Args:
        path: the file; its folder is made with the first release.
        min_class_count: the least number of rows of a class and part by which any two releases may differ.
        note: is called with each entry.
        budget: how many releases about its rows the site makes on one day, in UTC.
    """

    per_site = True

    def __init__(
        self,
        path: Path,
        min_class_count: int = MIN_CLASS_COUNT,
        note: Note = lambda entry: None,
        budget: int = RELEASES_PER_DAY,
    ) -> None:
        self.path = path
        self.row_sets = RowSets(path.with_suffix(".rows"))
        self.min_class_count = min_class_count
        self.note = note
        self.budget = budget
        self._index = _Index()
        self._read_at: tuple[int, ...] = ()
        self._latest: tuple[Keys, Keys, str] | None = None

    def leave(self, payload: Payload, release: Release) -> Payload:
        keys = None if release.basis is None else release.basis().keys
        try:
            self.record(entry_of(payload, release), None if keys is None else keys())
        except TooCloseError as error:
            logger.error("%s", error)
            raise FedheadError(
                "Its rows differ by too few from those of its earlier releases; the site's own log says how many."
            ) from None
        return payload

    def describe(self) -> str:
        return "Each site enters every reply in its own ledger before it leaves; fedhead ledger shows it there."

    def record(self, entry: Entry, keys: Keys | None = None) -> Entry:
        """Enter a release; once this returns the entry is on disk, and the release may leave.

        A release is refused if its rows differ from those of an earlier one, of any run, by a few rows of a class,
        because the difference of the two would be about these few. The same rows may be released again.

        Args:
            entry: the release.
            keys: the training and held-out rows that the site's releases rest on; None for a release about no rows.

        Returns:
            The entry as it is in the ledger.

        Raises:
            UserError: if the ledger may not be written.
            FedheadError: if the release is refused, the ledger is damaged, or the disk is full. Nothing may leave then.
        """
        with disk_errors(self.path), self._locked() as handle:
            if keys is not None:
                self._read(handle)
                self._check_budget(entry)
                entry = entry.model_copy(update={"row_set": self._keep_rows(keys), "whole": True})
            _append(handle, entry.model_dump_json().encode() + b"\n")
            sync_folder(self.path.parent)
            if keys is not None:
                self._index.take(entry)
                self._read_at = _stamp(handle)
        self.note(entry)
        return entry

    def _read(self, handle: int) -> None:
        """Read the ledger, unless nothing was written since but by this process."""
        if _stamp(handle) != self._read_at:
            self._index = _Index(read_ledger(self.path))

    def _check_budget(self, entry: Entry) -> None:
        if entry.when.date() == self._index.day and self._index.released >= self.budget:
            raise FedheadError(
                f"{entry.site} has made {self._index.released} releases about its rows today, as many as it makes in a "
                "day ([budget] releases_per_day in site.toml). It makes more after midnight, UTC."
            )

    @property
    def atoms(self) -> Path:
        """The file beside it that keeps the site's atoms."""
        return self.path.with_suffix(".atoms")

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o600)
        try:
            lock(handle)
            self.path.chmod(0o600)
            yield handle
        finally:
            os.close(handle)

    def _keep_rows(self, keys: Keys) -> str:
        """Check rows against all earlier releases, keep them, and return the name they are kept under."""
        if self._latest is None or self._latest[0] is not keys:
            content = sorted_keys(keys)
            self._latest = (keys, content, name_of(content))
        _, content, name = self._latest
        if name not in self._index.row_sets and self.min_class_count > 1:
            for earlier in self._index.row_sets.values():
                self._check_difference(content, earlier)
        self.row_sets.keep(name, content)
        return name

    def _check_difference(self, keys: Keys, earlier: Entry) -> None:
        before = self.row_sets.read(earlier.row_set)
        if few := few_differing(keys, before, self.min_class_count, whole=earlier.whole):
            raise TooCloseError(
                f"Nothing was sent: {few[0]} of the {few[1]} differ from those released to run {earlier.run} at "
                f"{earlier.when:%Y-%m-%d %H:%M:%S} UTC, and subtracting both releases would disclose the changed rows: "
                f"none may differ, or {self.min_class_count} or more (--min-class-count). Put the data back as it was, "
                "or release again when more rows have changed."
            )


def read_ledger(path: Path) -> list[Entry]:
    """Return the releases, oldest first; an incomplete last line was not released.

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
                "backup; releases leave this site again once the ledger can be read."
            ) from None
    return entries


def ledger_path(site: str) -> Path:
    """Return where the ledger of a site is kept: under its name, made safe for any file system."""
    return home() / "ledger" / f"{safe_name(site)}.jsonl"


def _stamp(handle: int) -> tuple[int, ...]:
    """Return a value that changes whenever a file is written or replaced."""
    about = os.fstat(handle)
    return about.st_ino, about.st_size, about.st_mtime_ns


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
        os.lseek(handle, start, os.SEEK_SET)
        newline = os.read(handle, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
