"""A model for other software: from prepared input to calibrated probabilities, run back before it is written."""

import copy
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from fedhead import __version__
from fedhead.backbones import Backbone
from fedhead.backbones.backbone import digest_tensors
from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.pooling import pool
from fedhead.backbones.preprocessing import Batch, ImagePreprocessing, TextPreprocessing
from fedhead.data import Item
from fedhead.errors import FedheadError, UserError
from fedhead.extras import require
from fedhead.files import disk_errors, write_atomically
from fedhead.model import BACKBONE_FILE, MODEL_FILE, TransferModel
from fedhead.registry import suggest

FORMATS: Mapping[str, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "state-dict.safetensors",
    "fedhead": "with-backbone",
}
"""Formats, and what each is called beside the model unless told otherwise; `fedhead` is a folder."""

DOCUMENT = "fedhead"
"""The key under which a file's metadata says what it is, as JSON; see `describe_export`."""

EXTRA_FILE = "fedhead.json"
"""The same among the extra files of a torch export."""

TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 5)
"""Of the samples that an export is run back on; it was traced with another size."""

_TRACED = 3
_ONNX_LIMIT = 2**31 - 2**20


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder.
        size: in bytes.
        difference: the largest that any probability of the samples differed by.
    """

    path: Path
    size: int
    difference: float


def export_model(model: TransferModel, file_format: str, path: Path | str) -> Exported:
    """Write a model in another form, run back on samples first; a file that was there before is replaced.

    Args:
        model: moved to the CPU.
        file_format: `onnx` or `torch-export`, a program from a prepared batch to `probabilities_of`; `state-dict`, the
            tensors of backbone and head as safetensors under `backbone.NAME` and `head.NAME`; or `fedhead`, a new
            folder with the model and its backbone, which `TransferModel.load` reads without any weights of its own.
        path: of the file, or the folder.

    Raises:
        UserError: for an unknown format, one whose extra is not installed, and a path that cannot be written.
        FedheadError: if the format cannot take this model, or gives probabilities that differ by more than
            `TOLERANCE`; nothing is written then.
    """
    check_format(file_format)
    path = Path(path)
    model.backbone.to(torch.device("cpu"))
    model.head.to("cpu")
    if file_format == "fedhead":
        return _write_folder(model, path)
    content, run = _WRITERS[file_format](model)
    difference = _require_same(model, run, file_format)
    write_atomically(path, content)
    return Exported(path, len(content), difference)


def check_format(file_format: str) -> None:
    """Check that there is such a format and that what it needs is installed.

    Raises:
        UserError: if not.
    """
    if file_format not in FORMATS:
        raise UserError(f"There is no format {file_format!r}. {suggest(file_format, list(FORMATS))}")
    if file_format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx", "An export to ONNX")


def describe_export(model: TransferModel) -> dict[str, Any]:
    """Return what a stranger needs to use an export, as JSON has it: input, preprocessing, output, digests."""
    backbone, text = model.backbone, model.backbone.kind == "text"
    entry = entry_of(backbone.spec)
    shapes: dict[str, Any] = {name: ["batch", "length"] for name in ("input_ids", "attention_mask")}
    if not text:
        shapes = {"pixels": ["batch", *sample_inputs(backbone, 1)[0].shape[1:]]}
    each = "of each class by itself; those above 0.5 are predicted" if model.multi_label else "of the classes together"
    return {
        "format": "fedhead-export-1",
        "fedhead": __version__,
        "task": f"{backbone.kind}-classification",
        "input": {"shapes": shapes, "dtype": "int64" if text else "float32"},
        "preprocessing": describe_preprocessing(backbone),
        "output": {
            "name": "probabilities",
            "shape": ["batch", len(model.classes)],
            "meaning": f"Calibrated probabilities {each}; unlearned classes have 0.",
        },
        "classes": list(model.classes),
        "unlearned": list(model.unlearned),
        "multi_label": model.multi_label,
        "temperature": model.calibration.temperature,
        "backbone": {
            "spec": backbone.spec,
            "layer": backbone.layer,
            "pooling": backbone.pooling,
            "license": entry.licence if entry else None,
            "digest": backbone.digest,
            "weights_digest": backbone.weights_digest,
        },
        "head": {"spec": model.head_spec, "digest": digest_tensors(model.head.state_dict())},
    }


def describe_preprocessing(backbone: Backbone) -> dict[str, Any]:
    """Return the values that a backbone's preprocessing has, and its steps in sentences."""
    own = backbone.preprocessing
    if isinstance(own, ImagePreprocessing):
        return {"kind": "image", **asdict(own), "steps": _image_steps(own)}
    if isinstance(own, TextPreprocessing):
        return {"kind": "text", **_text_values(own, backbone.files), "steps": _text_steps(own, backbone.files)}
    return {"kind": own.kind, **own.describe(), "steps": [f"As {type(own).__name__} of {backbone.spec} does."]}


