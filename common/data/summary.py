"""Summary of a data set and its problems, before a run."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedhead.data.annotated import Annotated, Boxed, Followed, annotated, sees_items
from fedhead.data.items import (
    MODE,
    Clip,
    IntArray,
    Item,
    Kind,
    TableRow,
    UnreadableSampleError,
    content_key,
)
from fedhead.data.labels import UNLABELLED
from fedhead.data.samples import Samples, similar_names
from fedhead.data.spread import RealSpread, Spread
from fedhead.wording import quoted

FEW = 5
"""Default number of training rows below which a site's guard withholds a class."""


@dataclass(frozen=True)
class Broken:
    """An unreadable row.

    Attributes:
        row: the row number.
        name: the name of the row for readers.
        reason: a sentence.
    """

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """Summary of a data set.

    Attributes:
        spec: the data spec.
        kind: the kind of the items.
        rows: the number of rows.
        looked_at: the number of rows read for this summary.
        readable: the number of readable rows among these.
        multi_label: whether rows have any number of classes.
        classes: rows by class, of all rows.
        without_class: the number of multi-label rows without a class.
        sizes: images by width and height, the most frequent first.
        width: of the images; None for texts.
        height: of the images; None for texts.
        modes: images by stored mode.
        characters: of the texts; None for images.
        words: of the texts; None for images.
        seconds: durations of the clips; None for other kinds.
        rates: clips by sampling rate in Hz, the most frequent first.
        groups: the number of groups of the readable rows; 0 if the data has none.
        largest_group: the number of rows in the largest group.
        sites: rows by site.
        splits: rows by split.
        duplicates: the number of readable rows that repeat an earlier one's content.
        conflicting: the number of rows whose content also occurs with another label.
        straddling: the number of rows whose content or group also occurs in another split.
        similar_classes: names that differ only by case or spaces.
        broken: unreadable rows.
        columns: the names of the numbers in each row; empty for images and texts.
        targets: the real targets by name; empty for classes.
        left_out: unused parts of the data, in words.
        one_group: whether all rows have one group.
        understood: sentences on ambiguous data and its interpretation.
        annotated: pixels, boxes, entities, or times and events; None if rows have only classes or real targets.
    """

    spec: str
    kind: Kind
    rows: int
    looked_at: int
    readable: int
    multi_label: bool
    classes: dict[str, int]
    without_class: int
    sizes: dict[str, int]
    width: Spread | None
    height: Spread | None
    modes: dict[str, int]
    characters: Spread | None
    words: Spread | None
    seconds: RealSpread | None
    rates: dict[int, int]
    groups: int
    largest_group: int
    sites: dict[str, int]
    splits: dict[str, int]
    duplicates: int
    conflicting: int
    straddling: int
    similar_classes: list[tuple[str, ...]]
    broken: list[Broken]
    columns: list[str]
    targets: dict[str, RealSpread]
    left_out: list[str]
    one_group: bool
    understood: list[str]
    annotated: Annotated | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, with the cautions."""
        return {**asdict(self), "cautions": self.cautions()}

    def cautions(self) -> list[str]:
        """Return sentences on problems of the data to fix or consider before a run."""
        told = [
            f"The classes {' and '.join(map(repr, names))} differ only by case or spaces."
            for names in self.similar_classes
        ]
        told += self.understood
        if self.one_group:
            told.append("All rows have one group, so all or none of them are held out.")
        told += [
            f"The target {name!r} is {spread.least:g} in all rows: there is nothing to predict."
            for name, spread in self.targets.items()
            if spread.least == spread.greatest and not isinstance(self.annotated, Followed)
        ]
        told += [] if self.annotated is None else self.annotated.cautions()
        if len(self.classes) == 1 and not isinstance(self.annotated, Boxed):
            told.append("There is only one class; a classifier needs two or more.")
        if self.conflicting:
            told.append(f"{self.conflicting} rows have the same content as others with another label.")
        if self.straddling:
            told.append(
                f"{self.straddling} rows share content or group with a row of another split, so testing on one would "
                "overestimate a model trained on the other."
            )
        if few := [name for name, rows in self.classes.items() if rows < FEW]:
            told.append(f"Classes with fewer than {FEW} rows, which a site's guard withholds: {quoted(few, 5)}.")
        if self.broken:
            number = "1 row" if len(self.broken) == 1 else f"{len(self.broken)} rows"
            told.append(f"{number} cannot be read; a run skips such rows, or stops under --strict-data.")
        return told


class Look:
    """A summary under construction: rows are added one at a time, and none is kept.

    Args:
        samples: the data set.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._rows: list[int] = []
        self._keys: list[int] = []
        self._groups: list[str | None] = []
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._modes: Counter[str] = Counter()
        self._characters: list[int] = []
        self._words: list[int] = []
        self._seconds: list[float] = []
        self._rates: Counter[int] = Counter()
        self._broken: list[Broken] = []
        self._pixels = np.zeros(256, np.int64)
        self._masks = 0

    def show(self, row: int, item: Item | UnreadableSampleError) -> None:
        """Add a row, or the reason why it cannot be read."""
        if isinstance(item, UnreadableSampleError):
            self._broken.append(Broken(row, self.samples.name(row), str(item)))
            return
        self._rows.append(row)
        self._keys.append(content_key(item))
        self._groups.append(self.samples.group(row, item))
        if self.samples.annotation is not None and sees_items(self.samples):
            self._pixels += np.bincount(self.samples.annotation(row).ravel(), minlength=256)
            self._masks += 1
        if isinstance(item, str):
            self._characters.append(len(item))
            self._words.append(len(item.split()))
        elif isinstance(item, Clip):
            self._seconds.append(item.seconds)
            self._rates[item.rate] += 1
        elif not isinstance(item, TableRow):
            self._sizes[item.size] += 1
            self._modes[item.info.get(MODE, item.mode)] += 1

    def summary(self) -> Summary:
        """Return the summary."""
        samples = self.samples
        per_class = np.zeros(0, dtype=np.int64)
        if samples.multi_label:
            per_class = samples.labels.sum(0)
        elif samples.targets is None:
            per_class = np.bincount(samples.labels, minlength=len(samples.classes))
        named = zip(samples.target_names, () if samples.targets is None else samples.targets.T, strict=True)
        sizes = self._sizes
        groups = Counter(group for group in self._groups if group is not None)
        conflicting, straddling = self._conflicts(), self._straddling()
        return Summary(
            spec=samples.spec,
            kind=samples.kind,
            rows=len(samples),
            looked_at=len(self._rows) + len(self._broken),
            readable=len(self._rows),
            multi_label=samples.multi_label,
            classes={}
            if samples.classes == (UNLABELLED,)
            else dict(zip(samples.classes, per_class.tolist(), strict=True)),
            without_class=int((~samples.labels.any(1)).sum()) if samples.multi_label else 0,
            sizes={f"{width} x {height}": rows for (width, height), rows in sizes.most_common()},
            width=Spread.of(width for (width, _), rows in sizes.items() for _ in range(rows)) if sizes else None,
            height=Spread.of(height for (_, height), rows in sizes.items() for _ in range(rows)) if sizes else None,
            modes=dict(self._modes.most_common()),
            characters=Spread.of(self._characters) if self._characters else None,
            words=Spread.of(self._words) if self._words else None,
            seconds=RealSpread.of(np.array(self._seconds)) if self._seconds else None,
            rates=dict(self._rates.most_common()),
            groups=len(groups),
            largest_group=max(groups.values(), default=0),
            sites=_counted(samples.sites),
            splits=_counted(samples.splits),
            duplicates=len(self._keys) - len(set(self._keys)),
            conflicting=conflicting,
            straddling=straddling,
            similar_classes=similar_names(samples.classes),
            broken=self._broken,
            columns=list(samples.columns),
            targets={name: RealSpread.of(values) for name, values in named},
            left_out=list(map(str, samples.left_out)),
            one_group=len(groups) == 1 and len(self._rows) > 1 and None not in self._groups,
            understood=list(samples.cautions),
            annotated=annotated(samples, self._pixels, self._masks),
        )

    def _conflicts(self) -> int:
        labels = defaultdict(set)
        truth = self.samples.labels if self.samples.targets is None else self.samples.targets
        marks = [truth[row].tobytes() for row in self._rows]
        for key, mark in zip(self._keys, marks, strict=True):
            labels[key].add(mark)
        return sum(len(labels[key]) > 1 for key in self._keys)

    def _straddling(self) -> int:
        if self.samples.splits is None:
            return 0
        identities = [
            (key, None) if group is None else (0, group) for key, group in zip(self._keys, self._groups, strict=True)
        ]
        splits = defaultdict(set)
        for row, key, identity in zip(self._rows, self._keys, identities, strict=True):
            for one in {(key, None), identity}:
                splits[one].add(self.samples.splits[row])
        return sum(
            len(splits[(key, None)]) > 1 or len(splits[identity]) > 1
            for key, identity in zip(self._keys, identities, strict=True)
        )


def _counted(names: Iterable[str] | None) -> dict[str, int]:
    return {} if names is None else dict(sorted(Counter(names).items()))


def rows_to_look_at(total: int, most: int | None) -> IntArray:
    """Return all rows, or `most` of them, evenly spaced."""
    if most is None or most >= total:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, most).astype(np.int64))


def examples(samples: Samples, rows: IntArray, per_class: int) -> dict[int, list[int]]:
    """Return up to `per_class` of the rows for each class, evenly spaced among its rows."""
    chosen = {}
    for label in range(len(samples.classes)):
        having = samples.labels[rows, label] == 1 if samples.multi_label else samples.labels[rows] == label
        held = rows[np.flatnonzero(having)]
        chosen[label] = held[rows_to_look_at(len(held), per_class)].tolist()
    return chosen
