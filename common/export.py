"""Exports of a model for other software, from prepared input to calibrated probabilities, verified before writing."""

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
from fedhead.backbones.audio import SHORTEST, WINDOW, AudioPreprocessing
from fedhead.backbones.backbone import digest_tensors
from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.hf_audio import LEAST_SECONDS, AudioEncoder
from fedhead.backbones.pooling import pool
from fedhead.backbones.preprocessing import ImagePreprocessing, TextPreprocessing
from fedhead.data import Clip, Item, Kind, TableRow
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.foreign import UNLIKE, Distances, Foreign
from fedhead.extras import require
from fedhead.files import disk_errors, write_atomically
from fedhead.model import BACKBONE_FILE, MODEL_FILE, TransferModel
from fedhead.registry import suggest
from fedhead.tasks.dense import DenseTask

FORMATS: Mapping[str, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "state-dict.safetensors",
    "fedhead": "with-backbone",
}
"""Formats with their default file names; `fedhead` is a folder."""

DOCUMENT = "fedhead"
"""Key of a file's metadata for its description as JSON; see `describe_export`."""

EXTRA_FILE = "fedhead.json"
"""Name of the description among the extra files of a torch export."""

EXCESS = "foreign"
"""Name of the second output of a program, for models that tell foreign inputs."""

Outputs = Tensor | tuple[Tensor, ...]
"""Answers `[n, C]`; for models that tell foreign inputs, these and `Foreign.excess` `[n]`."""

TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 5)
"""Batch sizes for verifying an export; tracing uses another size."""

_TRACED = 3
_ONNX_LIMIT = 2**31 - 2**20


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: the file, or the folder.
        size: the size in bytes.
        difference: the largest difference of any answer on samples, relative to the largest answer above 1.
    """

    path: Path
    size: int
    difference: float


def export_model(model: TransferModel, file_format: str, path: Path | str) -> Exported:
    """Write a model in another format, verified on samples first; an existing file is replaced.

    Args:
        model: moved to the CPU.
        file_format: `onnx` or `torch-export`, a program from a prepared batch to `answers_of`; `state-dict`, the
            tensors of backbone and head as safetensors under `backbone.NAME` and `head.NAME`; or `fedhead`, a new
            folder with the model and its backbone, which `TransferModel.load` reads without other weights.
        path: the path of the file or folder.

    Raises:
        UserError: for an unknown format, one with a missing extra or without support for this task, and a path that
            cannot be written.
        FedheadError: if the format does not support this model, or its probabilities differ by more than
            `TOLERANCE`; nothing is written then.
    """
    check_format(file_format)
    path = Path(path)
    model.backbone.to(torch.device("cpu"))
    model.head.to("cpu")
    if model.task.divides_items and file_format in ("onnx", "torch-export"):
        raise UserError(
            f"A model of the task {model.task.name!r} gives several answers per text, which the format {file_format!r} "
            "does not support; export it as 'fedhead' or 'state-dict'."
        )
    if file_format == "fedhead":
        return _write_folder(model, path)
    content, run = _WRITERS[file_format](model)
    difference = _require_same(model, run, file_format)
    write_atomically(path, content)
    return Exported(path, len(content), difference)


def check_format(file_format: str) -> None:
    """Check that a format exists and that its dependencies are installed.

    Raises:
        UserError: if not.
    """
    if file_format not in FORMATS:
        raise UserError(f"There is no format {file_format!r}. {suggest(file_format, list(FORMATS))}")
    if file_format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx", "An export to ONNX")


def describe_export(model: TransferModel) -> dict[str, Any]:
    """Return everything needed to use an export, as JSON types: input, preprocessing, output, digests."""
    backbone, text = model.backbone, model.backbone.kind == "text"
    entry = entry_of(backbone.spec)
    shapes: dict[str, Any] = {name: ["batch", "length"] for name in ("input_ids", "attention_mask")}
    if backbone.kind == "audio":
        first, *others = sample_inputs(backbone, 1)
        shapes = {"clips": ["batch", "length", *first.shape[2:]], **({"lengths": ["batch"]} if others else {})}
    elif not text:
        shapes = {_input_names(backbone)[0]: ["batch", *sample_inputs(backbone, 1)[0].shape[1:]]}
    return {
        "format": "fedhead-export-1",
        "fedhead": __version__,
        "task": f"{'tabular' if backbone.kind == 'table' else backbone.kind}-{model.task.family}",
        "input": {"shapes": shapes, "dtype": "int64" if text else "float32"},
        "preprocessing": describe_preprocessing(backbone),
        "output": {
            "name": model.task.answer_name,
            "shape": ["batch", *_answer_shape(model)],
            "meaning": model.task.answer_meaning,
        },
        **({} if model.foreign is None else {"foreign": _describe_foreign(model.foreign)}),
        "classes": list(model.classes),
        "unlearned": list(model.unlearned),
        "multi_label": model.task.name == "multi-label",
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


def _answer_shape(model: TransferModel) -> list[int]:
    geometry = model.backbone.geometry
    if isinstance(model.task, DenseTask) and geometry is not None:
        return model.task.program_shape(geometry)
    return [len(model.classes)]


def _describe_foreign(foreign: Foreign) -> dict[str, Any]:
    return {
        "name": EXCESS,
        "shape": ["batch"],
        "meaning": f"Distance from the known rows as a multiple of its limit; above 1: {UNLIKE}.",
        "share": foreign.share,
        "rows": foreign.known.rows,
    }


def describe_preprocessing(backbone: Backbone) -> dict[str, Any]:
    """Return the settings of a backbone's preprocessing, and its steps in sentences."""
    own = backbone.preprocessing
    if isinstance(own, ImagePreprocessing):
        return {"kind": "image", **asdict(own), "steps": _image_steps(own)}
    if isinstance(own, TextPreprocessing):
        return {"kind": "text", **_text_values(own, backbone.files), "steps": _text_steps(own, backbone.files)}
    if isinstance(own, AudioPreprocessing):
        return {"kind": "audio", **own.describe(), "steps": _audio_steps(own, backbone)}
    return {"kind": own.kind, **own.describe(), "steps": [f"As in {type(own).__name__} of {backbone.spec}."]}


