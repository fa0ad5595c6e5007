"""The guard: it removes rows before anything is computed from them, so that nothing rests on a few rows of a class.

Where the data has groups, such as patients, it counts these in place of rows: a class with five rows of one patient is
about one person. It prevents accidents. It does not hide a row from someone who analyses the sums or heads of one site.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedhead.data import BoolArray, IntArray, KeyArray, Samples
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
        count: counts the rows by class name, those that are left or the others; a multi-label row counts for each of
            its classes.
        refusal: why the whole site is withheld; empty if it is not. May travel: it contains no number of rows.
    """

    train: IntArray
    held_out: IntArray
    count: Callable[[bool], Mapping[str, int]]
    refusal: str = ""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many rows are left, by class name."""
        return self.count(True)

    @property
    def withheld(self) -> Mapping[str, int]:
        """How many rows are not left, by class name. For the site's own eyes: these are the small numbers."""
        return self.count(False)

    @property
    def num_rows(self) -> int:
        """How many rows are left."""
        return len(self.train) + len(self.held_out)


@dataclass(frozen=True)
class Guard(Step):
    """A site's own limits on what may be computed from few rows; 0 is no limit.

    Attributes:
        min_class_count: the least number of rows of a class that are trained on, or summed; of groups, where rows have
            them.
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
            FedheadError: if not. The message contains no number of rows.
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

    def allowed_rows(
        self, rows: IntArray, targets: Targets, held_out: BoolArray, task: Task, people: IntArray | None = None
    ) -> GuardedRows:
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
            people: `[n]`, see `people_of`.
        """
        keep = self.largest(task.memberships(targets), ~held_out, people=people)
        refusal = ""
        if keep.sum() < self._fewest(np.array(len(rows))):
            keep[:] = False
            refusal = self.refusal
        return GuardedRows(
            train=rows[keep & ~held_out],
            held_out=rows[keep & held_out],
            count=lambda left: count_rows(targets[keep == left], task),
            refusal=refusal,
        )

    def count_allowed(
        self,
        owners: IntArray,
        targets: Targets,
        held_out: BoolArray,
        sites: int,
        task: Task,
        people: IntArray | None = None,
    ) -> IntArray:
        """Return `[sites]`, how many rows `allowed_rows` leaves of each of many sites; 0 of those that it refuses.

        Args:
            owners: `[n]`, of each row the number of its site.
            targets: `[n, ...]`, their targets.
            held_out: `[n]`, which of the rows are held out.
            sites: how many there are.
            task: names the groups that rows are in.
            people: `[n]`, see `people_of`.
        """
        kept = self.largest(task.memberships(targets), ~held_out, owners, people)
        left = np.bincount(owners[kept], minlength=sites)
        return np.where(left < self._fewest(np.bincount(owners, minlength=sites)), 0, left)

    def _fewest(self, rows: IntArray) -> IntArray:
        """Return how many rows must be left of sites that have so many."""
        return np.maximum(self.min_rows, np.minimum(rows, 1))

    def summable(
        self,
        rows: IntArray,
        targets: Targets,
        task: Task,
        people: IntArray | None = None,
        labels: Targets | None = None,
    ) -> IntArray:
        """Return those of a site's held-out rows that may be summed: not the rows of classes with few of them.

        The classes are those of the run and, whatever its task, those of the site's own labels: sums without classes
        less the sums of all classes would otherwise be the sums of these few rows. Where rows have no labels that every
        run would know, the rows that are left out are themselves enough, for the same reason.

        Args:
            rows: `[n]`, row numbers that `allowed_rows` left.
            targets: `[n, ...]`, their targets.
            task: names the groups that rows are in.
            people: `[n]`, see `people_of`.
            labels: `[n]` or `[n, C]`, the site's own labels; None for rows with real targets.
        """
        if not len(rows):
            return rows
        positions, groups = task.memberships(targets)
        every = np.ones(len(rows), dtype=np.bool_)
        if labels is None:
            return rows[self._without_few(positions, groups, every, people)]
        own, classes = _classes(labels)
        together = np.concatenate([groups, classes + int(groups.max(initial=-1)) + 1])
        return rows[self.largest((np.concatenate([positions, own]), together), every, people=people)]

    def _without_few(
        self, positions: IntArray, groups: IntArray, every: BoolArray, people: IntArray | None
    ) -> BoolArray:
        """Return the largest set whose rest is empty or enough, by leaving out the smallest groups further."""
        counted = every.copy()
        while True:
            keep = self.largest((positions, groups), counted, people=people)
            left = np.flatnonzero(~keep)
            few = len(left if people is None else np.unique(people[left]))
            if not 0 < few < self.min_class_count or not keep.any():
                return keep
            sizes = np.bincount(groups, weights=keep[positions])
            smallest = np.where(sizes > 0, sizes, np.inf).argmin()
            counted[positions[groups == smallest]] = False

    def largest(
        self,
        memberships: tuple[IntArray, IntArray],
        counted: BoolArray,
        owners: IntArray | None = None,
        people: IntArray | None = None,
    ) -> BoolArray:
        """Return which rows `[n]` are in the largest set without groups that have few of its `counted` rows `[n]`.

        With `owners` `[n]`, the sites of the rows, each site's groups are counted by themselves. With `people` `[n]`,
        see `people_of`, these are counted in place of rows.
        """
        positions, groups = memberships
        if owners is not None and len(groups):
            groups = groups + (int(groups.max()) + 1) * owners[positions]
        keep = np.ones(len(counted), dtype=np.bool_)
        if not self.min_class_count:
            return keep
        among = None if people is None else people[positions]
        while True:
            counts = count_people(groups, (keep & counted)[positions], among)
            thin = keep[positions] & (counts[groups] < self.min_class_count)
            if not thin.any():
                return keep
            keep[positions[thin]] = False


