"""The sites' sums that a run keeps, so that sites can join and leave it later."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedhead.backbones.digests import digest_tensors
from fedhead.errors import UserError
from fedhead.files import disk_errors, safe_name, write_atomically
from fedhead.server.exact_sum import ExactSum, padded
from fedhead.sums.features import FeatureStatistics

Part = Literal["train", "held_out"]
"""Which of a site's rows were summed: those it trains on, or those held out that may be summed."""

PARTS: tuple[Part, ...] = ("train", "held_out")

Keep = Literal["folder", "none"]
"""Whether each site's own sums are kept, or only their total."""

Parts = Mapping[Part, FeatureStatistics]

_INDEX = "sites.jsonl"


class Record(BaseModel):
    """A record of a site's sums, kept even if the sums are not.

    Attributes:
        site: the name of the site.
        part: the rows that were summed.
        rows: their number; of items, if sums are over their places.
        classes: the number of classes, without those that the run learned later.
        digest: SHA-256 of the sums' tensors, which identifies the site's own sums.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    part: Part
    rows: int
    classes: int
    digest: str


Records = Mapping[str, Mapping[Part, Record]]
"""The records of each site's parts."""


class _Header(BaseModel):
    """The first line of the index; the other lines are records, and a later record replaces an earlier one.

    Attributes:
        keep: see `Keep`.
        pool: the file of each part's pooled sums, if sites' own are not kept.
        pending: a change whose consequences outside this folder may not be complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: Keep
    pool: dict[Part, str] = {}
    pending: dict[str, Any] | None = None


@dataclass(frozen=True)
class Draft:
    """A change that has been computed and not written yet.

    Attributes:
        records: records of the sites after the change.
        pools: the total of their sums.
        files: contents of the files to write, by name.
        pool: the file of each part's pooled sums, if these are kept.
    """

    records: Records
    pools: Parts
    files: Mapping[str, FeatureStatistics | ExactSum] = field(default_factory=dict)
    pool: Mapping[Part, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows in the sums; of items, if sums are over their places."""
        return sum(stats.independent for stats in self.pools.values())