def _image_steps(own: ImagePreprocessing) -> list[str]:
    steps = [
        "Rotate the image by its EXIF orientation, composite transparency onto white, and convert it to "
        f"{'grey (Pillow mode L)' if own.channels == 1 else 'RGB'} of 8 bits.",
        f"Resize its shorter side to {own.resize} pixels, the longer one in proportion, rounded down"
        if isinstance(own.resize, int)
        else f"Resize it to {own.resize[0]} x {own.resize[1]} pixels (height x width)",
    ]
    steps[-1] += f", with Pillow's filter {own.interpolation.upper()} (which antialiases when downscaling)."
    if own.crop is not None:
        half = "to the nearest even number" if own.rounding == "even" else "down"
        steps.append(f"Crop the central {own.crop[0]} x {own.crop[1]}; half a pixel of margin is rounded {half}.")
    return [
        *steps,
        "Divide by 255; then subtract mean and divide by std for each channel.",
        "Arrange as batch, channels, height, width, in float32.",
    ]


def _text_values(own: TextPreprocessing, files: Mapping[str, str]) -> dict[str, Any]:
    vocabulary = next((name for name in ("tokenizer.json", "words.txt") if name in files), None)
    return {"vocabulary": vocabulary, "max_length": own.max_length, "pad": own.pad, "empty": own.empty}


def _text_steps(own: TextPreprocessing, files: Mapping[str, str]) -> list[str]:
    steps = ["Use the ids from the backbone's own tokenizer."]
    if "tokenizer.json" in files:
        cut = f", after enable_truncation({own.max_length})" if own.max_length else ""
        steps = [
            "Use the ids from tokenizers.Tokenizer.from_str, applied to tokenizer.json in this metadata, without "
            f"padding{cut}.",
        ]
        if own.empty is not None:
            steps.append(f"A text without tokens becomes the id {own.empty}.")
    elif "words.txt" in files:
        steps = [
            "Split the text into words, including hyphens and apostrophes inside them, and single punctuation marks.",
            "Look up each one's line number (from 0) in words.txt in this metadata: unchanged, else in lower case, "
            "else its parts between hyphens and apostrophes; omit those not found.",
        ]
        if own.max_length:
            steps.append(f"Keep the first {own.max_length}.")
    return [
        *steps,
        f"Pad the shorter texts of a batch at the end with the id {own.pad}, to at least one id.",
        "attention_mask is 1 for ids of the text and 0 for padding; both are int64.",
    ]


