"""TransferModel: a backbone and a head that classify or regress images, texts or tables; the result of a run."""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.digests import digest_tensors
from fedhead.backbones.tail_file import TAIL_FILE, TailFile, load_tail, with_adapters
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.data import Item
from fedhead.data.conversion import items_of
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.foreign import Foreign, foreign_file
from fedhead.files import home, safe_name, write_atomically
from fedhead.heads import Head, make_delivered
from fedhead.sums.calibration import Calibration
from fedhead.tasks import make_task
from fedhead.tasks.dense import DenseTask

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
BACKBONE_FILE = "backbone.safetensors"
PARTS = 512
"""Parts of an item whose features are computed at a time."""

UNLEARNED_MARGIN = 50.0
"""Distance of unlearned classes below all outputs."""

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Description(BaseModel):
    """Metadata in a model's file, beside the head's tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fedhead-model-1"] = "fedhead-model-1"
    backbone: str
    layer: str
    backbone_digest: Digest
    weights_digest: Digest
    head: str
    head_digest: Digest
    classes: tuple[str, ...]
    task: str = "classification"
    temperature: float = 1.0
    scores: tuple[int, ...] = ()
    residuals: tuple[tuple[int, ...], ...] = ()
    spread: tuple[float, ...] = ()
    unlearned: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _multi_label_is_a_task(cls, values: Any) -> Any:
        """Convert the key of earlier versions to the task."""
        if isinstance(values, dict) and "multi_label" in values:
            values = {"task": "multi-label" if values["multi_label"] is True else "classification", **values}
            del values["multi_label"]
        return values


class TransferModel:
    """A map from images, texts or rows of numbers to answers: class probabilities, or values.

    Args:
        backbone: the frozen backbone.
        head: the head; its number of features is the backbone's.
        classes: the names of the head's outputs.
        head_spec: the spec of the head for `make_delivered`.
        task: the name of the task.
        calibration: the temperature, and the held-out rows behind sets and intervals.
        unlearned: classes without rows at any site; they are never predicted.
        foreign: the test for inputs that are unlike the sites' rows, if any.

    Raises:
        UserError: if the dimensions do not fit each other.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        classes: Sequence[str],
        head_spec: str = "linear",
        *,
        task: str = "classification",
        calibration: Calibration | None = None,
        unlearned: Sequence[str] = (),
        foreign: Foreign | None = None,
    ) -> None:
        if head.num_features != backbone.num_features:
            raise UserError(
                f"The head takes {head.num_features} features, but {backbone.spec} produces {backbone.num_features}."
            )
        if head.num_classes != len(classes):
            raise UserError(f"The head has {head.num_classes} outputs for {len(classes)} class names.")
        self.backbone = backbone
        self.head = head.eval()
        self.classes = tuple(classes)
        self.head_spec = head_spec
        self.task = make_task(task, classes)
        self.calibration = calibration or Calibration()
        self.unlearned = tuple(unlearned)
        self.foreign = foreign

    def __repr__(self) -> str:
        return f"TransferModel({self.backbone.spec!r}, {self.head_spec!r}, {len(self.classes)} classes)"

    @torch.inference_mode()
    def answers(self, items: Iterable[Any], *, batch_size: int = 64) -> Tensor:
        """Return the answers `[n, C]`: class probabilities (rows sum to 1 unless multi-label), or values.

        Args:
            items: for image backbones: paths, PIL images, arrays or tensors. For text backbones: strings, or the
                `Path`s of files in UTF-8. For backbones of rows of numbers: a frame, or numbers by column for each row.
                Series and frames are read by position.
            batch_size: the number of items per forward pass.

        Raises:
            UnreadableSampleError: naming the item that cannot be read.
        """
        remaining = items_of(items, self.backbone.kind, getattr(self.backbone.preprocessing, "columns", ()))
        parts = []
        while batch := list(islice(remaining, batch_size)):
            parts.append(self.answers_of(self.outputs(self.backbone.features_of(batch))).cpu())
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def outputs(self, features: Tensor) -> Tensor:
        """Return the head's outputs `[n, C]`, or `[n, P, C]` at all places, given the backbone's output."""
        geometry = self.backbone.geometry
        rows = features if geometry is None else geometry.places(features)
        outputs: Tensor = self.head.to(features.device)(rows)
        return outputs

    def decoded(self, features: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Any]:
        """Return the predictions of a task about places, such as masks.

        Args:
            features: the backbone's output for `n` items.
            sizes: `n`, the height and width of each item.

        Raises:
            UserError: if the model predicts whole items.
        """
        geometry = self.backbone.geometry
        if not isinstance(self.task, DenseTask) or geometry is None:
            raise UserError(f"This model is {self.task.description}: it predicts whole items and not their places.")
        outputs = self.outputs(features)
        # Finite, since outputs are interpolated.
        lowest = outputs.min() - UNLEARNED_MARGIN
        outputs = torch.where(self.unlearned_mask.to(outputs.device), lowest, outputs)
        found = geometry.proposals(features)
        proposals = [None] * len(sizes) if found is None else list(found)
        return [
            self.task.decode(one, geometry, size, own) for one, size, own in zip(outputs, sizes, proposals, strict=True)
        ]

    def probabilities(self, items: Iterable[Any], *, batch_size: int = 64) -> Tensor:
        """Return class probabilities `[n, C]`; see `answers`.

        Raises:
            UserError: if the model's answers are not probabilities.
            UnreadableSampleError: naming the item that cannot be read.
        """
        if self.task.answer_name != "probabilities":
            raise UserError(f"This model gives {self.task.answer_name}, not probabilities; use TransferModel.answers.")
        return self.answers(items, batch_size=batch_size)

    def require_items(self, what: str) -> None:
        """Check that the model predicts whole items.

        Raises:
            UserError: naming `what` needs them, if it predicts places of items.
        """
        if self.task.dense or self.head_spec == "none":
            raise UserError(f"{what} needs a model of whole items; this one is {self.task.description}.")

    @property
    def unlearned_mask(self) -> Tensor:
        """`[C]`, bool: the unlearned classes."""
        return torch.tensor([name in self.unlearned for name in self.classes])

    def answers_of(self, outputs: Tensor) -> Tensor:
        """Convert the head's outputs `[n, C]` to the task's answers `[n, C]`: values, or calibrated probabilities.

        Unlearned classes have probability 0.
        """
        return self.task.answers(outputs, self.calibration.temperature, self.unlearned_mask.to(outputs.device))

    def sets(self, answers: Tensor, coverage: float) -> list[tuple[Any, ...]]:
        """Return a region for each row of `answers` `[n, C]` that contains the truth with probability `coverage`.

        For classes, a set of at least one, by descending probability; see `Calibration.least_probability`. For real
        targets, a lower and an upper limit of each; see `fedhead.evaluation.regression.half_width`.

        Raises:
            UserError: for a multi-label model, one without calibration, or a coverage that is not between 0 and 1.
        """
        regions = self.task.regions(answers, self.calibration, coverage)
        return [tuple(one for one in region if one not in self.unlearned) for region in regions]

    def predict(self, items: Iterable[Any], *, batch_size: int = 64) -> list[Any]:
        """Return the prediction for each item: the most probable class, all classes above one half, or numbers.

        For tasks about places, what `decode` of the task returns, such as masks of class numbers `[height, width]`.
        """
        if self.task.divides_items:
            columns = getattr(self.backbone.preprocessing, "columns", ())
            return [self.predict_item(item) for item in items_of(items, self.backbone.kind, columns)]
        if self.task.dense:
            return list(self._places(items, batch_size))
        return self.task.decide(self.answers(items, batch_size=batch_size))

    @torch.inference_mode()
    def _places(self, items: Iterable[Any], batch_size: int) -> Iterator[Any]:
        remaining = items_of(items, self.backbone.kind)
        while batch := list(islice(remaining, batch_size)):
            yield from self.decoded(self.backbone.features_of(batch), [size_of(one) for one in batch])

    @torch.inference_mode()
    def predict_item(self, item: Item) -> Any:
        """Return the prediction for one item of a task that divides items."""
        parts = self.task.parts(item)
        blocks = [torch.empty(0, len(self.classes))]
        for start in range(0, len(parts), PARTS):
            features = self.backbone.features_of(parts[start : start + PARTS])
            blocks.append(self.answers_of(self.head.to(features.device)(features)).cpu())
        return self.task.joined(item, torch.cat(blocks))

    def save(self, path: Path | str) -> None:
        """Write the head as safetensors, with the backbone's digest and the classes; nothing in it is executable.

        A test for foreign inputs is written beside it, to `NAME.foreign.safetensors`.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        described = _Description(
            backbone=self.backbone.spec,
            layer=self.backbone.layer,
            backbone_digest=self.backbone.digest,
            weights_digest=self.backbone.weights_digest,
            head=self.head_spec,
            head_digest=digest_tensors(tensors),
            classes=self.classes,
            task=self.task.name,
            temperature=self.calibration.temperature,
            scores=self.calibration.scores,
            residuals=self.calibration.residuals,
            spread=self.calibration.spread,
            unlearned=self.unlearned,
        )
        if self.foreign is not None:
            self.foreign.save(foreign_file(Path(path)), described.head_digest)
        write_atomically(Path(path), save(tensors, {"model": described.model_dump_json()}))

    @classmethod
    def load(cls, path: Path | str, backbone: Backbone | None = None, *, weights: str = "") -> Self:
        """Load a saved model.

        Args:
            path: the file, or a run folder that contains one.
            backbone: the model's backbone, if already loaded.
            weights: the backbone's weights file, if this machine has not cached it.

        Raises:
            UserError: if the file is missing, damaged or not a model's, or `backbone` is another one.
            FedheadError: if the backbone's weights are not on this machine.
        """
        path = Path(path)
        if path.is_dir():
            path = _in_run_folder(path)
        described, tensors = _read(path)
        if backbone is None and weights:
            backbone = load_backbone(described.backbone, weights=weights, layer=described.layer)
        beside = path.with_name(BACKBONE_FILE)
        if backbone is None and beside.is_file():
            backbone = Backbone.load(beside)
        if backbone is None:
            backbone = find_backbone(described.backbone, described.layer, described.weights_digest)
        adapted = None
        if (file := path.with_name(TAIL_FILE)).is_file() and (
            backbone is None or backbone.digest != described.backbone_digest
        ):
            adapted = _tuned(load_tail(file), backbone, described)
        backbone = adapted or backbone
        if backbone is None:
            raise FedheadError(
                f"The weights of {described.backbone} are not on this machine: they are neither at {beside} nor at "
                f"{weights_path(described.weights_digest)}. Copy their file here and pass it with --weights FILE, put "
                f"{BACKBONE_FILE} beside the model, or load the backbone here once, as on the site."
            )
        # Sums of products may be rounded differently on another machine. The adapted backbone keeps its own digest, by
        # which its features are cached.
        if adapted is None and backbone.digest != described.backbone_digest:
            raise UserError(
                f"The model {path} needs another backbone than {backbone.spec} with digest "
                f"{backbone.digest[:12]}…: its own is {described.backbone}, {described.backbone_digest[:12]}…."
            )
        head = make_delivered(described.head, backbone.num_features, len(described.classes))
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"The model {path} is damaged: {error}") from None
        return cls(
            backbone,
            head,
            described.classes,
            described.head,
            task=described.task,
            calibration=Calibration(described.temperature, described.scores, described.residuals, described.spread),
            unlearned=described.unlearned,
            foreign=_foreign(path, described.head_digest, backbone.num_features),
        )


def _tuned(tail: TailFile, base: Backbone | None, described: _Description) -> Backbone | None:
    """Return the backbone with the adapters of a run, if their pretrained weights are given or on this machine."""
    if tail.tune.method != "lora" or (tail.spec, tail.layer) != (described.backbone, described.layer):
        return None
    base = base or find_backbone(tail.spec, tail.layer, tail.weights_digest)
    if base is None or base.weights_digest != tail.weights_digest:
        return None
    return with_adapters(base, tail)


def size_of(item: Item) -> tuple[int, int]:
    """Return the height and width of an image; 0 and 0 of other items."""
    return (item.height, item.width) if isinstance(item, Image.Image) else (0, 0)


def site_model_path(site: str) -> Path:
    """Return where the personal model of a site is kept on the site's machine."""
    return home() / "site-models" / f"{safe_name(site)}.safetensors"


