"""What annotated data has beside the classes of its rows: pixels, boxes, entities, or times and events."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from fedhead.data.conversations import CONVERSATION
from fedhead.data.drawn_boxes import draw_boxes
from fedhead.data.items import IntArray, Item
from fedhead.data.overlays import overlay
from fedhead.data.samples import Samples
from fedhead.data.spread import RealSpread, Spread
from fedhead.wording import counted, percent, quoted

SMALL = 0.001
"""Share of an image's area below which a box is called small: 16 x 16 of 512 x 512 pixels."""

MANY = 0.05
"""Share of small boxes above which there is a caution."""


@dataclass(frozen=True)
class Annotated(ABC):
    """What is annotated in a data set.

    Attributes:
        marks: the number of annotated things of each class: pixels, boxes or entities; empty for times.
    """

    marks: dict[str, int]

    @property
    @abstractmethod
    def things(self) -> str:
        """What `marks` counts, in the plural."""

    @abstractmethod
    def title(self, rows: int, items: str, classes: int) -> str:
        """Describe the rows, given their number, the name of their items and the number of classes."""

    @abstractmethod
    def facts(self) -> list[tuple[str, str]]:
        """Return names and values for readers."""

    def cautions(self) -> list[str]:
        """Return sentences on problems to fix or consider before a run."""
        return []


@dataclass(frozen=True)
class Masked(Annotated):
    """Masks of images.

    Attributes:
        images: the number of images whose masks were read.
        without_class: pixels without a class.
    """

    images: int
    without_class: int

    @property
    def things(self) -> str:
        return "pixels"

    def title(self, rows: int, items: str, classes: int) -> str:
        return f"{rows} {items} with masks of {counted(classes, 'class', 'classes')}"

    def facts(self) -> list[tuple[str, str]]:
        total = sum(self.marks.values()) + self.without_class
        none = f"{percent(self.without_class / total)} without a class" if self.without_class else "all have a class"
        return [("Pixels", f"{total:,} in {counted(self.images, 'mask')}; {none}")] if total else []

    def cautions(self) -> list[str]:
        if self.images and not any(self.marks.values()):
            return ["No pixel of the masks has a class."]
        return []


@dataclass(frozen=True)
class Boxed(Annotated):
    """Boxes around objects in images.

    Attributes:
        ignored: crowds and difficult objects, which are neither learned from nor counted; `marks` leaves them out.
        per_image: the number of boxes of an image.
        empty: the number of images without a box.
        area: the boxes' shares of their images' areas; None without boxes.
        small: the number of boxes below `SMALL` of their image.
    """

    ignored: int
    per_image: Spread
    empty: int
    area: RealSpread | None
    small: int

    @property
    def things(self) -> str:
        return "boxes"

    def title(self, rows: int, items: str, classes: int) -> str:
        return f"{rows} {items} with boxes of {counted(classes, 'class', 'classes')}"

    def facts(self) -> list[tuple[str, str]]:
        total = sum(self.marks.values())
        ignored = f", and {self.ignored} crowds or difficult objects" if self.ignored else ""
        facts = [("Boxes", f"{total:,}{ignored}; {self.per_image} per image")]
        facts.append(("No boxes", counted(self.empty, "image")))
        if self.area:
            least, median, greatest = (
                f"{100 * one:.2g} %" for one in (self.area.least, self.area.median, self.area.greatest)
            )
            facts.append(("Box sizes", f"{least} to {greatest} of the image's area (half up to {median})"))
        return facts

    def cautions(self) -> list[str]:
        told = []
        if none := [name for name, boxes in self.marks.items() if not boxes]:
            told.append(f"Classes without a box, which nothing is learned of: {quoted(none, 5)}.")
        if self.small > MANY * sum(self.marks.values()):
            told.append(
                f"{self.small:,} of the boxes cover less than {100 * SMALL:g} % of their image: choose "
                "layers of a small stride, or larger images, as in --layer LAYER:map@640."
            )
        return told


@dataclass(frozen=True)
class TaggedSentences(Annotated):
    """Sentences with a tag for each word.

    Attributes:
        sentences: their number.
        words: the number of words of a sentence.
        plain: the number of sentences without an entity.
    """

    sentences: int
    words: Spread
    plain: int

    @property
    def things(self) -> str:
        return "entities"

    def title(self, rows: int, items: str, classes: int) -> str:
        return f"{rows} words of sentences, with {counted(classes, 'tag')}"

    def facts(self) -> list[tuple[str, str]]:
        total = sum(self.marks.values())
        types = ", ".join(f"{name} {number}" for name, number in self.marks.items())
        facts = [("Sentences", f"{self.sentences:,}, {self.plain:,} without an entity; words of each: {self.words}")]
        return [*facts, ("Entities", f"{total:,}: {types}" if total else "none")]