def _image_steps(own: ImagePreprocessing) -> list[str]:
    steps = [
        "Turn the image as its EXIF orientation says, lay transparency on white, and convert it to "
        f"{'grey (Pillow mode L)' if own.channels == 1 else 'RGB'} of 8 bits.",
        f"Resize its shorter side to {own.resize} pixels, the longer one in proportion, rounded down"
        if isinstance(own.resize, int)
        else f"Resize it to {own.resize[0]} x {own.resize[1]} pixels (height x width)",
    ]
    steps[-1] += f", by Pillow's filter {own.interpolation.upper()} (which smooths when it shrinks)."
    if own.crop is not None:
        half = "to the nearest even number" if own.rounding == "even" else "down"
        steps.append(f"Cut {own.crop[0]} x {own.crop[1]} from the middle; half a pixel of margin is rounded {half}.")
    return [
        *steps,
        "Divide by 255; then for each channel subtract mean and divide by std.",
        "Order as batch, channels, height, width, in float32.",
    ]


def _text_values(own: TextPreprocessing, files: Mapping[str, str]) -> dict[str, Any]:
    vocabulary = next((name for name in ("tokenizer.json", "words.txt") if name in files), None)
    return {"vocabulary": vocabulary, "max_length": own.max_length, "pad": own.pad, "empty": own.empty}


def _text_steps(own: TextPreprocessing, files: Mapping[str, str]) -> list[str]:
    steps = ["Take the ids that the backbone's own tokenizer gives."]
    if "tokenizer.json" in files:
        cut = f", after enable_truncation({own.max_length})" if own.max_length else ""
        steps = [
            "Take the ids that tokenizers.Tokenizer.from_str gives, of tokenizer.json in this metadata, without "
            f"padding{cut}.",
        ]
        if own.empty is not None:
            steps.append(f"A text without tokens is the id {own.empty}.")
    elif "words.txt" in files:
        steps = [
            "Split the text into words, with hyphens and apostrophes inside them, and single punctuation marks.",
            "Take each one's line number (from 0) in words.txt in this metadata: as it stands, else in lower case, "
            "else of its parts between hyphens and apostrophes; leave out what is not there.",
        ]
        if own.max_length:
            steps.append(f"Keep the first {own.max_length}.")
    return [
        *steps,
        f"Fill the shorter texts of a batch up at the end with the id {own.pad}, to at least one id.",
        "attention_mask is 1 where an id is of the text and 0 where it fills up; both are int64.",
    ]


# The model as one module, and what goes into it.


class _Classifier(nn.Module):
    """Backbone and head as one module that gives calibrated probabilities."""

    def __init__(self, model: TransferModel) -> None:
        super().__init__()
        self.backbone = model.backbone.module
        self.head = model.head
        self.pooling = model.backbone.pooling
        self.probabilities_of = model.probabilities_of

    def finish(self, output: Tensor, mask: Tensor | None) -> Tensor:
        features = pool(output, self.pooling, mask).to(torch.float32)
        return self.probabilities_of(self.head(features))


