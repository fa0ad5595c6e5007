"""Dense tasks: rows of sums and heads are places of items, such as cells of an image or tokens of a sentence.

Items are what sites hold out, guard and count. A store keeps an item's maps whole; the task expands them to places at
the last moment, a few items at a time.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fedhead.backbones.geometry import Geometry
from fedhead.backbones.proposals import Proposals
from fedhead.data import BoolArray, IntArray, Samples
from fedhead.errors import UserError
from fedhead.sums.calibration import Calibration
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.targets import PLACES
from fedhead.tasks.task import Calibrated, Targets, Task

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from fedhead.heads import Head

BLOCK_PLACES = 2**15
"""Places whose features are in memory at a time."""


class Places(NamedTuple):
    """The places of a few items that a task learns from.

    Attributes:
        features: `[p, d]`.
        targets: `[p, K]`.
        items: the number of items with such places.
    """

    features: "Tensor"
    targets: "Tensor"
    items: int


class DenseTask(Task):
    """A task whose rows are places of items.

    Its targets `[n, C]` are those of items, 0 or 1 for each class that an item contains: by them items are guarded,
    counted and divided over sites. What places are of comes from an item's annotation.
    """

    dense = True
    selects_by = "score"
    kind = PLACES
    row_name = "image"
    scales_outputs: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    pairs_losses: ClassVar[bool] = False
    counts_scores: ClassVar[bool] = False
    proves_by_score: ClassVar[bool] = True

    takes_proposals: ClassVar[bool] = False
    """Whether places may be a detector's proposals."""

    @abstractmethod
    def annotations(self, samples: Samples) -> Callable[[int], Any]:
        """Return a function that reads the annotation of an item, in terms of the task's columns."""

    @abstractmethod
    def expand(self, values: "Tensor", annotations: Sequence[Any], geometry: Geometry) -> Places:
        """Return the places of `n` items, given their stored values `[n, V]`."""

    def training_loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the mean loss of places, for rounds.

        Args:
            outputs: `[p, C]`, of the head.
            targets: `[p, C]`, the leading ones of `expand`.
        """
        return self.loss.values(outputs, targets).mean()

    @abstractmethod
    def summed_classes(self, annotation: Any, geometry: Geometry, proposals: "Tensor | None" = None) -> BoolArray:
        """Return `[C]`, whether places of an item add to the sums of each class; not all that is annotated does.

        Args:
            annotation: of the item.
            geometry: of the backbone's places.
            proposals: `[P, 4]`, the boxes of the item's places; None for cells.
        """

    @abstractmethod
    def count_items(
        self, outputs: "Tensor", annotations: Sequence[Any], geometry: Geometry, proposals: "Tensor | None" = None
    ) -> Any:
        """Return the evaluation sums of `n` items, given the head's outputs `[n, P, C]` at all of their places.

        They have the attributes `rows`, the number of items, and `loss_sum`, each item's mean loss added up. Proposals
        are `[n, P, 4]`, the boxes of places; None for cells.
        """

    @abstractmethod
    def decode(
        self, outputs: "Tensor", geometry: Geometry, size: tuple[int, int], proposals: "Tensor | None" = None
    ) -> Any:
        """Return the prediction for one item, given the head's outputs `[P, C]`.

        Args:
            outputs: of the head, at all places.
            geometry: of the maps.
            size: height and width of the original image.
            proposals: `[P, 4]`, the boxes of places; None for cells.
        """

    @abstractmethod
    def summarise(self, decoded: Any) -> tuple[Any, tuple[float, ...]]:
        """Return the decision and the answers for one item in a table, given its prediction from `decode`."""

    @abstractmethod
    def drawings(self, decoded: Any, image: "Image") -> dict[str, "Image"]:
        """Return images of a prediction by the ending of their file names.

        Args:
            decoded: the prediction for one item, from `decode`.
            image: the item.
        """

    @abstractmethod
    def drawn(self, decoded: Any, image: "Image") -> "Image":
        """Return an image with a prediction for it drawn on it."""

    @abstractmethod
    def drawn_truth(self, annotation: Any, image: "Image") -> "Image":
        """Return an image, perhaps smaller than the item, with an annotation drawn on it."""

    @abstractmethod
    def program(
        self, outputs: "Tensor", unlearned: "Tensor", geometry: Geometry, proposals: "Tensor | None" = None
    ) -> "Tensor":
        """Return the answers of an exported model for `n` items, with torch operations only.

        Args:
            outputs: `[n, P, C]`, of the head at all places.
            unlearned: `[C]`, bool, the columns without places at any site.
            geometry: of the maps.
            proposals: `[n, P, 4]`, the boxes of places; None for cells.
        """

    @abstractmethod
    def program_shape(self, geometry: Geometry) -> list[int]:
        """Return the shape of an item's answers in `program`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """All items, then the items with each class."""
        return ("of all", *super().groups)

    @property
    def counted(self) -> tuple[str, ...]:
        return ("all items",)

    def memberships(self, targets: Targets) -> tuple[IntArray, IntArray]:
        return tuple(np.nonzero(np.hstack([np.ones((len(targets), 1), np.int64), targets])))  # type: ignore[return-value]

    def strata(self, targets: Targets) -> IntArray:
        """Return `[n]`, the rarest class of each item, the first in a tie; -1 for items without classes."""
        frequency = np.where(targets == 1, targets.sum(0), len(targets) + 1)
        return np.where(targets.any(1), frequency.argmin(1), -1)

    def inits(self, head: "type[Head]") -> tuple[str, ...]:
        """Return the closed forms and `zeros`; only heads with a closed form are for places."""
        solved = () if head.directional else tuple(init for init in head.inits if init in self.solvers)
        return (*solved, "zeros") if solved else ()

    def counts_of(self, stats: FeatureStatistics) -> "Tensor":
        return stats.counts.new_tensor([stats.items]).long()

    def unlearned(self, stats: FeatureStatistics) -> tuple[str, ...]:
        return tuple(name for name, places in zip(self.columns, stats.counts.tolist(), strict=True) if places <= 0)

    def count(
        self, outputs: "Tensor", targets: "Tensor", owners: IntArray, num_sites: int, bins: ScoreBins
    ) -> Iterator[Any]:
        raise UserError(f"Places of the task {self.name!r} are counted by item.")

    def score(self, score: float, loss: float, rows: float) -> float | None:
        """Return None: the score is known from the evaluation at the end only."""
        return None

    def score_on(self, outputs: "Tensor", targets: "Tensor") -> float | None:
        raise UserError(f"Places of the task {self.name!r} are counted by item.")

    def judged(self, outputs: "Tensor", targets: "Tensor", temperature: float, unlearned: "Tensor") -> Any:
        raise UserError(f"Places of the task {self.name!r} are counted by item.")

    def choosing(self, outputs: "Tensor | None", targets: "Tensor | None", bins: ScoreBins) -> Any:
        raise UserError(self._not_calibrated)

    def judging(self, outputs: "Tensor | None", targets: "Tensor | None", temperature: float, bins: ScoreBins) -> Any:
        raise UserError(self._not_calibrated)

    def temperature(self, chosen: Any) -> float:
        raise UserError(self._not_calibrated)

    def calibrated(self, chosen: Any, judged: Any) -> Calibrated:
        raise UserError(self._not_calibrated)

    def regions(self, answers: "Tensor", calibration: Calibration, coverage: float) -> list[Any]:
        raise UserError(self._no_regions)

    def covers(self, region: Any, target: Any) -> bool:
        raise UserError(self._no_regions)

    def size(self, region: Any) -> float:
        raise UserError(self._no_regions)

    def say_regions(self, held: str, stated: str, size: float) -> tuple[str, str]:
        raise UserError(self._no_regions)

    @property
    def _not_calibrated(self) -> str:
        return f"Models of the task {self.name!r} are not calibrated."

    @property
    def _no_regions(self) -> str:
        return f"A model of the task {self.name!r} gives no sets with a coverage."