def count_people(groups: IntArray, counted: BoolArray, people: IntArray | None = None) -> IntArray:
    """Return how many of the `counted` rows are in each group; with `people`, how many of these.

    Args:
        groups: `[m]`, of each pair of a row and a group.
        counted: `[m]`, which pairs count.
        people: `[m]`, of each pair's row, see `people_of`.
    """
    size = int(groups.max(initial=-1)) + 1
    chosen = groups[counted]
    if people is not None:
        chosen = np.unique(people[counted] * max(size, 1) + chosen) % max(size, 1)
    counts: IntArray = np.bincount(chosen, minlength=size)
    return counts


def people_of(keys: KeyArray, contents: KeyArray) -> IntArray | None:
    """Return `[n]`, a number for the group of each row, such as its patient; None if no row has a group.

    A row without a group has a number of its own.

    Args:
        keys: `[n]`, what rows are held out by: the identity of the group or, without one, of the content.
        contents: `[n]`, the identities of the contents.
    """
    grouped = keys != contents
    if not grouped.any():
        return None
    people = np.arange(len(keys))
    _, first, inverse = np.unique(keys[grouped], return_index=True, return_inverse=True)
    people[grouped] = np.flatnonzero(grouped)[first][inverse]
    return people


def named_people(samples: Samples) -> IntArray | None:
    """Return `people_of` as far as it is known before rows are read: groups may also be in the files of rows."""
    if samples.groups is None:
        return None
    first: dict[str, int] = {}
    people = [row if group is None else first.setdefault(group, row) for row, group in enumerate(samples.groups)]
    return np.array(people, dtype=np.int64)


def labels_of(samples: Samples) -> Targets | None:
    """Return a site's own labels, `[n]` or `[n, C]`; None if its rows have real targets."""
    return samples.labels if samples.targets is None else None


def _classes(labels: Targets) -> tuple[IntArray, IntArray]:
    """Return pairs of a row and a class that it has, or of several classes also one that it lacks."""
    if labels.ndim == 1:
        return np.arange(len(labels)), labels
    positions, classes = np.nonzero(np.hstack([labels, 1 - labels]))
    return positions, classes


def count_rows(targets: Targets, task: Task) -> dict[str, int]:
    """Return the rows by class name; a multi-label row counts for each of its classes."""
    counts = task.count_rows(targets)[0].tolist()
    return {name: count for name, count in zip(task.counted, counts, strict=True) if count}