class _ImageClassifier(_Classifier):
    def forward(self, pixels: Tensor) -> Tensor:
        return self.finish(self.backbone(pixels), None)


class _TextClassifier(_Classifier):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.finish(self.backbone(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


def _classifier(model: TransferModel) -> _Classifier:
    return (_TextClassifier if model.backbone.kind == "text" else _ImageClassifier)(model).eval()


def sample_inputs(backbone: Backbone, rows: int) -> tuple[Tensor, ...]:
    """Return a prepared batch of `rows` images or texts, other ones for each number, as a program takes it."""
    items: list[Item] = list(backbone.preprocessing.probes())
    if backbone.kind == "text":
        # Word vectors may have none of the probes' words.
        words = (backbone.files.get("words.txt") or " ".join(map(str, items))).split()[:64]
        items = [" ".join((words * 4)[row : 3 * row + 2 + rows]) for row in range(rows)]
    else:
        size = max(getattr(backbone.preprocessing, "size", (64, 64)))
        noise = np.random.default_rng(rows).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
        items = [Image.fromarray(image) for image in noise]
    return _as_arguments(backbone.preprocessing.collate([backbone.preprocessing(item) for item in items]))


def _as_arguments(batch: Batch) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else (batch["input_ids"], batch["attention_mask"])


@torch.no_grad()
def _require_same(model: TransferModel, run: Callable[..., Tensor], file_format: str) -> float:
    """Return the largest difference of what was exported on samples.

    Raises:
        FedheadError: if it is above `TOLERANCE`, or the export does not run.
    """
    classifier, largest = _classifier(model), 0.0
    for rows in BATCH_SIZES:
        inputs = sample_inputs(model.backbone, rows)
        expected = classifier(*inputs)
        try:
            given = run(*inputs)
        # A runtime raises what it likes on a program that it cannot run.
        except Exception as error:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} does not run on {rows} samples "
                f"({_first_line(error)}); nothing was written."
            ) from error
        difference = float((given - expected).abs().max()) if given.shape == expected.shape else float("nan")
        if not difference <= TOLERANCE:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} gives other probabilities than the model: they "
                f"differ by {difference:.2g} on {rows} samples, where {TOLERANCE:g} is allowed. Nothing was written."
            )
        largest = max(largest, difference)
    return largest


# Programs.


def _traced(model: TransferModel, file_format: str) -> torch.export.ExportedProgram:
    """Trace a model with any number of rows, and of texts any length."""
    dim = torch.export.Dim
    shapes: dict[str, dict[int, Any]] = {"pixels": {0: dim("batch")}}
    if model.backbone.kind == "text":
        longest = getattr(model.backbone.preprocessing, "max_length", None)
        free = {0: dim("batch"), 1: dim("length", max=longest)}
        shapes = {"input_ids": free, "attention_mask": free}
    inputs = sample_inputs(model.backbone, _TRACED)
    with torch.no_grad(), _quiet(), _as_a_sentence(model, file_format):
        program = torch.export.export(_classifier(model), inputs, dynamic_shapes=shapes, strict=False)
    # These name files of the machine that the export was made on.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _torch_export(model: TransferModel) -> tuple[bytes, Callable[..., Tensor]]:
    program, document = _traced(model, "torch-export"), _document(model)
    buffer = io.BytesIO()
    with _quiet(), _as_a_sentence(model, "torch-export"):
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: document.pop(DOCUMENT), **document})
        content = buffer.getvalue()
        run: Callable[..., Tensor] = torch.export.load(io.BytesIO(content)).module()
    return content, run