def require_rows(task: type[Task], geometry: Geometry | None) -> None:
    """Check that a backbone gives the rows that a task takes.

    Args:
        task: of the run.
        geometry: of the backbone's places; None if its rows are items.

    Raises:
        UserError: if it gives items for places, places for items, or proposals for other places.
    """
    takes_places = issubclass(task, DenseTask)
    if isinstance(geometry, Proposals) and not (issubclass(task, DenseTask) and task.takes_proposals):
        raise UserError(
            f"The backbone is a detector, whose rows are proposals, which the task {task.name!r} does not take. "
            "Set task to 'detection', or choose another backbone."
        )
    if geometry is not None and not takes_places:
        raise UserError(f"The task {task.name!r} is about whole items: choose a layer without ':map'.")
    if geometry is None and takes_places:
        raise UserError(f"The task {task.name!r} is about places: choose layers with ':map', as in 'layer2:map'.")


@dataclass(frozen=True)
class ItemPlaces:
    """How the items of a data set become places.

    Attributes:
        task: of the run.
        geometry: of the backbone's maps.
        annotation: reads the annotation of a row.
    """

    task: DenseTask
    geometry: Geometry
    annotation: Callable[[int], Any]

    @classmethod
    def of(cls, task: Task, geometry: Geometry | None, samples: Samples) -> "ItemPlaces | None":
        """Return how items become places; None if rows are items.

        Raises:
            UserError: as `require_rows` does.
        """
        require_rows(type(task), geometry)
        if not isinstance(task, DenseTask) or geometry is None:
            return None
        return cls(task, geometry, task.annotations(samples))

    @classmethod
    def with_targets(
        cls, task: Task, geometry: Geometry | None, samples: Samples, targets: Targets, features: "Tensor"
    ) -> "tuple[ItemPlaces | None, Targets]":
        """Return how items become places, and the targets that guards count; None, and `targets`, if rows are items.

        Raises:
            UserError: as `of` does.
        """
        places = cls.of(task, geometry, samples)
        return places, targets if places is None else places.summed(targets, features)

    def summed(self, targets: Targets, features: "Tensor") -> Targets:
        """Return targets `[n, C]` with 1 for the classes whose sums an item adds to: these are what guards count.

        Where a grid is coarse, of several objects in a cell only one adds to a sum. Objects without a proposal add to
        none.

        Args:
            targets: of all items.
            features: `[n, V]`, their stored values.
        """
        kept = targets.copy()
        for row in np.flatnonzero(targets.any(1)).tolist():
            found = self.geometry.proposals(features[row : row + 1].cpu())
            own = None if found is None else found[0]
            kept[row] &= self.task.summed_classes(self.annotation(row), self.geometry, own)
        return kept

    @property
    def block(self) -> int:
        """The number of items to expand at a time."""
        return max(1, BLOCK_PLACES // self.geometry.num_places)

    def blocks(self, features: "Tensor", rows: IntArray) -> "Iterator[tuple[Tensor, list[Any]]]":
        """Yield values `[k, V]` and annotations of `rows` `[n]`, a few items at a time."""
        import torch

        for some in torch.split(torch.from_numpy(rows), self.block):
            values = features[some.to(features.device)].cpu()
            yield values, [self.annotation(row) for row in some.tolist()]

    def add(self, stats: FeatureStatistics, features: "Tensor", rows: IntArray) -> None:
        """Add the places of items to statistics in place."""
        for values, annotations in self.blocks(features, rows):
            found = self.task.expand(values, annotations, self.geometry)
            stats.update(found.features, found.targets)
            stats.items += found.items

    def each(self, features: "Tensor", rows: IntArray) -> "Iterator[Tensor]":
        """Yield the features `[p, d]` of each item's places that are learned from; items without such are left out."""
        for values, annotations in self.blocks(features, rows):
            for own, annotation in zip(values, annotations, strict=True):
                found = self.task.expand(own[None], [annotation], self.geometry).features
                if len(found):
                    yield found

    def summed_scores(self, head: "Callable[[Tensor], Tensor]", features: "Tensor", rows: IntArray) -> float:
        """Return the scores of single items added up; an item whose score is undefined adds 0."""
        found = (self.task.score_of(self.evaluate(head, features, rows[[place]])) for place in range(len(rows)))
        return float(sum(one for one in found if one is not None))

    def evaluate(self, head: "Callable[[Tensor], Tensor]", features: "Tensor", rows: IntArray) -> Any:
        """Return the evaluation sums of items."""
        import torch

        total = self.task.no_rows()
        with torch.inference_mode():
            for values, annotations in self.blocks(features, rows):
                outputs = head(self.geometry.places(values))
                found = self.geometry.proposals(values)
                total = total + self.task.count_items(outputs, annotations, self.geometry, found)
        return total
