"""A model as one module from prepared input to answers, and samples of its input."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedhead.backbones import Backbone
from fedhead.backbones.hf_audio import AudioEncoder
from fedhead.backbones.pooling import pool
from fedhead.backbones.proposals import Proposer
from fedhead.data import Clip, Item, Kind, TableRow
from fedhead.evaluation.foreign import Distances, Foreign
from fedhead.model import TransferModel
from fedhead.tasks.dense import DenseTask

EXCESS = "foreign"
"""Name of the second output of a program, for models that tell foreign inputs."""

Outputs = Tensor | tuple[Tensor, ...]
"""Answers `[n, C]`; for models that tell foreign inputs, these and `Foreign.excess` `[n]`."""


class Classifier(nn.Module):
    """Backbone and head as one module that returns calibrated probabilities."""

    def __init__(self, model: TransferModel) -> None:
        super().__init__()
        self.backbone = model.backbone.module
        self.head = model.head
        self.pooling = model.backbone.pooling
        self.excess = None if model.foreign is None else _Excess(model.foreign)
        self.answers_of = model.answers_of
        self.geometry = model.backbone.geometry
        self.task = model.task
        self.register_buffer("unlearned", model.unlearned_mask, persistent=False)

    def finish(self, output: Tensor, mask: Tensor | None) -> Outputs:
        features = pool(output, self.pooling, mask).to(torch.float32)
        if isinstance(self.task, DenseTask) and self.geometry is not None:
            return self.task.program(
                self.head(self.geometry.places(features)),
                self.get_buffer("unlearned"),
                self.geometry,
                self.geometry.proposals(features),
            )
        answers: Tensor = self.answers_of(self.head(features))
        return answers if self.excess is None else (answers, self.excess(features))


class _Excess(nn.Module):
    """`Foreign.excess` as a module, so that an exported program holds its tensors."""

    def __init__(self, foreign: Foreign) -> None:
        super().__init__()
        for name, tensor in foreign.distances.tensors().items():
            self.register_buffer(name, tensor)
        self.form = foreign.distances.form
        self.register_buffer("limits", torch.tensor(foreign.thresholds, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        buffers = dict(self.named_buffers())
        limits = buffers.pop("limits")
        return (Distances(**buffers, form=self.form)(features) / limits).max(1).values


class _ImageClassifier(Classifier):
    def forward(self, pixels: Tensor) -> Outputs:
        return self.finish(self.backbone(pixels), None)


class _TableClassifier(Classifier):
    def forward(self, features: Tensor) -> Outputs:
        return self.finish(self.backbone(features), None)


class _TextClassifier(Classifier):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        return self.finish(self.backbone(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


class _AudioClassifier(Classifier):
    def forward(self, clips: Tensor, lengths: Tensor | None = None) -> Outputs:
        return self.finish(self.backbone(clips, lengths), None)


def classifier_of(model: TransferModel) -> Classifier:
    """Return the module of a model for its kind of input, in evaluation mode."""
    modules: dict[Kind, type[Classifier]] = {
        "text": _TextClassifier,
        "table": _TableClassifier,
        "image": _ImageClassifier,
        "audio": _AudioClassifier,
    }
    return modules[model.backbone.kind](model).eval()


def by_image(backbone: Backbone) -> bool:
    """Return whether an exported program takes one image at a time."""
    return isinstance(backbone.module, Proposer) and backbone.module.by_image


def input_names(backbone: Backbone) -> list[str]:
    """Return the input names of an exported program."""
    if backbone.kind == "audio":
        return ["clips"] if isinstance(backbone.module, AudioEncoder) else ["clips", "lengths"]
    names = {"text": ["input_ids", "attention_mask"], "table": ["features"], "image": ["pixels"]}
    return names[backbone.kind]


def sample_inputs(backbone: Backbone, rows: int) -> tuple[Tensor, ...]:
    """Return a prepared batch of `rows` items, which depend on `rows`, as a program's input."""
    items: list[Item] = list(backbone.preprocessing.probes())
    if backbone.kind == "text":
        # Word vectors may lack all of the probes' words.
        words = (backbone.files.get("words.txt") or " ".join(map(str, items))).split()[:64]
        items = [" ".join((words * 4)[row : 3 * row + 2 + rows]) for row in range(rows)]
    elif backbone.kind == "table":
        probe = next(item for item in items if isinstance(item, TableRow))
        numbers = np.random.default_rng(rows).normal(size=(rows, len(probe.values)))
        items = [TableRow(probe.columns, values) for values in numbers]
    elif backbone.kind == "audio":
        items = _sample_clips(backbone, rows)
    else:
        size = max(getattr(backbone.preprocessing, "size", (64, 64)))
        noise = np.random.default_rng(rows).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
        items = [Image.fromarray(image) for image in noise]
    batch = backbone.batch_of(items)
    return (batch,) if isinstance(batch, Tensor) else tuple(batch[name] for name in input_names(backbone))


def _sample_clips(backbone: Backbone, rows: int) -> list[Item]:
    """Return clips of noise: of one length for an encoder, which takes only these, else of several."""
    random = np.random.default_rng(rows)
    rate = getattr(backbone.preprocessing, "rate", 16_000)
    lengths = [
        int(rate * (0.5 + rows / 4)) + (0 if isinstance(backbone.module, AudioEncoder) else 997 * row)
        for row in range(rows)
    ]
    return [Clip((0.1 * random.standard_normal(length)).astype(np.float32), rate) for length in lengths]