def _onnx(model: TransferModel) -> tuple[bytes, Callable[..., Tensor]]:
    if model.backbone.num_bytes > _ONNX_LIMIT:
        raise FedheadError(
            f"{model.backbone.spec} has {model.backbone.num_bytes / 1e9:.1f} GB of weights, and an ONNX file holds "
            "2 GB at most; take --format torch-export."
        )
    runtime = require("onnxruntime", "onnx", "An export to ONNX")
    program = _traced(model, "onnx")
    names = ["input_ids", "attention_mask"] if model.backbone.kind == "text" else ["pixels"]
    with _quiet(), _as_a_sentence(model, "onnx"):
        made = torch.onnx.export(
            program, args=(), dynamo=True, verbose=False, input_names=names, output_names=["probabilities"]
        )
        assert made is not None
        proto = made.model_proto
        _name_dimensions(proto)
        for key, value in _document(model).items():
            proto.metadata_props.add(key=key, value=value)
        content: bytes = proto.SerializeToString()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["probabilities"], given)[0])

    return content, run


def _name_dimensions(proto: Any) -> None:
    """Call the free dimensions of input and output what they are."""
    called: dict[str, str] = {}
    for value in [*proto.graph.input, *proto.graph.output]:
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "length"), strict=False):
            if dimension.dim_param:
                dimension.dim_param = called.setdefault(dimension.dim_param, name)
    # What the tracer called them inside says nothing any more.
    del proto.graph.value_info[:]


# Tensors.


def _state_dict(model: TransferModel) -> tuple[bytes, Callable[..., Tensor]]:
    parts = {"backbone": model.backbone.tensors(), "head": model.head.state_dict()}
    tensors = {
        f"{part}.{name}": tensor.detach().clone().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    content = save(tensors, {"format": "pt", **_document(model)})
    return content, _rebuilt(model, load(content))


def _rebuilt(model: TransferModel, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Return the classifier with all of its weights taken from `tensors`, and none kept."""
    classifier = copy.deepcopy(_classifier(model))
    for part, module in (("backbone.", classifier.backbone), ("head.", classifier.head)):
        own = module.state_dict()
        for name, tensor in own.items():
            if tensor.is_floating_point():
                own[name] = torch.full_like(tensor, torch.nan)
        given = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        module.load_state_dict({**own, **given})
    return classifier


_WRITERS: Mapping[str, Callable[[TransferModel], tuple[bytes, Callable[..., Tensor]]]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "state-dict": _state_dict,
}


def _write_folder(model: TransferModel, path: Path) -> Exported:
    """Write model and backbone to a new folder, from which alone both can be loaded."""
    with disk_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{path} exists and is not an empty folder; a model with its backbone needs one of its own."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            model.backbone.save(temporary / BACKBONE_FILE)
            model.save(temporary / MODEL_FILE)
            read = TransferModel.load(temporary / MODEL_FILE, Backbone.load(temporary / BACKBONE_FILE))
            difference = _require_same(model, _classifier(read), "fedhead")
            size = sum(file.stat().st_size for file in temporary.iterdir())
            temporary.chmod(0o755)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return Exported(path, size, difference)


def _document(model: TransferModel) -> dict[str, str]:
    """Return a file's metadata: `describe_export` as JSON, and with it the texts that the backbone is fed from."""
    files = {name: text for name, text in model.backbone.files.items() if name in ("tokenizer.json", "words.txt")}
    return {DOCUMENT: json.dumps(describe_export(model), ensure_ascii=False, indent=1), **files}


@contextmanager
def _as_a_sentence(model: TransferModel, file_format: str) -> Iterator[None]:
    try:
        yield
    except FedheadError:
        raise
    # Exporters raise many kinds of errors, with pages of advice for those who maintain the model.
    except Exception as error:
        others = " or ".join(f"--format {name}" for name in FORMATS if name != file_format)
        raise FedheadError(
            f"{model.backbone.spec} cannot be exported as {file_format}: {_first_line(error)} Try {others}."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].rstrip(".:") + ".") if lines else f"{type(error).__name__}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters' warnings, which concern their own insides, off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
