"""A change of a finished run's sites, as the run folder records it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedhead.heads import Head
from fedhead.server.site_sums import PARTS, Part, Parts
from fedhead.sums.features import FeatureStatistics
from fedhead.tasks import Task


@dataclass(frozen=True, eq=False)
class MembershipChange:
    """What became of a run when a site joined or left.

    Attributes:
        run_dir: the run folder.
        action: `join`, `leave` or `add-class`.
        site: the site's name.
        when: in UTC.
        rows: how many of the site's rows were summed.
        digests: of its sums, by part.
        sites: the names of those that are in now.
        rows_before: how many rows were summed before, of all sites.
        rows_after: how many are now.
        classes: the names of the model's classes now.
        classes_added: those among them that are new.
        head: the delivered head, for unmapped features, in float64.
        head_spec: its spec for `make_head`.
        method: its solver.
        statistics: the sums that it was solved from.
        all_rows: whether these are all rows, held-out ones included; else the training rows.
        accuracy: the score of the head solved without held-out rows, on the site's own; None if none are here.
        accuracy_before: the same of the model before, if it knew all the classes.
        task: the run's task, which names the score and the classes.
        rows_held_out: how many rows these two were measured on.
        withheld: how many of the site's rows its guard withheld. For the site's own eyes.
        skipped: how many of its rows could not be read.
        notes: sentences on the limits of the change.
    """

    run_dir: Path
    action: str
    site: str
    when: datetime
    rows: int
    digests: Mapping[Part, str]
    sites: tuple[str, ...]
    rows_before: int
    rows_after: int
    classes: tuple[str, ...]
    classes_added: tuple[str, ...]
    head: Head
    head_spec: str
    method: str
    statistics: FeatureStatistics
    all_rows: bool
    accuracy: float | None
    accuracy_before: float | None
    task: Task
    rows_held_out: int
    withheld: int
    skipped: int
    notes: tuple[str, ...]

    @property
    def score_name(self) -> str:
        """The name of the score, such as `accuracy`."""
        return self.task.score_name

    def record(self) -> dict[str, Any]:
        """Return the line that the run folder keeps: nothing that is for the site's own eyes."""
        return {
            "when": self.when.isoformat(),
            "action": self.action,
            "site": self.site,
            "rows": self.rows,
            "digests": dict(self.digests),
            "sites": len(self.sites),
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "classes_added": list(self.classes_added),
            "head": self.head_spec,
            "method": self.method,
            "all_rows": self.all_rows,
            self.score_name: self.accuracy,
            f"{self.score_name}_before": self.accuracy_before,
            "score_name": self.score_name,
            "rows_held_out": self.rows_held_out,
        }

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            **self.record(),
            "sites": list(self.sites),
            "classes": list(self.task.shown(self.classes)),
            "rows_withheld": self.withheld,
            "rows_skipped": self.skipped,
            "notes": list(self.notes),
            "run_dir": str(self.run_dir),
        }


@dataclass(frozen=True)
class Measured:
    """The scores of heads on a site's held-out rows.

    Attributes:
        accuracy: the score of the head solved without held-out rows.
        accuracy_before: the score of the model before the change.
        rows: the number of held-out rows.
    """

    accuracy: float | None = None
    accuracy_before: float | None = None
    rows: int = 0


def total(pools: Parts) -> FeatureStatistics:
    """Return the sum of all parts."""
    first, *others = (pools[part] for part in PARTS if part in pools)
    return sum(others, start=first.copy())


def has_contrast(stats: FeatureStatistics) -> bool:
    """Return whether a head can be solved: some class has some of the rows and not all, or every target varies."""
    if stats.kind.real:
        return stats.rows > 1 and bool((stats.target_scatter() > 0).all())
    return bool(((stats.counts > 0) & (stats.counts < stats.rows)).any())