def _audio_steps(own: AudioPreprocessing, backbone: Backbone) -> list[str]:
    steps = [
        "Decode the sound to floats in -1..1, and average its channels.",
        f"Keep the first {own.max_seconds:g} s, resample to {own.rate} Hz with scipy.signal.resample_poly in float64, "
        f"and pad with zeros to {int(SHORTEST * own.rate)} samples if it is shorter.",
    ]
    if not isinstance(backbone.module, AudioEncoder):
        return [*steps, "Pad the shorter clips of a batch with zeros; lengths are the samples of each clip, int64."]
    extractor = own.settings["extractor"]
    if backbone.module.form == "waveform":
        steps.append(f"Apply transformers' {extractor} with the settings above; clips are its input_values.")
    else:
        padded = f" to whole seconds, at least {LEAST_SECONDS}" if own.settings["cut"] else f" to {own.max_seconds:g} s"
        padded = padded if backbone.module.form == "mel" else ""
        steps.append(
            f"Apply transformers' {extractor} with the settings above, padding{padded}; clips are its frames, each "
            "with its values and then 1 if the frame begins within the sound, else 0."
        )
    return [*steps, "All clips of a batch have one length; do not pad shorter ones."]


# The model as one module, and its inputs.


class _Classifier(nn.Module):
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
                self.head(self.geometry.places(features)), self.get_buffer("unlearned"), self.geometry
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


class _ImageClassifier(_Classifier):
    def forward(self, pixels: Tensor) -> Outputs:
        return self.finish(self.backbone(pixels), None)


class _TableClassifier(_Classifier):
    def forward(self, features: Tensor) -> Outputs:
        return self.finish(self.backbone(features), None)


class _TextClassifier(_Classifier):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        return self.finish(self.backbone(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


class _AudioClassifier(_Classifier):
    def forward(self, clips: Tensor, lengths: Tensor | None = None) -> Outputs:
        return self.finish(self.backbone(clips, lengths), None)


def _classifier(model: TransferModel) -> _Classifier:
    modules: dict[Kind, type[_Classifier]] = {
        "text": _TextClassifier,
        "table": _TableClassifier,
        "image": _ImageClassifier,
        "audio": _AudioClassifier,
    }
    return modules[model.backbone.kind](model).eval()


def _input_names(backbone: Backbone) -> list[str]:
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
    batch = backbone.preprocessing.collate([backbone.preprocessing(item) for item in items])
    return (batch,) if isinstance(batch, Tensor) else tuple(batch[name] for name in _input_names(backbone))


def _sample_clips(backbone: Backbone, rows: int) -> list[Item]:
    """Return clips of noise: of one length for an encoder, which takes only these, else of several."""
    random = np.random.default_rng(rows)
    rate = getattr(backbone.preprocessing, "rate", 16_000)
    lengths = [
        int(rate * (0.5 + rows / 4)) + (0 if isinstance(backbone.module, AudioEncoder) else 997 * row)
        for row in range(rows)
    ]
    return [Clip((0.1 * random.standard_normal(length)).astype(np.float32), rate) for length in lengths]


@torch.no_grad()
def _require_same(model: TransferModel, run: Callable[..., Outputs], file_format: str) -> float:
    """Return the largest difference between the model and its export on samples.

    Raises:
        FedheadError: if it is above `TOLERANCE`, or the export does not run.
    """
    classifier, largest, answers = _classifier(model), 0.0, model.task.answer_name
    for rows in BATCH_SIZES:
        inputs = sample_inputs(model.backbone, rows)
        expected = classifier(*inputs)
        try:
            given = run(*inputs)
        # A runtime may raise any error for a program that it cannot run.
        except Exception as error:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} does not run on {rows} samples "
                f"({_first_line(error)}); nothing was written."
            ) from error
        difference = _difference(given, expected)
        if not difference <= TOLERANCE:
            raise FedheadError(
                f"The export of {model.backbone.spec} as {file_format} differs from the model: its {answers} differ by "
                f"{difference:.2g} on {rows} samples, and the limit is {TOLERANCE:g}. Nothing was written."
            )
        largest = max(largest, difference)
    return largest


