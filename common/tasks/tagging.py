"""Tagging: entities in sentences, by a tag for each word; rows are words, and sentences are held out and guarded."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedhead.data import IntArray, Item, Samples, relabel
from fedhead.data.items import Word
from fedhead.errors import UserError
from fedhead.evaluation.coverage import ClassCoverage, coverage
from fedhead.evaluation.entities import TaggingReport, tagging_report
from fedhead.sums.calibration import CalibrationSums, TemperatureSums
from fedhead.sums.entities import EntitySums, count_entities, spans
from fedhead.sums.evaluation import sums_by_site
from fedhead.sums.score_bins import ScoreBins
from fedhead.tasks.classification import Classification
from fedhead.tasks.losses import TagCrossEntropy
from fedhead.tasks.task import Targets, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

OUTSIDE = "O"
_WORDS = re.compile(r"\w+(?:['\u2019.-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Entity:
    """An entity in a text.

    Attributes:
        kind: its type.
        start: the position of its first character.
        end: the position after its last.
        probability: the least probability of its words' tags.
    """

    kind: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class Tagged:
    """A text with the entities that were found in it, in order."""

    text: str
    entities: tuple[Entity, ...]


@tasks.register("tagging")
class Tagging(Classification):
    """Tags of words: targets are `[n, 3]`, the tag, the sentence's number and the position in it.

    Args:
        columns: the types of entities, or the tags `O`, `B-TYPE` and `I-TYPE` that follow from them.
    """

    name = "tagging"
    score_name = "f1"
    score_title = "Entity F1"
    loss = TagCrossEntropy()
    answer_name = "tags"
    answer_meaning = "Calibrated probabilities of a word's tags, which sum to 1."
    row_name = "word"
    output_names = ("type of entities", "types of entities")
    misfit = "Its data has no tagged words, or tags that this run does not know; the site's own log has the details."
    pairs_losses = False
    counts_scores = False
    compares_classes = False
    proves_by_score = True
    divides_items: ClassVar[bool] = True

    def __init__(self, columns: Sequence[str]) -> None:
        self.types = _types(columns)
        super().__init__([OUTSIDE, *(f"{prefix}-{kind}" for kind in self.types for prefix in "BI")])

    def check_columns(self) -> None:
        if not self.types:
            raise UserError(
                'A tagging run needs at least one type of entities, as in --set \'classes=["person", "place"]\'.'
            )

    @classmethod
    def shown(cls, columns: Sequence[str]) -> Sequence[str]:
        return _types(columns)

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        cls.require(samples)
        return cls(samples.classes).columns

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.sequences is None:
            raise UserError(
                "This run tags the words of sentences, but its data has none. Name a file with a word and its tag on "
                "each line, as in 'conll:FILE?token=0&tag=3'."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        assert samples.sequences is not None
        return np.hstack([relabel(samples, self.columns)[:, None], samples.sequences])

    def unknown(self, samples: Samples) -> list[str]:
        held = np.bincount(samples.labels, minlength=len(samples.classes))
        return sorted(
            name for name, rows in zip(samples.classes, held, strict=True) if rows and name not in self.columns
        )

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        return super().memberships(targets[:, 0])

    def strata(self, targets: Targets) -> IntArray:
        return super().strata(targets[:, 0])

    def coverage(self, counts: Mapping[str, "Tensor"]) -> list[ClassCoverage]:
        """Return each type's coverage, in words; a type without `I-` tags has entities of one word only."""
        return coverage({site: rows[1::2] + rows[2::2] for site, rows in counts.items()}, self.types)

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[EntitySums]:
        table = targets.cpu().numpy()
        decided = outputs.detach().cpu().argmax(-1).numpy()
        words = sums_by_site(outputs, targets[:, 0], owners, num_sites, bins, kind=self.kind)
        for site, sums in enumerate(words):
            own = owners == site
            entities = count_entities(table[own, 0].tolist(), decided[own].tolist(), table[own, 1:], len(self.types))
            yield EntitySums.of(sums, entities)

    def no_rows(self, bins: ScoreBins | None = None) -> EntitySums:
        return EntitySums.zeros(len(self.columns), kind=self.kind)

    def score(self, score: float, loss: float, rows: float) -> float | None:  # type: ignore[override]
        """Return None: F1 is that of whole sentences, so it is known from the evaluation at the end only."""
        return None

    def score_of(self, sums: Any) -> float | None:
        return self.report(sums).score.value

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        (sums,) = self.count(outputs, targets, np.zeros(len(targets), np.int64), 1, self.bins())
        return self.score_of(sums)

    def report(self, sums: Any) -> TaggingReport:
        return tagging_report(sums, self.columns, self.types)

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> TemperatureSums:
        return super().choosing(outputs, None if targets is None else targets[:, 0], bins)

    def judging(
        self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins
    ) -> CalibrationSums:
        return super().judging(outputs, None if targets is None else targets[:, 0], temperature, bins)

    def covers(self, region: Sequence[str], target: Any) -> bool:
        return self.columns[target[0]] in region

    # Predictions.

    def parts(self, item: Item) -> list[Item]:
        """Return the words of a text; a word of a text is its own part."""
        if isinstance(item, Word):
            return [item]
        words = tuple(found[0] for found in _WORDS.finditer(str(item)))
        return [Word(words, place) for place in range(len(words))]

    def joined(self, item: Item, answers: "Tensor") -> Tagged:
        """Return the entities of a text, given the answers `[n, C]` for its parts."""
        text = str(item)
        found = [match.span() for match in _WORDS.finditer(text)]
        values, chosen = answers.max(-1) if len(answers) else (answers[:, 0], answers[:, 0].long())
        places = np.stack([np.zeros(len(found), np.int64), np.arange(len(found))], 1)
        entities = [
            Entity(self.types[kind], found[first][0], found[stop - 1][1], float(values[first:stop].min()))
            for _, (kind, first, stop) in spans(chosen.tolist(), places)
        ]
        return Tagged(text, tuple(sorted(entities, key=lambda one: one.start)))

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        return ["tagged"]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        return [""] if decision is None else [marked(decision, lambda kind, text: f"[{text}]({kind})", str)]

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        entities = [
            {
                "type": one.kind,
                "text": decision.text[one.start : one.end],
                "start": one.start,
                "end": one.end,
                "probability": one.probability,
            }
            for one in decision.entities
        ]
        return {"text": decision.text, "entities": entities}

    def as_html(self, decision: Tagged) -> str:
        """Return a paragraph of HTML with the entities marked."""

        def mark(kind: str, text: str) -> str:
            hue = 360 * self.types.index(kind) // len(self.types)
            style = f"background:hsl({hue} 80% 85%);padding:0 .2em;border-radius:.2em"
            return f'<mark style="{style}">{html.escape(text)} <small>{html.escape(kind)}</small></mark>'

        return f"<p>{marked(decision, mark, html.escape)}</p>"

    @property
    def description(self) -> str:
        return f"a tagger of {counted(len(self.types), 'type')} of entities"


def marked(tagged: Tagged, mark: Any, plain: Any) -> str:
    """Return a text with each entity passed through `mark(kind, text)`, and the rest through `plain(text)`."""
    parts, end = [], 0
    for one in tagged.entities:
        parts += [plain(tagged.text[end : one.start]), mark(one.kind, tagged.text[one.start : one.end])]
        end = one.end
    return "".join([*parts, plain(tagged.text[end:])])


def _types(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the types in tags, sorted; names that are no tags are types themselves, in their order."""
    tags = all(name == OUTSIDE or name[:2] in ("B-", "I-") for name in columns)
    if not tags:
        return tuple(dict.fromkeys(name for name in columns if name != OUTSIDE))
    return tuple(dict.fromkeys(sorted(name[2:] for name in columns if name != OUTSIDE)))
