"""What a run keeps of its sites' sums, so that sites can join and leave it later."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedhead.backbones.backbone import digest_tensors
from fedhead.errors import UserError
from fedhead.files import disk_errors, safe_name, write_atomically
from fedhead.statistics import FeatureStatistics

Part = Literal["train", "held_out"]
"""Which of a site's rows were summed: those it trains on, or those held out that may be summed."""

PARTS: tuple[Part, ...] = ("train", "held_out")

Keep = Literal["folder", "none"]
"""Whether each site's own sums are kept, or nothing but what all of them add up to."""

Parts = Mapping[Part, FeatureStatistics]

_INDEX = "sites.jsonl"
_POOL_FORMAT = "fedhead.pool 1"
_ROUNDED = ("sums", "total", "upper")


class Record(BaseModel):
    """What is known of a site's sums even where they are not kept.

    Attributes:
        site: whose they are.
        part: of which of its rows.
        rows: of how many.
        classes: how many classes they tell apart; a class that the run learned later is none of them.
        digest: SHA-256 of the sums' tensors, by which the site's own are known again.
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
    """The first line of the index; the others are records, of which a later one replaces an earlier one.

    Attributes:
        keep: see `Keep`.
        pool: the file of each part's pooled sums, where sites' own are not kept.
        pending: a change whose consequences outside this folder may not all be written yet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: Keep
    pool: dict[Part, str] = {}
    pending: dict[str, Any] | None = None


