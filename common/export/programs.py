"""Programs of ONNX and torch.export, traced from a model."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.audio import WINDOW
from fedhead.backbones.hf_audio import AudioEncoder
from fedhead.errors import FedheadError
from fedhead.export.classifier import EXCESS, Outputs, by_image, classifier_of, input_names, sample_inputs
from fedhead.export.description import DOCUMENT, metadata_of
from fedhead.export.formats import FORMATS
from fedhead.export.verification import first_line
from fedhead.extras import require
from fedhead.model import TransferModel
from fedhead.tasks.dense import DenseTask

EXTRA_FILE = "fedhead.json"
"""Name of the description among the extra files of a torch export."""

_TRACED = 3

_OPSET = 18
"""Version of the operators of a detector's program: the first with all those of `fedhead.export.suppression`."""

_ONNX_LIMIT = 2**31 - 2**20


def _traced(model: TransferModel, file_format: str) -> torch.export.ExportedProgram:
    """Trace a model for any number of rows, and for texts of any length."""
    dim = torch.export.Dim
    shapes: dict[str, dict[int, Any]] = {input_names(model.backbone)[0]: {0: dim("batch")}}
    if model.backbone.kind == "text":
        longest = getattr(model.backbone.preprocessing, "max_length", None)
        free = {0: dim("batch"), 1: dim("length", max=longest)}
        shapes = {"input_ids": free, "attention_mask": free}
    elif model.backbone.kind == "audio":
        shapes = _audio_shapes(model.backbone)
    inputs = sample_inputs(model.backbone, _TRACED)
    with torch.no_grad(), _quiet(), _as_a_sentence(model, file_format):
        program = torch.export.export(classifier_of(model), inputs, dynamic_shapes=shapes, strict=False)
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


def write_torch_export(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    """Return the file of a program for torch.export, and this program as read back from it."""
    program, document = _traced(model, "torch-export"), metadata_of(model)
    buffer = io.BytesIO()
    with _quiet(), _as_a_sentence(model, "torch-export"):
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: document.pop(DOCUMENT), **document})
        content = buffer.getvalue()
        run: Callable[..., Outputs] = torch.export.load(io.BytesIO(content)).module()
    return content, run


def write_onnx(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    """Return an ONNX file, and its program in ONNX Runtime."""
    if model.backbone.num_bytes > _ONNX_LIMIT:
        raise FedheadError(
            f"{model.backbone.spec} has {model.backbone.num_bytes / 1e9:.1f} GB of weights, but an ONNX file is "
            "limited to 2 GB; use --format torch-export."
        )
    if by_image(model.backbone):
        return _write_detector(model)
    program = _traced(model, "onnx")
    names = input_names(model.backbone)
    outputs = [model.task.answer_name, *([] if model.foreign is None else [EXCESS])]
    with _quiet(), _as_a_sentence(model, "onnx"):
        made = torch.onnx.export(program, args=(), dynamo=True, verbose=False, input_names=names, output_names=outputs)
        assert made is not None
        proto = made.model_proto
        _name_dimensions(proto)
        for key, value in metadata_of(model).items():
            proto.metadata_props.add(key=key, value=value)
        content: bytes = proto.SerializeToString()
        run = in_runtime(content, names, outputs)

    def first_or_all(*inputs: Tensor) -> Outputs:
        found = run(*inputs)
        return found if len(found) > 1 else found[0]

    return content, first_or_all


def _write_detector(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    """Return an ONNX file of one image at a time, and its program for several.

    Only the exporter that records a run supports torchvision's detectors: the number of boxes depends on the image.
    """
    names, outputs = input_names(model.backbone), [model.task.answer_name]
    # The exporter takes an open file, too, other than its types say.
    buffer: Any = io.BytesIO()
    inputs = sample_inputs(model.backbone, 1)
    onnx = require("onnx", "onnx", "An export to ONNX")
    with torch.no_grad(), _quiet(), _as_a_sentence(model, "onnx"):
        torch.onnx.export(
            classifier_of(model),
            inputs,
            buffer,
            dynamo=False,
            opset_version=_OPSET,
            input_names=names,
            output_names=outputs,
        )
        proto = onnx.load_from_string(buffer.getvalue())
        assert isinstance(model.task, DenseTask) and model.backbone.geometry is not None
        shape = [1, *model.task.program_shape(model.backbone.geometry)]
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(*outputs, onnx.TensorProto.FLOAT, shape))
        for key, value in metadata_of(model).items():
            proto.metadata_props.add(key=key, value=value)
        content: bytes = proto.SerializeToString()
        run = image_by_image(in_runtime(content, names, outputs))
    return content, lambda *given: run(*given)[0]


def image_by_image(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a program of one image at a time as one of several images."""

    def several(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = [run(*(one[row : row + 1] for one in inputs)) for row in range(len(inputs[0]))]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    return several


def in_runtime(content: bytes, names: Sequence[str], outputs: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
    """Return an ONNX file as a function in ONNX Runtime, from the inputs of these names to the outputs."""
    runtime = require("onnxruntime", "onnx", "An export to ONNX")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(one) for one in session.run(list(outputs), given))

    return run


def _name_dimensions(proto: Any) -> None:
    """Name the free dimensions of input and output."""
    called: dict[str, str] = {}
    for value in [*proto.graph.input, *proto.graph.output]:
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "length"), strict=False):
            if dimension.dim_param:
                dimension.dim_param = called.setdefault(dimension.dim_param, name)
    # The tracer's internal names no longer match.
    del proto.graph.value_info[:]


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
            f"{model.backbone.spec} cannot be exported as {file_format}: {first_line(error)} Try {others}."
        ) from error


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