class SiteSums:
    """A folder of statistics, readable by its owner only, with an index of the sites.

    The index alone decides which sites are members: a change writes new files first, then replaces the index, then
    removes the files that the index does not name. A process that is killed leaves the old state or the new one.

    Args:
        path: the folder; it is made with the first site.
        keep: whether a run keeps each site's sums, or only pools them; ignored if the folder has an index.
    """

    def __init__(self, path: Path, keep: Keep = "folder") -> None:
        self.path = path
        self._keep: Keep = keep
        self._pools: dict[Part, ExactSum] = {}

    @property
    def keep(self) -> Keep:
        """Whether each site's sums are kept."""
        return self._read()[0].keep if self.exists() else self._keep

    @property
    def pending(self) -> dict[str, Any] | None:
        """The description of a change that has not been settled."""
        return self._read()[0].pending

    def exists(self) -> bool:
        """Return whether there is an index."""
        return (self.path / _INDEX).is_file()

    def save(self, site: str, part: Part, stats: FeatureStatistics) -> None:
        """Keep a site's sums, or fold them into the pool and keep their digest; call `finish` after the last.

        Raises:
            ValueError: if they cannot be added to those of the other sites.
            UserError: if they may not be written.
            FedheadError: if the disk is full.
        """
        with disk_errors(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._keep == "folder":
            stats.save(self._file(site, part))
        elif part in self._pools:
            self._pools[part].add(stats)
        else:
            self._pools[part] = ExactSum(stats.copy())
        with disk_errors(self.path):
            if not self.exists():
                write_atomically(self.path / _INDEX, _Header(keep=self._keep).model_dump_json() + "\n")
            with (self.path / _INDEX).open("a", encoding="utf-8") as file:
                file.write(_record(site, part, stats).model_dump_json() + "\n")

    def finish(self) -> None:
        """Make the saved sums durable: write the pool, if only the pool is kept, and the index.

        Raises:
            UserError: if they may not be written.
            FedheadError: if the disk is full.
        """
        if self.exists():
            header, records = self._read()
            pool = {**header.pool, **self._write_pools(self._pools)}
            self._write_index(header.model_copy(update={"pool": pool}), records)

    def clear(self) -> None:
        """Remove everything, before a run starts again."""
        self._pools = {}
        with disk_errors(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)

    def beside(self, name: str) -> "SiteSums":
        """Return a folder beside this one, kept likewise."""
        return SiteSums(self.path.with_name(f"{self.path.name}.{name}"), self._keep)

    def replace(self, other: "SiteSums") -> None:
        """Take the place of this folder's content by another's, which is gone then."""
        self.clear()
        with disk_errors(self.path):
            if other.path.exists():
                other.path.rename(self.path)
        self._pools, other._pools = other._pools, {}

    def remove(self, sites: Collection[str]) -> None:
        """Remove sites from a run that has not finished, if each site's sums are kept.

        Raises:
            UserError: if a file may not be written.
        """
        header, records = self._read()
        self._write_index(header, {site: parts for site, parts in records.items() if site not in sites})
        self.sweep()

    def sites(self) -> list[str]:
        """Return the names of the member sites, in order."""
        return sorted(self.records())

    def records(self) -> Records:
        """Return the records of each site's sums."""
        return self._read()[1] if self.exists() else {}

    def load(self, site: str, part: Part) -> FeatureStatistics | None:
        """Return a site's sums; None if they are not kept, or there are none of this part.

        Raises:
            UserError: if the file is damaged.
        """
        path = self._file(site, part)
        return FeatureStatistics.load(path) if path.is_file() else None

    def read(self, site: str, part: Part) -> FeatureStatistics:
        """Return a member's kept sums.

        Raises:
            UserError: if the file is missing or damaged.
        """
        return FeatureStatistics.load(self._file(site, part))

    def origin(self) -> Tensor:
        """Return `[d]`, the origin of all sums.

        Raises:
            UserError: if no sums are here, or they are damaged.
        """
        header, records = self._read()
        if header.keep == "none":
            return self._load_pool(header, "train").value.origin
        return self.read(min(records), "train").origin

    def pools(self, num_classes: int) -> Parts:
        """Return the total of the member sites' sums, over `num_classes` classes.

        Raises:
            UserError: if a file is missing, damaged or of more classes.
        """
        header, records = self._read()
        if header.keep == "none":
            return {part: padded(self._load_pool(header, part).value, num_classes) for part in header.pool}
        return self._added(records, {}, num_classes)

    def pools_of(self, sites: Collection[str], num_classes: int) -> Parts:
        """Return the total of some sites' sums, if each site's own are kept.

        Raises:
            UserError: if a file is missing, damaged or of more classes.
        """
        records = {site: parts for site, parts in self.records().items() if site in sites}
        return self._added(records, {}, num_classes)

    def joined(self, site: str, parts: Parts, num_classes: int) -> Draft:
        """Compute the state after a site joins.

        Args:
            site: the name of a site that is not a member.
            parts: its sums.
            num_classes: of the run afterwards; at least as many as before.

        Raises:
            ValueError: if its sums cannot be added to those of the other sites.
            UserError: if a file is missing or damaged.
        """
        header, before = self._read()
        records = {**before, site: {part: _record(site, part, stats) for part, stats in parts.items()}}
        if header.keep == "folder":
            pools = self._added(records, {site: parts}, num_classes)
            files = {self._file(site, part).name: stats for part, stats in parts.items()}
            return Draft(records, pools, files)
        exact: dict[Part, ExactSum] = {part: self._load_pool(header, part) for part in header.pool}
        for part, pool in exact.items():
            pool.extend(num_classes)
            if part in parts:
                pool.add(padded(parts[part].copy(), num_classes))
        return _pooled(records, exact)

    def left(self, site: str, parts: Parts, num_classes: int) -> Draft:
        """Compute the state after a site leaves.

        If sites' own sums are kept, those of the remaining sites are added again, so that nothing of the leaving site
        remains, not even in the rounding.

        Args:
            site: the name of a member.
            parts: its sums, if they are not kept.
            num_classes: of the run.

        Raises:
            ValueError: if its sums cannot be subtracted from the pool.
            UserError: if a file is missing or damaged.
        """
        header, before = self._read()
        records = {name: record for name, record in before.items() if name != site}
        if header.keep == "folder":
            return Draft(records, self._added(records, {}, num_classes))
        exact: dict[Part, ExactSum] = {part: self._load_pool(header, part) for part in header.pool}
        for part, pool in exact.items():
            pool.extend(num_classes)
            if part in parts:
                pool.subtract(padded(parts[part].copy(), num_classes))
        return _pooled(records, exact)

    def commit(self, draft: Draft, pending: Mapping[str, Any]) -> None:
        """Make a draft the state of this folder: all of it, or nothing.

        Args:
            draft: the result of `joined` or `left`.
            pending: a description of the change, kept until `settle` is called.

        Raises:
            UserError: if a file may not be written.
            FedheadError: if the disk is full.
        """
        for name, sums in draft.files.items():
            sums.save(self.path / name)
        header = _Header(keep=self.keep, pool=dict(draft.pool), pending=dict(pending))
        self._write_index(header, draft.records)
        self.sweep()

    def settle(self) -> None:
        """Note that all consequences of the last change are written."""
        header, records = self._read()
        self._write_index(header.model_copy(update={"pending": None}), records)

    def sweep(self) -> None:
        """Remove sums that the index does not name: those of sites that left, and of interrupted changes."""
        header, records = self._read()
        kept = {_INDEX, *header.pool.values()}
        if header.keep == "folder":
            kept |= {self._file(site, part).name for site, parts in records.items() for part in parts}
        with disk_errors(self.path):
            for file in self.path.iterdir():
                if file.name not in kept and (file.suffix == ".safetensors" or file.name.startswith(".")):
                    file.unlink()

    def _added(self, records: Records, given: Mapping[str, Parts], num_classes: int) -> Parts:
        """Add all sites' sums in the order of their names; those not `given` are loaded one at a time."""
        pools: dict[Part, FeatureStatistics] = {}
        for site in sorted(records):
            for part in records[site]:
                stats = given[site][part].copy() if site in given else self.read(site, part)
                stats = padded(stats, num_classes)
                if part in pools:
                    pools[part] += stats
                else:
                    pools[part] = stats
        return pools

    def _load_pool(self, header: _Header, part: Part) -> ExactSum:
        if part not in header.pool:
            raise UserError(f"The pooled sums are missing from {self.path}: the run did not finish.")
        return ExactSum.load(self.path / header.pool[part])

    def _write_pools(self, pools: Mapping[Part, ExactSum]) -> dict[Part, str]:
        for part, pool in pools.items():
            pool.save(self.path / _pool_file(part, pool))
        return {part: _pool_file(part, pool) for part, pool in pools.items()}

    def _file(self, site: str, part: str) -> Path:
        return self.path / f"{safe_name(site)}.{part}.safetensors"

    def _write_index(self, header: _Header, records: Records) -> None:
        lines = [header, *(record for site in sorted(records) for record in records[site].values())]
        write_atomically(self.path / _INDEX, "".join(line.model_dump_json() + "\n" for line in lines))

    def _read(self) -> tuple[_Header, dict[str, dict[Part, Record]]]:
        path = self.path / _INDEX
        try:
            # A killed process may leave an incomplete last line.
            first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            header = _Header.model_validate_json(first)
            found = [Record.model_validate_json(line) for line in lines]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UserError(f"{path} is damaged: {detail}. Restore it from a backup.") from None
        records: dict[str, dict[Part, Record]] = {}
        for record in found:
            records.setdefault(record.site, {})[record.part] = record
        return header, records


def digest_of(stats: FeatureStatistics) -> str:
    """Return the SHA-256 of a site's sums, as in its record."""
    return digest_tensors(stats.to_tensors())


def _record(site: str, part: Part, stats: FeatureStatistics) -> Record:
    return Record(site=site, part=part, rows=stats.independent, classes=stats.num_classes, digest=digest_of(stats))


def _pooled(records: Records, exact: Mapping[Part, ExactSum]) -> Draft:
    names = {part: _pool_file(part, pool) for part, pool in exact.items()}
    pools = {part: pool.value for part, pool in exact.items()}
    return Draft(records, pools, {names[part]: pool for part, pool in exact.items()}, names)


def _pool_file(part: Part, pool: ExactSum) -> str:
    return f"pool.{part}.{pool.digest[:12]}.safetensors"
