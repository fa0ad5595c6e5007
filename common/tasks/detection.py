"""Detection: boxes around the objects in images, from the maps or the proposals of a frozen backbone."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhead.backbones.geometry import Geometry
from fedhead.backbones.proposals import with_area
from fedhead.data import BoolArray, Samples
from fedhead.data.boxes import Boxes
from fedhead.data.drawn_boxes import draw_boxes
from fedhead.errors import UserError
from fedhead.evaluation.detection import DetectionReport, average_precisions, detection_report
from fedhead.registry import suggest
from fedhead.sums.detection import DetectionSums, detection_sums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.tasks.cells import Found, assign, corners_of, find_boxes, within
from fedhead.tasks.dense import DenseTask, Places
from fedhead.tasks.losses import BinaryCrossEntropy
from fedhead.tasks.proposals import beside, match, refined
from fedhead.tasks.task import Targets, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


OBJECTNESS = "objectness"
SHAPE = ("x", "y", "log width", "log height")
"""Columns of a head after those of the classes: the objectness, and the shape of a box, of each class."""

PER_CLASS = 2 + len(SHAPE)
"""Columns of each class."""

MOST_CLASSES = 1000

SHOWN = 0.05
"""Lowest score of a box that is counted and drawn for readers."""


@tasks.register("detection")
class Detection(DenseTask):
    """Boxes of objects: each cell of the finest map or proposal has logits of classes and their objectness, and boxes.

    Args:
        columns: the classes of objects, or the columns that follow from them.
    """

    name = "detection"
    score_name = "ap50"
    score_title = "AP50"
    loss = BinaryCrossEntropy()
    answer_name = "values"
    answer_meaning = (
        "For each cell and class: left, top, right and bottom of a box as shares of the image, and its score. Suppress "
        "boxes of a class that overlap one with a higher score by more than 0.5 as intersection over union."
    )
    family = "classification"
    misfit = "Its boxes do not fit the classes of this run; the site's own log has the details."
    solvers = ("boxes",)
    takes_proposals = True
    baseline_solver = "boxes"

    def __init__(self, columns: Sequence[str]) -> None:
        named = tuple(columns)
        classes = named[: len(named) // PER_CLASS]
        super().__init__(named if named == _columns(classes) else _columns(named))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of objects."""
        return self.columns[: len(self.columns) // PER_CLASS]

    def check_columns(self) -> None:
        if not 1 <= len(self.classes) <= MOST_CLASSES or len(set(self.columns)) < len(self.columns):
            raise UserError(
                f"A detection needs 1 to {MOST_CLASSES} different classes of objects; this run has "
                f"{list(self.classes)[:5]}."
            )

    @property
    def groups(self) -> tuple[str, ...]:
        return super().groups[: 1 + len(self.classes)]

    @classmethod
    def shown(cls, columns: Sequence[str]) -> Sequence[str]:
        return cls(columns).classes if columns else columns

    # Data.

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        cls.require(samples)
        return cls(samples.classes).columns

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.annotation is None or samples.annotated != "boxes":
            raise UserError(
                "This run finds boxes, but its data has none. Name data with boxes, as in "
                "'coco:FILE.json?images=FOLDER', 'voc:FOLDER' or 'yolo:DATA.yaml'."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        known = {name: place for place, name in enumerate(samples.classes)}
        if unknown := self.unknown(samples):
            raise UserError(
                f"{samples.spec} has boxes of the class {unknown[0]!r}, which this run does not know. "
                f"{suggest(unknown[0], list(self.classes))} Leave them out by naming the others, as in ?classes=A,B."
            )
        for name in self.classes:
            if name not in known:
                raise UserError(
                    f"{samples.spec} does not annotate the class {name!r} of this run, so its objects would count as "
                    f"background. Annotated are: {', '.join(samples.classes)}. If it is annotated and only absent "
                    f"here, name all classes, as in ?classes={','.join(self.classes)}."
                )
        return samples.labels[:, [known[name] for name in self.classes]]

    def unknown(self, samples: Samples) -> list[str]:
        held = [samples.classes[place] for place in np.flatnonzero(samples.labels.any(0)).tolist()]
        return sorted(name for name in held if name not in self.classes)

    def annotations(self, samples: Samples) -> Callable[[int], Boxes]:
        assert samples.annotation is not None
        read = samples.annotation
        places = {name: place for place, name in enumerate(self.classes)}
        table = np.array([places.get(name, -1) for name in samples.classes], np.int64)

        def boxes(row: int) -> Boxes:
            one: Boxes = read(row)
            return Boxes(one.corners, table[one.labels], one.ignored)

        return boxes

    # Heads.

    def statistics(self, num_features: int, origin: "Tensor | None" = None, device: "str" = "cpu") -> FeatureStatistics:
        """Return the sums of no places, with the products of `solve_boxes` among the targets."""
        targets = len(self.columns) + num_features
        return FeatureStatistics.empty(
            num_features, targets, origin, kind=self.kind, device=device, shares=2 * len(self.classes)
        )

    def expand(self, values: "Tensor", annotations: Sequence[Boxes], geometry: Geometry) -> Places:
        import torch

        features, proposals = geometry.places(values), _each(geometry.proposals(values), len(values))
        kept, targets, items = [], [], 0
        for own, boxes, found in zip(features, annotations, proposals, strict=True):
            used, columns = self._targets(boxes, geometry, found)
            weight = columns[:, : len(self.classes)].sum(1, keepdim=True)
            kept.append(own[used])
            targets.append(torch.cat([columns, weight * own[used].double()], 1))
            items += bool(used.any())
        return Places(torch.cat(kept), torch.cat(targets), items)

    def training_loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss of objectness, classes (both cross entropy) and shapes, per cell with a box.

        The sums over all cells are divided by the number of cells with a box, since nearly all have none.
        """
        from torch.nn import functional

        count = len(self.classes)
        weight = targets[:, :count]
        positive = weight.any(1)
        boxes = max(int(positive.sum()), 1)
        objects = slice(count, 2 * count)
        loss = functional.binary_cross_entropy_with_logits(outputs[:, objects], targets[:, objects], reduction="sum")
        loss = loss - (outputs[positive, :count].log_softmax(-1) * weight[positive]).sum()
        shape = [-1, count, len(SHAPE)]
        found, true = (one[positive, 2 * count :].reshape(shape) for one in (outputs, targets))
        own = weight[positive]
        # Targets of shapes are multiplied by the weights of cells.
        true = true / own.masked_fill(own == 0, 1)[..., None]
        apart = functional.smooth_l1_loss(found, true, reduction="none", beta=0.1).sum(-1)
        return (loss + (apart * own).sum()) / boxes

    def summed_classes(self, annotation: Boxes, geometry: Geometry, proposals: "Tensor | None" = None) -> BoolArray:
        _, columns = self._targets(annotation, geometry, proposals)
        marked: BoolArray = columns[:, : len(self.classes)].any(0).numpy()
        return marked

    def _targets(self, boxes: Boxes, geometry: Geometry, proposals: "Tensor | None") -> "tuple[Tensor, Tensor]":
        """Return which places `[P]` are learned from, and the targets of these `[p, 6 C]`.

        With the class `y` of the box that a place finds as marks `[C]`, its weight `w`, objectness `o` and shape `t`,
        targets are `(w y, o y, w y t^T)`.
        """
        import torch
        from torch.nn import functional

        corners = torch.from_numpy(boxes.corners)
        ignored = torch.from_numpy(boxes.ignored)
        if proposals is None:
            given, known = assign(corners[~ignored], geometry.grid), ~within(corners[ignored], geometry.grid)
        else:
            given = match(corners[~ignored], proposals)
            known = with_area(proposals) & ~beside(corners[ignored], proposals)
        positive = given.box >= 0
        labels = torch.from_numpy(boxes.labels)[~ignored]
        marked = torch.zeros(len(positive), len(self.classes), dtype=torch.float64)
        marked[positive] = functional.one_hot(labels[given.box[positive]], len(self.classes)).double()
        used = positive | known
        weight, objectness = (marked * one[:, None] for one in (given.weight, given.objectness))
        return used, torch.cat([weight, objectness, (weight[:, :, None] * given.shape[:, None]).flatten(1)], 1)[used]

    def unlearned(self, stats: FeatureStatistics) -> tuple[str, ...]:
        counts = stats.counts[: len(self.classes)].tolist()
        return tuple(name for name, places in zip(self.classes, counts, strict=True) if places <= 0)

    # Evaluation.

    def found(self, outputs: "Tensor", geometry: Geometry, proposals: "Tensor | None" = None) -> Found:
        """Return the boxes of an item, as shares of its width and height, given the outputs `[P, 6 C]`."""
        return find_boxes(*self.candidates(outputs, geometry, proposals))

    def candidates(
        self, outputs: "Tensor", geometry: Geometry, proposals: "Tensor | None" = None
    ) -> "tuple[Tensor, Tensor]":
        """Return boxes `[..., P, C, 4]` of all places and their scores `[..., P, C]`, with torch operations only."""
        count = len(self.classes)
        scores = outputs[..., :count].softmax(-1) * outputs[..., count : 2 * count].sigmoid()
        shapes = outputs[..., 2 * count :].reshape(*outputs.shape[:-1], count, len(SHAPE))
        return corners_of(shapes, geometry.grid) if proposals is None else refined(shapes, proposals), scores

    def decode(
        self, outputs: "Tensor", geometry: Geometry, size: tuple[int, int], proposals: "Tensor | None" = None
    ) -> list[dict[str, Any]]:
        """Return the boxes of an image as JSON types: class, score, and left, top, width and height in pixels."""
        found = self.found(outputs, geometry, proposals)
        height, width = size
        pixels = found.corners * found.corners.new_tensor([width, height, width, height])
        return [
            {
                "class": self.classes[label],
                "score": round(score, 4),
                "bbox": [round(side, 2) for side in (left, top, right - left, bottom - top)],
            }
            for (left, top, right, bottom), score, label in zip(
                pixels.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
        ]

    def summarise(self, decoded: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[float, ...]]:
        """Return the boxes with a score of `SHOWN` or more, and their number of each class."""
        shown = [one for one in decoded if one["score"] >= SHOWN]
        return shown, tuple(float(sum(one["class"] == name for one in shown)) for name in self.classes)

    def drawings(self, decoded: list[dict[str, Any]], image: "Image") -> "dict[str, Image]":
        """Return the image with the boxes that `summarise` counts."""
        return {"-boxes.png": self.drawn(decoded, image)}

    def drawn(self, decoded: list[dict[str, Any]], image: "Image") -> "Image":
        """Return the image with the boxes that `summarise` counts."""
        shown, _ = self.summarise(decoded)
        titles = [f"{one['class']} {one['score']:.2f}" for one in shown]
        kinds = [self.classes.index(one["class"]) for one in shown]
        return draw_boxes(image, [one["bbox"] for one in shown], titles, kinds)

    def drawn_truth(self, annotation: Boxes, image: "Image") -> "Image":
        """Return the image with true boxes, without ignored ones."""
        corners = annotation.corners[~annotation.ignored] * np.tile(image.size, 2)
        labels = annotation.labels[~annotation.ignored].tolist()
        sides = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).tolist()
        return draw_boxes(image, sides, [self.classes[label] for label in labels], labels)

    def program(
        self, outputs: "Tensor", unlearned: "Tensor", geometry: Geometry, proposals: "Tensor | None" = None
    ) -> "Tensor":
        """Return boxes and scores `[n, P, C, 5]` of all places, without suppressing overlapping ones."""
        import torch

        corners, scores = self.candidates(outputs.masked_fill(unlearned, -float("inf")), geometry, proposals)
        return torch.cat([corners, scores[..., None]], -1)

    def program_shape(self, geometry: Geometry) -> list[int]:
        return [geometry.num_places, len(self.classes), len(SHAPE) + 1]

    def count_items(
        self, outputs: "Tensor", annotations: Sequence[Boxes], geometry: Geometry, proposals: "Tensor | None" = None
    ) -> DetectionSums:
        total = self.no_rows()
        places = _each(proposals, len(outputs))
        for own, boxes, found in zip(outputs.cpu().double(), annotations, places, strict=True):
            if not bool(own.isfinite().all()):
                raise ValueError("The head produces outputs that are not finite.")
            total = total + self._of_item(own, boxes, geometry, found)
        return total

    def _of_item(
        self, outputs: "Tensor", boxes: Boxes, geometry: Geometry, proposals: "Tensor | None"
    ) -> DetectionSums:
        from torch.nn import functional

        found = self.found(outputs, geometry, proposals)
        used, targets = self._targets(boxes, geometry, proposals)
        count = len(self.classes)
        objects = slice(count, 2 * count)
        loss = functional.binary_cross_entropy_with_logits(outputs[used, objects], targets[:, objects])
        return detection_sums(
            found.corners.numpy(),
            found.scores.numpy(),
            found.labels.numpy(),
            boxes.corners,
            boxes.labels,
            boxes.ignored,
            count,
            float(loss) if len(targets) else 0.0,
        )

    def no_rows(self, bins: ScoreBins | None = None) -> DetectionSums:
        return DetectionSums.zeros(len(self.classes))

    def score_of(self, sums: DetectionSums) -> float | None:
        return self.report(sums).ap50.value

    def report(self, sums: DetectionSums) -> DetectionReport:
        return detection_report(sums, self.classes)

    def curves(self, sums: DetectionSums) -> dict[str, Any]:
        """Return each class's average precision at each overlap; null for classes without boxes."""
        table = average_precisions(sums)
        return {"average_precision": [[None if value != value else value for value in row] for row in table.tolist()]}

    # Predictions.

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        """Return the outputs with the logits of unlearned classes at minus infinity."""
        return outputs.masked_fill(unlearned, -float("inf"))

    @property
    def description(self) -> str:
        return f"a detector of {counted(len(self.classes), 'class', 'classes')} of objects"

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        return [f"number of {name}" for name in self.classes]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        return [f"{number:.0f}" for number in answers] if answers else [""] * len(self.classes)

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        return {"boxes": decision}

    def decide(self, answers: "Tensor") -> list[Any]:
        raise UserError("A detector decides by image: its boxes are found together.")


def _each(proposals: "Tensor | None", items: int) -> "Sequence[Tensor | None]":
    """Return the boxes `[P, 4]` of each item's places; None for cells."""
    return [None] * items if proposals is None else list(proposals.cpu())


def _columns(classes: Sequence[str]) -> tuple[str, ...]:
    shapes = (f"{name}: {part}" for name in classes for part in SHAPE)
    return (*classes, *(f"{name}: {OBJECTNESS}" for name in classes), *shapes)
