"""Segmentation: a class for each pixel, from the maps of a frozen backbone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedhead.backbones.geometry import Geometry
from fedhead.data import BoolArray, Samples
from fedhead.data.masks import IGNORED
from fedhead.data.overlays import mask_image, overlay
from fedhead.errors import UserError
from fedhead.evaluation.segmentation import SegmentationReport, segmentation_report
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.segmentation import SegmentationSums
from fedhead.tasks.dense import DenseTask, Places
from fedhead.tasks.losses import ShareCrossEntropy
from fedhead.tasks.task import Targets, tasks
from fedhead.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Mask = npt.NDArray[np.uint8]

LEAST_KNOWN = 0.5
"""Share of a cell's pixels that must have a class; other cells are not learned from."""


@tasks.register("segmentation")
class Segmentation(DenseTask):
    """A class for each pixel: targets of places are the shares of classes in a cell of the finest map."""

    name = "segmentation"
    score_name = "miou"
    score_title = "Mean IoU"
    loss = ShareCrossEntropy()
    answer_name = "probabilities"
    answer_meaning = (
        "Probabilities of each class in each pixel of the prepared image (not calibrated), as batch, classes, height, "
        "width; resize them to the original image bilinearly and take the largest."
    )
    family = "classification"
    misfit = "Its masks do not fit the classes of this run; the site's own log has the details."
    solvers = ("lda-shares", "ridge")
    baseline_solver = "lda-shares"

    def check_columns(self) -> None:
        if not 2 <= len(self.columns) < IGNORED:
            raise UserError(
                f"A segmentation needs 2 to {IGNORED - 1} classes, the background included; this run has "
                f"{list(self.columns)[:5]}."
            )

    @classmethod
    def columns_of(cls, samples: Samples) -> tuple[str, ...]:
        return samples.classes

    @classmethod
    def require(cls, samples: Samples) -> None:
        if samples.annotation is None or samples.annotated != "mask":
            raise UserError(
                "This run segments images, but its data has no masks. Name them as in 'masks:IMAGES?masks=FOLDER'."
            )

    def encode(self, samples: Samples) -> Targets:
        self.require(samples)
        known = {name: place for place, name in enumerate(samples.classes)}
        if unknown := self.unknown(samples):
            raise UserError(
                f"The masks of {samples.spec} have the class {unknown[0]!r}, which this run does not know. Its classes "
                f"are: {', '.join(self.columns)}."
            )
        for name in self.columns:
            if name not in known:
                raise UserError(
                    f"The masks of {samples.spec} do not annotate the class {name!r} of this run, so its pixels would "
                    f"count as others. Annotated are: {', '.join(samples.classes)}. If it is annotated and only absent "
                    "here, list all classes in the spec, as in ?classes=background,nucleus."
                )
        return samples.labels[:, [known[name] for name in self.columns]]

    def unknown(self, samples: Samples) -> list[str]:
        held = samples.labels.sum(0).tolist()
        return sorted(name for name, one in zip(samples.classes, held, strict=True) if one and name not in self.columns)

    def annotations(self, samples: Samples) -> Callable[[int], Mask]:
        assert samples.annotation is not None
        read = samples.annotation
        table = np.full(256, IGNORED, np.uint8)
        places = {name: place for place, name in enumerate(self.columns)}
        for place, name in enumerate(samples.classes):
            table[place] = places.get(name, IGNORED)
        return lambda row: table[read(row)]

    def statistics(self, num_features: int, origin: "Tensor | None" = None, device: "str" = "cpu") -> FeatureStatistics:
        """Return the sums of no places, whose targets are shares."""
        columns = len(self.columns)
        return FeatureStatistics.empty(num_features, columns, origin, kind=self.kind, device=device, shares=columns)

    def expand(self, values: "Tensor", annotations: Sequence[Mask], geometry: Geometry) -> Places:
        import torch

        shares = torch.stack([self._shares(mask, geometry) for mask in annotations])
        known = shares.sum(2)
        used = known >= LEAST_KNOWN
        targets = shares[used] / known[used][:, None]
        return Places(geometry.places(values)[used], targets, int(used.any(1).sum()))

    def summed_classes(self, annotation: Mask, geometry: Geometry, proposals: "Tensor | None" = None) -> BoolArray:
        if not (annotation == IGNORED).any():
            return np.bincount(annotation.ravel(), minlength=len(self.columns)) > 0
        shares = self._shares(annotation, geometry)
        marked: BoolArray = (shares[shares.sum(1) >= LEAST_KNOWN] > 0).any(0).numpy()
        return marked

    def _shares(self, mask: Mask, geometry: Geometry) -> "Tensor":
        """Return `[P, C]`, float64, the share of each class among all pixels of a cell."""
        import torch
        from torch.nn import functional

        pixels = torch.from_numpy(mask.astype(np.int64))
        marked = functional.one_hot(pixels.clamp(max=len(self.columns)), len(self.columns) + 1)
        maps = marked.movedim(-1, 0)[:-1].double()
        return functional.adaptive_avg_pool2d(maps, geometry.grid).flatten(1).T

    def pixels(self, outputs: "Tensor", geometry: Geometry, size: tuple[int, int]) -> "Tensor":
        """Return logits `[C, height, width]` of an image's pixels, from those of its cells `[P, C]`, bilinearly."""
        from torch.nn import functional

        maps = outputs.T.reshape(1, outputs.shape[1], *geometry.grid)
        return functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]

    def decode(
        self, outputs: "Tensor", geometry: Geometry, size: tuple[int, int], proposals: "Tensor | None" = None
    ) -> Mask:
        """Return the class numbers of an image's pixels, uint8 `[height, width]`."""
        decided: Mask = self.pixels(outputs, geometry, size).argmax(0).byte().cpu().numpy()
        return decided

    def summarise(self, decoded: Mask) -> tuple[str, tuple[float, ...]]:
        """Return the class with the most pixels, and each class's share of the pixels."""
        shares = np.bincount(decoded.ravel(), minlength=len(self.columns)) / decoded.size
        return self.columns[int(shares.argmax())], tuple(shares.tolist())

    def drawings(self, decoded: Mask, image: "Image") -> "dict[str, Image]":
        """Return the mask of class numbers, with colours as its palette, and the image with the classes' colours."""
        return {".png": mask_image(decoded), "-overlay.png": self.drawn(decoded, image)}

    def drawn(self, decoded: Mask, image: "Image") -> "Image":
        """Return the image with the classes' colours."""
        return overlay(image, decoded)

    def drawn_truth(self, annotation: Mask, image: "Image") -> "Image":
        """Return the image with the classes' colours; pixels without a class look like the first one."""
        known = np.where(annotation == IGNORED, np.uint8(0), annotation)
        return overlay(image, np.asarray(mask_image(known).resize(image.size)))

    def program(
        self, outputs: "Tensor", unlearned: "Tensor", geometry: Geometry, proposals: "Tensor | None" = None
    ) -> "Tensor":
        """Return the probabilities of each class `[n, C, height, width]` in the pixels of the prepared image."""
        from torch.nn import functional

        maps = outputs.mT.reshape(-1, outputs.shape[2], *geometry.grid)
        pixels = functional.interpolate(maps, geometry.size, mode="bilinear", align_corners=False)
        return pixels.masked_fill(unlearned[:, None, None], -float("inf")).softmax(1)

    def program_shape(self, geometry: Geometry) -> list[int]:
        return [len(self.columns), *geometry.size]

    def count_items(
        self, outputs: "Tensor", annotations: Sequence[Mask], geometry: Geometry, proposals: "Tensor | None" = None
    ) -> SegmentationSums:
        total = self.no_rows()
        for own, mask in zip(outputs.cpu(), annotations, strict=True):
            if not bool(own.isfinite().all()):
                raise ValueError("The head produces logits that are not finite.")
            total = total + self._of_item(own, mask, geometry)
        return total

    def _of_item(self, outputs: "Tensor", mask: Mask, geometry: Geometry) -> SegmentationSums:
        predicted = self.decode(outputs, geometry, (mask.shape[0], mask.shape[1]))
        known, columns = mask != IGNORED, len(self.columns)
        pairs = mask[known].astype(np.int64) * columns + predicted[known]
        confusion = np.bincount(pairs, minlength=columns**2).reshape(columns, columns)
        shares = self._shares(mask, geometry)
        used = shares.sum(1) >= LEAST_KNOWN
        loss = self.loss.values(outputs[used].double(), shares[used] / shares[used].sum(1, keepdim=True))
        return SegmentationSums.of_item(confusion, float(loss.mean()) if len(loss) else 0.0)

    def no_rows(self, bins: ScoreBins | None = None) -> SegmentationSums:
        return SegmentationSums.zeros(len(self.columns))

    def score_of(self, sums: SegmentationSums) -> float | None:
        return self.report(sums).miou.value

    def report(self, sums: SegmentationSums) -> SegmentationReport:
        return segmentation_report(sums, self.columns)

    def curves(self, sums: SegmentationSums) -> dict[str, Any]:
        return {"pixels": sums.confusion.tolist()}

    def answers(self, outputs: "Tensor", temperature: float, unlearned: "Tensor") -> "Tensor":
        return outputs.masked_fill(unlearned, -float("inf")).softmax(-1)

    @property
    def description(self) -> str:
        return f"a segmentation of images into {counted(len(self.columns), 'class', 'classes')}"

    def header(self, *, every: bool = False, regions: bool = False) -> list[str]:
        return [f"share of {name}" for name in self.columns]

    def cells(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> list[str]:
        return [f"{share:.4f}" for share in answers] if answers else [""] * len(self.columns)

    def record(
        self, decision: Any, answers: Sequence[float], region: Any, *, every: bool = False, regions: bool = False
    ) -> dict[str, Any]:
        shares: Mapping[str, float] = dict(zip(self.columns, answers, strict=True))
        return {"shares": dict(shares)}

    def decide(self, answers: "Tensor") -> list[str]:
        """Return the class with the largest share of each image."""
        return [self.columns[index] for index in answers.argmax(-1).tolist()]
