"""Entity sums: tags of words counted as for classes, and entities by type, found and missed; they add across sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.sums.evaluation import EvaluationSums
from fedhead.sums.targets import CLASSES, TargetKind

IntArray = npt.NDArray[np.int64]

Span = tuple[int, int, int]
"""The type of an entity, and the positions of its first word and after its last."""


@dataclass(frozen=True, eq=False)
class EntitySums(EvaluationSums):
    """Counts of words by tag, and of entities, which count as found if type and both ends are right.

    Attributes:
        entities: `[T, 3]` int64, by type: found, predicted wrongly, and missed.
    """

    entities: IntArray = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    @classmethod
    def zeros(cls, num_classes: int, *, kind: TargetKind = CLASSES) -> Self:
        """Return the sums over no rows; `num_classes` is `2 T + 1`."""
        return cls.of(EvaluationSums.zeros(num_classes, kind=kind), np.zeros((num_classes // 2, 3), np.int64))

    @classmethod
    def of(cls, words: EvaluationSums, entities: IntArray) -> Self:
        """Return the counts of words together with those of entities."""
        plain = {one.name: getattr(words, one.name) for one in fields(EvaluationSums)}
        return cls(**plain, entities=entities)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {**super().to_arrays(), "entities": self.entities.astype(np.uint32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], like: Self) -> Self:
        """Undo `to_arrays`, validating everything.

        Raises:
            ValueError: if names, shapes or types differ, or counts contradict each other.
        """
        words = EvaluationSums.from_arrays({name: one for name, one in arrays.items() if name != "entities"}, like)
        found = arrays.get("entities")
        if found is None or found.dtype != np.uint32 or found.shape != like.entities.shape:
            raise ValueError(f"'entities' is not {list(like.entities.shape)} unsigned integers of 32 bits.")
        entities = found.astype(np.int64)
        own, taken = words.confusion.sum(1), words.confusion.sum(0)
        # Every entity has one word or more with a tag of its type.
        true, predicted = entities[:, 0] + entities[:, 2], entities[:, 0] + entities[:, 1]
        if (true > own[1::2] + own[2::2]).any() or (predicted > taken[1::2] + taken[2::2]).any():
            raise ValueError("'entities' counts more entities than 'confusion' has words of their types.")
        return cls.of(words, entities)


def spans(tags: Sequence[int], sequences: IntArray) -> set[tuple[int, Span]]:
    """Return the entities in the tags of words, each with the number of its sequence.

    A tag `I-` that continues no entity of its type starts one, as in seqeval.

    Args:
        tags: `[n]`: 0 for `O`, then `2 t + 1` for `B-` and `2 t + 2` for `I-` of type `t`.
        sequences: `[n, 2]`, the sequence and position of each word, in order. Entities end where a word is missing.
    """
    found: set[tuple[int, Span]] = set()
    start, kind, last = 0, -1, (-1, -1)
    for tag, (sequence, place) in zip([*tags, 0], [*sequences.tolist(), (-1, -1)], strict=True):
        follows = last == (sequence, place - 1)
        own = (tag - 1) // 2 if tag else -1
        if kind >= 0 and not (follows and tag and tag % 2 == 0 and own == kind):
            found.add((last[0], (kind, start, last[1] + 1)))
            kind = -1
        if own >= 0 and kind < 0:
            start, kind = place, own
        last = (sequence, place)
    return found


def count_entities(true: Sequence[int], predicted: Sequence[int], sequences: IntArray, types: int) -> IntArray:
    """Return `EntitySums.entities` of words; see `spans`."""
    order = np.lexsort((sequences[:, 1], sequences[:, 0]))
    ordered = sequences[order]
    own = spans(np.asarray(true)[order].tolist(), ordered)
    taken = spans(np.asarray(predicted)[order].tolist(), ordered)
    counts = np.zeros((types, 3), np.int64)
    for column, some in enumerate((own & taken, taken - own, own - taken)):
        for _, (kind, _, _) in some:
            counts[kind, column] += 1
    return counts