def _difference(given: Outputs, expected: Outputs) -> float:
    """Return the largest difference, relative to the largest expected value above 1; infinite for other shapes."""
    if not isinstance(expected, Tensor):
        return max(map(_difference, given, expected)) if len(given) == len(expected) else float("inf")
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return float("inf")
    difference = float((given - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return difference if difference == difference else float("inf")


# Programs.


def _traced(model: TransferModel, file_format: str) -> torch.export.ExportedProgram:
    """Trace a model for any number of rows, and for texts of any length."""
    dim = torch.export.Dim
    shapes: dict[str, dict[int, Any]] = {_input_names(model.backbone)[0]: {0: dim("batch")}}
    if model.backbone.kind == "text":
        longest = getattr(model.backbone.preprocessing, "max_length", None)
        free = {0: dim("batch"), 1: dim("length", max=longest)}
        shapes = {"input_ids": free, "attention_mask": free}
    elif model.backbone.kind == "audio":
        shapes = _audio_shapes(model.backbone)
    inputs = sample_inputs(model.backbone, _TRACED)
    with torch.no_grad(), _quiet(), _as_a_sentence(model, file_format):
        program = torch.export.export(_classifier(model), inputs, dynamic_shapes=shapes, strict=False)
    # These contain file names of the exporting machine.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _audio_shapes(backbone: Backbone) -> dict[str, dict[int, Any]]:
    """Return the free dimensions of clips: their length too, except for models of one length."""
    dim = torch.export.Dim
    if not isinstance(backbone.module, AudioEncoder):
        return {"clips": {0: dim("batch"), 1: dim("length", min=2 * WINDOW)}, "lengths": {0: dim("batch")}}
    if backbone.module.form == "image":
        return {"clips": {0: dim("batch")}}
    return {"clips": {0: dim("batch"), 1: dim.AUTO}}


def _torch_export(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    program, document = _traced(model, "torch-export"), _document(model)
    buffer = io.BytesIO()
    with _quiet(), _as_a_sentence(model, "torch-export"):
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: document.pop(DOCUMENT), **document})
        content = buffer.getvalue()
        run: Callable[..., Outputs] = torch.export.load(io.BytesIO(content)).module()
    return content, run


def _onnx(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    if model.backbone.num_bytes > _ONNX_LIMIT:
        raise FedheadError(
            f"{model.backbone.spec} has {model.backbone.num_bytes / 1e9:.1f} GB of weights, but an ONNX file is "
            "limited to 2 GB; use --format torch-export."
        )
    runtime = require("onnxruntime", "onnx", "An export to ONNX")
    program = _traced(model, "onnx")
    names = _input_names(model.backbone)
    outputs = [model.task.answer_name, *([] if model.foreign is None else [EXCESS])]
    with _quiet(), _as_a_sentence(model, "onnx"):
        made = torch.onnx.export(program, args=(), dynamo=True, verbose=False, input_names=names, output_names=outputs)
        assert made is not None
        proto = made.model_proto
        _name_dimensions(proto)
        for key, value in _document(model).items():
            proto.metadata_props.add(key=key, value=value)
        content: bytes = proto.SerializeToString()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Outputs:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        found = tuple(torch.from_numpy(one) for one in session.run(outputs, given))
        return found if len(found) > 1 else found[0]

    return content, run


def _name_dimensions(proto: Any) -> None:
    """Name the free dimensions of input and output."""
    called: dict[str, str] = {}
    for value in [*proto.graph.input, *proto.graph.output]:
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "length"), strict=False):
            if dimension.dim_param:
                dimension.dim_param = called.setdefault(dimension.dim_param, name)
    # The tracer's internal names no longer match.
    del proto.graph.value_info[:]


# Tensors.


def _state_dict(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    parts = {"backbone": model.backbone.tensors(), "head": model.head.state_dict()}
    tensors = {
        f"{part}.{name}": tensor.detach().clone().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    content = save(tensors, {"format": "pt", **_document(model)})
    return content, _rebuilt(model, load(content))


def _rebuilt(model: TransferModel, tensors: Mapping[str, Tensor]) -> Callable[..., Outputs]:
    """Return the classifier with all of its weights replaced by `tensors`."""
    classifier = copy.deepcopy(_classifier(model))
    for part, module in (("backbone.", classifier.backbone), ("head.", classifier.head)):
        own = module.state_dict()
        for name, tensor in own.items():
            if tensor.is_floating_point():
                own[name] = torch.full_like(tensor, torch.nan)
        given = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        module.load_state_dict({**own, **given})
    return classifier


_WRITERS: Mapping[str, Callable[[TransferModel], tuple[bytes, Callable[..., Outputs]]]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "state-dict": _state_dict,
}


def _write_folder(model: TransferModel, path: Path) -> Exported:
    """Write model and backbone to a new folder, which is sufficient to load both."""
    with disk_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{path} exists and is not an empty folder; a model with its backbone needs a new or empty folder."
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
    """Return a file's metadata: `describe_export` as JSON, and the texts that preprocessing needs."""
    files = {name: text for name, text in model.backbone.files.items() if name in ("tokenizer.json", "words.txt")}
    return {DOCUMENT: json.dumps(describe_export(model), ensure_ascii=False, indent=1), **files}


@contextmanager
def _as_a_sentence(model: TransferModel, file_format: str) -> Iterator[None]:
    try:
        yield
    except FedheadError:
        raise
    # Exporters raise many kinds of errors, with pages of advice for the model's developers.
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
