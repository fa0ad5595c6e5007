"""TransferModel: a backbone and a head that classify images or texts; what a run delivers."""

from collections.abc import Iterable, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedhead.backbones import Backbone, load_backbone
from fedhead.backbones.backbone import digest_tensors
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.calibration import Calibration
from fedhead.data import UnreadableSampleError, read_image, read_text, to_image
from fedhead.errors import FedheadError, UserError
from fedhead.files import write_atomically
from fedhead.heads import Head, make_head

MODEL_FILE = "model.safetensors"
BACKBONE_FILE = "backbone.safetensors"

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Description(BaseModel):
    """What a model's file says beside the head's tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fedhead-model-1"] = "fedhead-model-1"
    backbone: str
    layer: str
    backbone_digest: Digest
    weights_digest: Digest
    head: str
    head_digest: Digest
    classes: tuple[str, ...]
    multi_label: bool = False
    temperature: float = 1.0
    scores: tuple[int, ...] = ()
    unlearned: tuple[str, ...] = ()


class TransferModel:
    """Images, or texts, to class probabilities: of the classes together, or for a multi-label model of each by itself.

    Args:
        backbone: frozen.
        head: its number of features is the backbone's.
        classes: the names of the head's outputs.
        head_spec: what `make_head` builds the head from.
        multi_label: whether an image or text may have any number of the classes.
        calibration: what makes its probabilities come true.
        unlearned: classes that no site had rows of; they are never predicted.

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
        multi_label: bool = False,
        calibration: Calibration | None = None,
        unlearned: Sequence[str] = (),
    ) -> None:
        if head.num_features != backbone.num_features:
            raise UserError(
                f"The head takes {head.num_features} features, but {backbone.spec} gives {backbone.num_features}."
            )
        if head.num_classes != len(classes):
            raise UserError(f"The head has {head.num_classes} outputs for {len(classes)} class names.")
        self.backbone = backbone
        self.head = head.eval()
        self.classes = tuple(classes)
        self.head_spec = head_spec
        self.multi_label = multi_label
        self.calibration = calibration or Calibration()
        self.unlearned = tuple(unlearned)

    def __repr__(self) -> str:
        return f"TransferModel({self.backbone.spec!r}, {self.head_spec!r}, {len(self.classes)} classes)"

    @torch.inference_mode()
    def probabilities(self, items: Iterable[Any], *, batch_size: int = 64) -> Tensor:
        """Return class probabilities `[n, C]`; a row sums to 1 unless the model is multi-label.

        Args:
            items: for a backbone of images: paths, PIL images, arrays or tensors. For one of texts: the texts
                themselves as strings, or as `Path`s the files that hold one each, in UTF-8.
            batch_size: how many are read and go through the backbone together.

        Raises:
            UnreadableSampleError: naming the item that is no image or text.
        """
        remaining = iter(items)
        read = _read_text if self.backbone.kind == "text" else _read_image
        parts = []
        while batch := list(islice(remaining, batch_size)):
            features = self.backbone.features_of([read(item) for item in batch])
            logits = self.head.to(features.device)(features)
            parts.append(self.probabilities_of(logits).cpu())
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def probabilities_of(self, logits: Tensor) -> Tensor:
        """Return class probabilities `[n, C]` of logits `[n, C]`: calibrated, and 0 for unlearned classes."""
        learned = torch.tensor([name not in self.unlearned for name in self.classes], device=logits.device)
        logits = (logits / self.calibration.temperature).masked_fill(~learned, -torch.inf)
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def sets(self, probabilities: Tensor, coverage: float) -> list[tuple[str, ...]]:
        """Return for each row of `probabilities` `[n, C]` a set of classes that holds the true one with `coverage`.

        Classes come by falling probability, at least one of them; see `Calibration.least_probability`.

        Raises:
            UserError: for a multi-label model, one without calibration, or a coverage that is not between 0 and 1.
        """
        if self.multi_label:
            raise UserError("Sets with a coverage are for models that give one class; this one is multi-label.")
        try:
            least = self.calibration.least_probability(coverage)
        except ValueError as error:
            raise UserError(str(error)) from None
        values, order = probabilities.sort(stable=True, dim=1, descending=True)
        sizes = (values >= least).sum(1).clamp(min=1).tolist()
        return [
            tuple(name for index in row[:size] if (name := self.classes[index]) not in self.unlearned)
            for row, size in zip(order.tolist(), sizes, strict=True)
        ]

    def predict(self, items: Iterable[Any], *, batch_size: int = 64) -> list[str] | list[tuple[str, ...]]:
        """Return the most probable class of each item, or if multi-label those above one half; see `probabilities`."""
        probabilities = self.probabilities(items, batch_size=batch_size)
        if self.multi_label:
            return [tuple(compress(self.classes, row)) for row in (probabilities > 0.5).tolist()]
        return [self.classes[index] for index in probabilities.argmax(-1).tolist()]

    def save(self, path: Path | str) -> None:
        """Write the head as safetensors, with the backbone by its digest and the classes; nothing in it can run."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        described = _Description(
            backbone=self.backbone.spec,
            layer=self.backbone.layer,
            backbone_digest=self.backbone.digest,
            weights_digest=self.backbone.weights_digest,
            head=self.head_spec,
            head_digest=digest_tensors(tensors),
            classes=self.classes,
            multi_label=self.multi_label,
            temperature=self.calibration.temperature,
            scores=self.calibration.scores,
            unlearned=self.unlearned,
        )
        write_atomically(Path(path), save(tensors, {"model": described.model_dump_json()}))

    @classmethod
    def load(cls, path: Path | str, backbone: Backbone | None = None, *, weights: str = "") -> Self:
        """Read what `save` wrote.

        Args:
            path: the file, or a run folder that holds one.
            backbone: the model's, where it is at hand.
            weights: the backbone's file, where this machine has none.

        Raises:
            UserError: if the file is missing, damaged or not a model's, or `backbone` is another one.
            FedheadError: if its backbone is not on this machine.
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
        if backbone is None:
            raise FedheadError(
                f"The weights of {described.backbone} are not on this machine: looked for {beside} and "
                f"{weights_path(described.weights_digest)}. Bring their file and name it with --weights "
                f"FILE, put {BACKBONE_FILE} beside the model, or load the backbone here once, as its site did."
            )
        if backbone.digest != described.backbone_digest:
            raise UserError(
                f"The model {path} belongs to another backbone than {backbone.spec} with digest "
                f"{backbone.digest[:12]}…: its own is {described.backbone}, {described.backbone_digest[:12]}…."
            )
        head = make_head(described.head, backbone.num_features, len(described.classes))
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"The model {path} is damaged: {error}") from None
        return cls(
            backbone,
            head,
            described.classes,
            described.head,
            multi_label=described.multi_label,
            calibration=Calibration(described.temperature, described.scores),
            unlearned=described.unlearned,
        )


def _in_run_folder(folder: Path) -> Path:
    path = folder / MODEL_FILE
    if not path.is_file() and (folder / "run.toml").is_file():
        raise UserError(
            f"The run {folder} has not finished, so it has no model yet; go on with it by --resume {folder}."
        )
    return path


def _read(path: Path) -> tuple[_Description, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("model", "")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model {path} cannot be read: {error}.") from None
    if not text:
        raise UserError(f"{path} is not a model that fedhead saved.")
    try:
        described = _Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its description"
        raise UserError(f"The model {path} is none that this version reads; {where}: {first['msg']}.") from None
    if digest_tensors(tensors) != described.head_digest:
        raise UserError(f"The model {path} is damaged: its weights are not those that were saved.")
    return described, tensors


def _read_image(item: Any) -> Image.Image:
    return read_image(Path(item)) if isinstance(item, str | Path) else to_image(item, "the image")


def _read_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Path):
        return read_text(item)
    raise UnreadableSampleError(f"This model reads texts, and was given {type(item).__name__}; expected str or Path.")