def new_site_model(site: str, *, tuned: bool) -> Path:
    """Return the path of a site's new personal model, whose folder exists.

    Args:
        site: its name.
        tuned: whether the model has a backbone of its own, which is then beside it in a folder.
    """
    plain, folder = site_model_path(site), site_model_path(site).with_suffix("")
    path = folder / MODEL_FILE if tuned else plain
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def forget_other_kind(site: str, *, tuned: bool) -> None:
    """Delete a site's personal model of the other kind, once the new one is whole."""
    plain = site_model_path(site)
    if tuned:
        plain.unlink(missing_ok=True)
    else:
        shutil.rmtree(plain.with_suffix(""), ignore_errors=True)


def find_site_model(site: str) -> Path | None:
    """Return the file of a site's personal model on this machine; None without one."""
    plain = site_model_path(site)
    return next((path for path in (plain, plain.with_suffix("") / MODEL_FILE) if path.is_file()), None)


def _foreign(model: Path, head_digest: str, width: int) -> Foreign | None:
    path = foreign_file(model)
    if not path.is_file():
        return None
    found = Foreign.load(path, head_digest)
    if found is None:
        logger.warning("%s belongs to another model than %s and is not used.", path, model)
    elif found.distances.centre.shape != (width,):
        raise UserError(f"{path} is damaged: its distances are not of {width} features.")
    return found


def _in_run_folder(folder: Path) -> Path:
    path = folder / MODEL_FILE
    if not path.is_file() and (folder / "run.toml").is_file():
        raise UserError(f"The run {folder} has not finished and has no model yet; resume it with --resume {folder}.")
    return path


def _read(path: Path) -> tuple[_Description, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("model", "")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model {path} cannot be read: {error}.") from None
    if not text:
        raise UserError(f"{path} is not a fedhead model.")
    try:
        described = _Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its description"
        raise UserError(f"This version cannot read the model {path}; {where}: {first['msg']}.") from None
    if digest_tensors(tensors) != described.head_digest:
        raise UserError(f"The model {path} is damaged: its weights do not match their digest.")
    return described, tensors