@dataclass(frozen=True)
class Draft:
    """A change that is worked out and not written yet.

    Attributes:
        records: of the sites that are in afterwards.
        pools: what their sums add up to.
        files: what is to be written, by name.
        pool: the file of each part's pooled sums, where these are kept.
    """

    records: Records
    pools: Parts
    files: Mapping[str, "FeatureStatistics | ExactSum"] = field(default_factory=dict)
    pool: Mapping[Part, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows are summed."""
        return sum(stats.rows for stats in self.pools.values())


class SiteSums:
    """A folder of statistics that none but its owner may read, and an index of the sites they are of.

    The index alone says who is in: a change writes new files first, then replaces the index, then removes the files
    that it no longer names, so whatever is killed leaves the old state or the new.

    Args:
        path: the folder; it is made with the first site.
        keep: whether a run keeps each site's sums, or only pools them; of a folder that is there the index tells.
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
        """What was said of a change that `settle` was not called after."""
        return self._read()[0].pending

    def exists(self) -> bool:
        """Tell whether there is an index."""
        return (self.path / _INDEX).is_file()

    def save(self, site: str, part: Part, stats: FeatureStatistics) -> None:
        """Keep a site's sums, or fold them into the pool and keep their digest; call `finish` after the last.

        Raises:
            ValueError: if they do not add to the others'.
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
            with (self.path / _INDEX).open("a") as file:
                file.write(_record(site, part, stats).model_dump_json() + "\n")

    def finish(self) -> None:
        """Make what was saved last: write the pool, where that is what is kept, and the index anew.

        Raises:
            UserError: if they may not be written.
            FedheadError: if the disk is full.
        """
        if self.exists():
            header, records = self._read()
            pool = {**header.pool, **self._write_pools(self._pools)}
            self._write_index(header.model_copy(update={"pool": pool}), records)

    def clear(self) -> None:
        """Remove everything, as of a run that starts again."""
        self._pools = {}
        with disk_errors(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)

    def sites(self) -> list[str]:
        """Return the names of the sites that are in, in order."""
        return sorted(self.records())

    def records(self) -> Records:
        """Return what is known of each site's sums."""
        return self._read()[1] if self.exists() else {}

    def load(self, site: str, part: Part) -> FeatureStatistics | None:
        """Return a site's sums; None if they are not kept, or there are none of this part.

        Raises:
            UserError: if the file is damaged.
        """
        path = self._file(site, part)
        return FeatureStatistics.load(path) if path.is_file() else None

    def origin(self) -> Tensor:
        """Return `[d]`, what all sums are about.

        Raises:
            UserError: if no sums are here, or they are damaged.
        """
        header, records = self._read()
        if header.keep == "none":
            return self._load_pool(header, "train").value.origin
        return self._load_kept(min(records), "train").origin

    def pools(self, num_classes: int) -> Parts:
        """Return what the sums of the sites that are in add up to, over `num_classes` classes.

        Raises:
            UserError: if a file is missing, damaged or of more classes.
        """
        header, records = self._read()
        if header.keep == "none":
            return {part: _padded(self._load_pool(header, part).value, num_classes) for part in header.pool}
        return self._added(records, {}, num_classes)

    def joined(self, site: str, parts: Parts, num_classes: int) -> Draft:
        """Work out what a site's sums change.

        Args:
            site: one that is not in.
            parts: its sums.
            num_classes: of the run afterwards: what it had, or more.

        Raises:
            ValueError: if its sums do not add to the others'.
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
                pool.add(_padded(parts[part].copy(), num_classes))
        return _pooled(records, exact)

    def left(self, site: str, parts: Parts, num_classes: int) -> Draft:
        """Work out what remains without a site.

        Where sites' own sums are kept, those of the others are added up: nothing of the one that leaves can be left
        behind, not even in the rounding.

        Args:
            site: one that is in.
            parts: its sums, where they are not kept.
            num_classes: of the run.

        Raises:
            ValueError: if its sums cannot be taken from the pool.
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
                pool.subtract(_padded(parts[part].copy(), num_classes))
        return _pooled(records, exact)

    def commit(self, draft: Draft, pending: Mapping[str, Any]) -> None:
        """Make a draft the state of this folder: all of it, or nothing.

        Args:
            draft: what `joined` or `left` returned.
            pending: what is to be known of the change until `settle` is called.

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
        """Say that all consequences of the last change are written."""
        header, records = self._read()
        self._write_index(header.model_copy(update={"pending": None}), records)

    def sweep(self) -> None:
        """Remove the sums that the index does not name: of sites that left, and of changes that were killed."""
        header, records = self._read()
        kept = {_INDEX, *header.pool.values()}
        if header.keep == "folder":
            kept |= {self._file(site, part).name for site, parts in records.items() for part in parts}
        with disk_errors(self.path):
            for file in self.path.iterdir():
                if file.name not in kept and (file.suffix == ".safetensors" or file.name.startswith(".")):
                    file.unlink()

    def _added(self, records: Records, given: Mapping[str, Parts], num_classes: int) -> Parts:
        """Add up all sites' sums, in the order of their names; those not `given` are loaded one at a time."""
        pools: dict[Part, FeatureStatistics] = {}
        for site in sorted(records):
            for part in records[site]:
                stats = given[site][part].copy() if site in given else self._load_kept(site, part)
                stats = _padded(stats, num_classes)
                if part in pools:
                    pools[part] += stats
                else:
                    pools[part] = stats
        return pools

    def _load_kept(self, site: str, part: Part) -> FeatureStatistics:
        return FeatureStatistics.load(self._file(site, part))

    def _load_pool(self, header: _Header, part: Part) -> "ExactSum":
        if part not in header.pool:
            raise UserError(f"The pooled sums are missing from {self.path}: the run did not finish.")
        return ExactSum.load(self.path / header.pool[part])

    def _write_pools(self, pools: Mapping[Part, "ExactSum"]) -> dict[Part, str]:
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
            # What follows the last end of a line was being written when a process was killed.
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


class ExactSum:
    """A sum of statistics from which each can be taken away again as if it had never been there.

    What rounding cuts off is summed beside it (Knuth's two-sum), so that equal terms cancel to the last bit. In
    float64 alone a site with large values leaves its rounding errors behind, and where a feature is constant in all
    other rows, heads are made of such errors.

    Attributes:
        value: the sum.
        low: by name, what its tensors lack of the exact ones.
    """

    def __init__(self, value: FeatureStatistics, low: Mapping[str, Tensor] | None = None) -> None:
        self.value = value
        self.low = dict(low or {name: torch.zeros_like(getattr(value, name)) for name in _ROUNDED})

    def add(self, stats: FeatureStatistics) -> None:
        """Add statistics.

        Raises:
            ValueError: if sizes, kind or origin differ.
        """
        self._fold(self.value + stats, stats, 1.0)

    def subtract(self, stats: FeatureStatistics) -> None:
        """Take statistics away.

        Raises:
            ValueError: if sizes, kind or origin differ, or they have more rows of a class.
        """
        self._fold(self.value - stats, stats, -1.0)

    def extend(self, num_classes: int) -> None:
        """Append classes without rows, up to `num_classes`.

        Raises:
            UserError: if there are more.
        """
        _padded(self.value, num_classes)
        missing = num_classes - len(self.low["sums"])
        self.low["sums"] = torch.cat([self.low["sums"], self.low["sums"].new_zeros(missing, self.value.num_features)])

    def _fold(self, result: FeatureStatistics, stats: FeatureStatistics, sign: float) -> None:
        """Take `result`'s counts, and put in sums that are exact to rounding."""
        for name in _ROUNDED:
            high, error = _two_sum(getattr(self.value, name), sign * getattr(stats, name))
            high, self.low[name] = _two_sum(high, self.low[name] + error)
            setattr(result, name, high)
        nothing = result.counts == 0
        result.sums[nothing] = self.low["sums"][nothing] = 0
        result.upper.diagonal().clamp_(min=0)
        if result.rows == 0:
            for name in _ROUNDED:
                getattr(result, name).zero_()
                self.low[name].zero_()
        self.value = result

    def _to_tensors(self) -> dict[str, Tensor]:
        low = {f"low.{name}": tensor for name, tensor in self.low.items()}
        return {**self.value.to_tensors(), **low, "low.upper": self.low["upper"][_triangle(self.value.num_features)]}

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return digest_tensors(self._to_tensors())

    def save(self, path: Path) -> None:
        """Write a safetensors file: the whole of it is there, or what was before.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        write_atomically(path, to_bytes(self._to_tensors(), {"format": _POOL_FORMAT, "sha256": self.digest}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, bit for bit.

        Raises:
            UserError: if the file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"There are no pooled sums at {path}.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"The pooled sums at {path} cannot be read: {error}.") from error
        if metadata.get("format") != _POOL_FORMAT or metadata.get("sha256") != digest_tensors(tensors):
            raise UserError(f"The pooled sums at {path} are damaged, or none that this version reads.")
        low = {name: tensors.pop(f"low.{name}") for name in _ROUNDED}
        try:
            value = FeatureStatistics.from_tensors(tensors)
        except ValueError as error:
            raise UserError(f"The pooled sums at {path} are damaged: {error}") from error
        upper = torch.zeros_like(value.upper)
        upper[_triangle(value.num_features)] = low["upper"]
        return cls(value, {**low, "upper": upper})


def digest_of(stats: FeatureStatistics) -> str:
    """Return the SHA-256 of a site's sums, as its record has it."""
    return digest_tensors(stats.to_tensors())


def _record(site: str, part: Part, stats: FeatureStatistics) -> Record:
    return Record(site=site, part=part, rows=stats.rows, classes=stats.num_classes, digest=digest_of(stats))


def _pooled(records: Records, exact: Mapping[Part, ExactSum]) -> Draft:
    names = {part: _pool_file(part, pool) for part, pool in exact.items()}
    pools = {part: pool.value for part, pool in exact.items()}
    return Draft(records, pools, {names[part]: pool for part, pool in exact.items()}, names)


def _pool_file(part: Part, pool: ExactSum) -> str:
    return f"pool.{part}.{pool.digest[:12]}.safetensors"


def _padded(stats: FeatureStatistics, num_classes: int) -> FeatureStatistics:
    """Append classes without rows in place, up to `num_classes`."""
    if stats.num_classes > num_classes:
        raise UserError(f"Sums of {stats.num_classes} classes are none of this run's, which has {num_classes}.")
    while stats.num_classes < num_classes:
        stats.add_class()
    return stats


def _two_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of two tensors, and what rounding cut off, exactly (Knuth, TAOCP 2, 4.2.2)."""
    total = first + second
    back = total - first
    return total, (first - (total - back)) + (second - back)


def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu_()
