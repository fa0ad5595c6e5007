"""Boxes found by a model as COCO results: what `pycocotools.coco.COCO.loadRes` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedhead.data.coco import open_coco
from fedhead.data.inputs import COCO
from fedhead.data.specs import exists
from fedhead.errors import UserError
from fedhead.tasks.detection import Detection
from fedhead.tasks.task import Task

if TYPE_CHECKING:
    from fedhead.prediction import Prediction


@dataclass(frozen=True)
class CocoIds:
    """The ids of images and categories in COCO results.

    Attributes:
        categories: the id of each class.
        images: the id of each input by name; empty if inputs go by their names.
    """

    categories: Mapping[str, int]
    images: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, paths: Sequence[str]) -> "CocoIds":
        """Return the ids of a model's classes and inputs.

        Args:
            task: of the model.
            paths: of the inputs: one `coco:FILE.json?images=FOLDER`, whose ids are taken; or others, whose images go
                by their names, and classes by number from 1.

        Raises:
            UserError: if the model finds no boxes, `paths` has a COCO file beside others, or its categories lack a
                class of the model.
        """
        if not isinstance(task, Detection):
            raise UserError(f"COCO results hold boxes, and this model is {task.description}: write .csv or .jsonl.")
        listed = [one for one in paths if one.partition(":")[0] == COCO and not exists(one)]
        if not listed:
            return cls({name: number for number, name in enumerate(task.classes, 1)})
        if len(paths) > 1:
            raise UserError("COCO results refer to the images of one file: give one 'coco:' path and no others.")
        known = open_coco(listed[0].partition(":")[2])
        if missing := [name for name in task.classes if name not in known.categories]:
            raise UserError(
                f"{listed[0]} has no category {missing[0]!r}, which the model finds; its categories are "
                f"{', '.join(sorted(known.categories)[:20])}."
            )
        return cls({name: known.categories[name] for name in task.classes}, known.images)

    def results(self, prediction: "Prediction") -> list[dict[str, Any]]:
        """Return the boxes of an image, all that are evaluated, as objects of COCO results."""
        image = self.images[prediction.name] if self.images else prediction.name
        return [
            {
                "image_id": image,
                "category_id": self.categories[one["class"]],
                "bbox": one["bbox"],
                "score": one["score"],
            }
            for one in prediction.decoded
        ]
