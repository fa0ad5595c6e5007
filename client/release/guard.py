"""The guard: it removes rows before anything is computed from them, so that nothing rests on a few rows of a class.

It prevents accidents. It does not hide a row from someone who analyses the sums or heads of one site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedhead.data import BoolArray, IntArray
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.steps import Release, Step
from fedhead.tasks import Targets, Task

MIN_CLASS_COUNT = 5
MIN_ROWS = 20


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
class Guard(Step):
    """A site's own limits on what may be computed from few rows; 0 is no limit.

    Attributes:
        min_class_count: the least number of rows of a class that are trained on, or summed.
        min_rows: the least number of rows of the site.
        evaluate_few: whether a class may have fewer than `min_class_count` held-out rows, in either calibration half.
        plain_clusters: whether the site takes part in runs of the task `clusters` without secure summation.

    Raises:
        UserError: if one is negative.
    """

    min_class_count: int = MIN_CLASS_COUNT
    min_rows: int = MIN_ROWS
    evaluate_few: bool = True
    plain_clusters: bool = True

    def __post_init__(self) -> None:
        for name in ("min_class_count", "min_rows"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"The guard's {name} must be 0 (off) or more, not {value}.")

    def leave(self, payload: Payload, release: Release) -> Payload:
        """Refuse a reply that rests on fewer rows than the limits, from any computation; noise hides rows better."""
        private = release.manifest is not None and release.manifest.privacy is not None
        if release.manifest is not None and release.basis is not None:
            self.check(release.manifest)
        if release.basis is not None and not private:
            basis = release.basis()
            if basis.rows < self.min_rows or any(count < self.min_class_count for count in basis.classes.values()):
                raise FedheadError(f"{release.site} releases nothing about so few rows.")
        return payload

    def check(self, manifest: Manifest) -> None:
        """Refuse runs whose coordinator chooses which of the site's rows are summed together.

        Two clusterings whose boundaries enclose one row differ by this row, and a request contains many.

        Raises:
            FedheadError: if the run is one, in words that the site's engineer can act on.
        """
        if manifest.task == "clusters" and not (manifest.secure_sum or self.plain_clusters):
            raise FedheadError(
                "This site takes part in runs of the task 'clusters' only under secure summation (secure_sum = true "
                "under [privacy] in run.toml), because sums by clusters that a coordinator chooses can show single "
                "rows. If you trust the coordinator with the features of single rows, set plain_clusters = true under "
                "[limits] in site.toml."
            )

    def describe(self) -> str:
        if not (self.min_class_count or self.min_rows):
            return ""
        return (
            f"The guard withholds classes with fewer than {self.min_class_count} training rows at a site, and sites "
            f"with fewer than {self.min_rows} rows, before anything is computed."
        )

    def require_rows_for(self, width: int, plain: int, rows: int) -> None:
        """Check that a site has enough rows for sums of more features than its backbone has.

        Sums of `D` features of fewer than `D` rows can determine the rows, and a non-linear lift leaves no rotation of
        the features undetermined: `min_rows` grows in proportion.

        Args:
            width: the number of mapped features.
            plain: the number of the backbone's features.
            rows: the site's rows after the guard.

        Raises:
            FedheadError: if not. It tells no number of rows.
        """
        needed = math.ceil(self.min_rows * width / plain)
        if width > plain and rows < needed:
            raise FedheadError(
                f"This site's guard lets no sums of {width} features leave, because too few rows are here: of {plain} "
                f"features it asks for {self.min_rows} rows or more, and of {width} for {needed}. Take a smaller lift, "
                "or lower --min-rows at the site."
            )

    @property
    def refusal(self) -> str:
        """The sentence by which a site is withheld as a whole."""
        return (
            f"This site's guard lets nothing leave, because too few rows are here: it asks for {self.min_rows} or "
            f"more in all, of classes with {self.min_class_count} or more among the training rows. Add rows, or "
            "lower --min-rows or --min-class-count at the site."
        )

    @classmethod
    def off(cls) -> Self:
        """Return a guard that removes nothing."""
        return cls(0, 0)

    def allowed_rows(self, rows: IntArray, targets: Targets, held_out: BoolArray, task: Task) -> GuardedRows:
        """Remove the rows of classes with few rows, then all of them where few remain.

        What sites train on and sum decides: a class with too few training rows goes, its held-out rows with it. Of
        held-out rows no more than counts leave, unless they are summed too: see `summable`. A multi-label row stays
        if all its classes do, and if the rows without each class that it lacks are enough: their sum is what the
        class's sum leaves of the total. What remains is the largest such set.

        Args:
            rows: `[n]`, the site's row numbers.
            targets: `[n, ...]`, their targets.
            held_out: `[n]`, which of the rows are held out.
            task: names the groups that rows are in.
        """
        keep = self.largest(task.memberships(targets), ~held_out)
        refusal = ""
        if keep.sum() < self._fewest(np.array(len(rows))):
            keep[:] = False
            refusal = self.refusal
        return GuardedRows(
            train=rows[keep & ~held_out],
            held_out=rows[keep & held_out],
            counts=count_rows(targets[keep], task),
            withheld=count_rows(targets[~keep], task),
            refusal=refusal,
        )

    def count_allowed(
        self, owners: IntArray, targets: Targets, held_out: BoolArray, sites: int, task: Task
    ) -> IntArray:
        """Return `[sites]`, how many rows `allowed_rows` leaves of each of many sites; 0 of those that it refuses.

        Args:
            owners: `[n]`, of each row the number of its site.
            targets: `[n, ...]`, their targets.
            held_out: `[n]`, which of the rows are held out.
            sites: how many there are.
            task: names the groups that rows are in.
        """
        left = np.bincount(owners[self.largest(task.memberships(targets), ~held_out, owners)], minlength=sites)
        return np.where(left < self._fewest(np.bincount(owners, minlength=sites)), 0, left)

    def _fewest(self, rows: IntArray) -> IntArray:
        """Return how many rows must be left of sites that have so many."""
        return np.maximum(self.min_rows, np.minimum(rows, 1))

    def summable(self, rows: IntArray, targets: Targets, task: Task) -> IntArray:
        """Return those of a site's held-out rows that may be summed: not the rows of classes with few of them.

        Args:
            rows: `[n]`, row numbers that `allowed_rows` left.
            targets: `[n, ...]`, their targets.
            task: names the groups that rows are in.
        """
        return rows[self.largest(task.memberships(targets), np.ones(len(rows), dtype=np.bool_))]

    def largest(
        self, memberships: tuple[IntArray, IntArray], counted: BoolArray, owners: IntArray | None = None
    ) -> BoolArray:
        """Return which rows `[n]` are in the largest set without groups that have few of its `counted` rows `[n]`.

        With `owners` `[n]`, the sites of the rows, each site's groups are counted by themselves.
        """
        positions, groups = memberships
        if owners is not None and len(groups):
            groups = groups + (int(groups.max()) + 1) * owners[positions]
        keep = np.ones(len(counted), dtype=np.bool_)
        while True:
            counts = np.bincount(groups, weights=(keep & counted)[positions])
            thin = keep[positions] & (counts[groups] < self.min_class_count)
            if not thin.any():
                return keep
            keep[positions[thin]] = False


def count_rows(targets: Targets, task: Task) -> dict[str, int]:
    """Return the rows by class name; a multi-label row counts for each of its classes."""
    counts = task.count_rows(targets)[0].tolist()
    return {name: count for name, count in zip(task.counted, counts, strict=True) if count}