@dataclass(frozen=True)
class Followed(Annotated):
    """Times to an event.

    Attributes:
        events: the number of rows with an event.
        censored: the number of rows that were followed without one.
        event_times: the times of events; None without events.
        censored_times: the times until which other rows were followed; None if all have an event.
    """

    events: int
    censored: int
    event_times: RealSpread | None
    censored_times: RealSpread | None

    @property
    def things(self) -> str:
        return ""

    def title(self, rows: int, items: str, classes: int) -> str:
        return f"{rows} {items} with times and events"

    def facts(self) -> list[tuple[str, str]]:
        share = percent(self.events / (self.events + self.censored))
        facts = [
            ("Events", f"{self.events:,} ({share}); {counted(self.censored, 'row')} followed without one (censored)")
        ]
        for name, spread in (("Event times", self.event_times), ("Censored at", self.censored_times)):
            if spread:
                facts.append((name, str(spread)))
        return facts

    def cautions(self) -> list[str]:
        if self.events < 2:
            return [f"There {'is one event' if self.events else 'are no events'}; a survival model needs two or more."]
        return []


@dataclass(frozen=True)
class Conversations(Annotated):
    """Conversations, whose answers are learned; there are no classes."""

    @property
    def things(self) -> str:
        return ""

    def title(self, rows: int, items: str, classes: int) -> str:
        return counted(rows, "conversation")

    def facts(self) -> list[tuple[str, str]]:
        return []


def sees_items(samples: Samples) -> bool:
    """Return whether annotations are read row by row, as masks are."""
    return samples.annotated == "mask"


def annotated(samples: Samples, pixels: IntArray, masks: int) -> Annotated | None:
    """Return the kind of annotations in a data set; None for classes and real targets of rows.

    Args:
        samples: the data set.
        pixels: `[256]`, by value, the pixels of all masks that were read.
        masks: their number.
    """
    if samples.annotated == "mask":
        classes = len(samples.classes)
        marks = dict(zip(samples.classes, pixels[:classes].tolist(), strict=True))
        return Masked(marks, masks, int(pixels[classes:].sum()))
    if samples.annotated == "boxes":
        return _boxed(samples)
    if samples.annotated == CONVERSATION:
        return Conversations({})
    if samples.sequences is not None:
        return _tagged(samples, samples.sequences)
    if samples.target_names == ("time", "event"):
        return _followed(samples)
    return None


def _boxed(samples: Samples) -> Boxed:
    assert samples.annotation is not None
    found = [samples.annotation(row) for row in range(len(samples))]
    labels = np.concatenate([one.labels[~one.ignored] for one in found])
    sides = np.concatenate([one.corners[~one.ignored, 2:] - one.corners[~one.ignored, :2] for one in found])
    areas = sides.prod(1)
    counts = np.bincount(labels, minlength=len(samples.classes))
    return Boxed(
        dict(zip(samples.classes, counts.tolist(), strict=True)),
        ignored=int(sum(one.ignored.sum() for one in found)),
        per_image=Spread.of(len(one) for one in found),
        empty=sum(not len(one) for one in found),
        area=RealSpread.of(areas) if len(areas) else None,
        small=int((areas < SMALL).sum()),
    )


def _tagged(samples: Samples, sequences: IntArray) -> TaggedSentences:
    tags = [samples.classes[label] for label in samples.labels.tolist()]
    # The source writes tags so that every entity begins with B-.
    begins = [tag.startswith("B-") for tag in tags]
    entities = Counter(tag[2:] for tag, one in zip(tags, begins, strict=True) if one)
    _, words = np.unique(sequences[:, 0], return_counts=True)
    with_entity = len(set(sequences[np.array(begins), 0].tolist()))
    return TaggedSentences(
        dict(sorted(entities.items())), len(words), Spread.of(words.tolist()), len(words) - with_entity
    )


def _followed(samples: Samples) -> Followed:
    assert samples.targets is not None
    times, happened = samples.targets[:, 0], samples.targets[:, 1] == 1
    parts = [RealSpread.of(times[rows]) if rows.any() else None for rows in (happened, ~happened)]
    return Followed({}, int(happened.sum()), int((~happened).sum()), *parts)


def drawn(samples: Samples, row: int, item: Item) -> Item:
    """Return an image with its mask or boxes drawn on it; other items as they are."""
    if samples.annotation is None or not isinstance(item, Image):
        return item
    annotation = samples.annotation(row)
    if samples.annotated == "mask":
        shown = annotation.copy()
        shown[shown >= len(samples.classes)] = 0
        return overlay(item, shown)
    corners = annotation.corners * np.tile(item.size, 2)
    sides = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    return draw_boxes(item, sides.tolist(), [""] * len(sides), annotation.labels.tolist())
