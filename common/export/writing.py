"""A model written in another format, once its answers on samples are verified."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.backbones.proposals import Proposer
from fedhead.errors import UserError
from fedhead.export.classifier import Outputs, classifier_of
from fedhead.export.description import metadata_of
from fedhead.export.formats import FORMATS, Exported
from fedhead.export.programs import write_onnx, write_torch_export
from fedhead.export.suppression import require_boxes, require_same_boxes, with_suppression
from fedhead.export.verification import require_same
from fedhead.extras import require
from fedhead.files import new_folder, write_atomically
from fedhead.model import BACKBONE_FILE, MODEL_FILE, TransferModel
from fedhead.registry import suggest


def export_model(model: TransferModel, file_format: str, path: Path | str, *, nms: bool = False) -> Exported:
    """Write a model in another format, verified on samples first; an existing file is replaced.

    Args:
        model: moved to the CPU.
        file_format: `onnx` or `torch-export`, a program from a prepared batch to `answers_of`; `state-dict`, the
            tensors of backbone and head as safetensors under `backbone.NAME` and `head.NAME`; or `fedhead`, a new
            folder with the model and its backbone, which `TransferModel.load` reads without other weights.
        path: the path of the file or folder.
        nms: whether a detector's program suppresses overlapping boxes, so that it returns those of `predict`; for ONNX.

    Raises:
        UserError: for an unknown format, one with a missing extra or without support for this task, and a path that
            cannot be written.
        FedheadError: if the format does not support this model, or its probabilities differ by more than
            `TOLERANCE`; nothing is written then.
    """
    check_format(file_format)
    if nms:
        require_boxes(model, file_format)
    path = Path(path)
    model.backbone.to(torch.device("cpu"))
    model.head.to("cpu")
    if model.task.divides_items and file_format in ("onnx", "torch-export"):
        raise UserError(
            f"A model of the task {model.task.name!r} gives several answers per text, which the format {file_format!r} "
            "does not support; export it as 'fedhead' or 'state-dict'."
        )
    if isinstance(model.backbone.module, Proposer) and file_format in ("onnx", "torch-export"):
        _require_program(model.backbone.spec, model.backbone.module, file_format)
    if model.head_spec == "none" and file_format != "fedhead":
        raise UserError("A language model is exported as 'fedhead', or its adapters as 'peft'.")
    if file_format == "fedhead":
        return _write_folder(model, path)
    content, run = _WRITERS[file_format](model)
    difference = require_same(model, run, file_format)
    if nms:
        content, boxes = with_suppression(content, model)
        difference = max(difference, require_same_boxes(model, run, boxes))
    write_atomically(path, content)
    return Exported(path, len(content), difference)


def _require_program(spec: str, proposer: Proposer, file_format: str) -> None:
    reason, others = proposer.not_exported, "'fedhead' or 'state-dict'"
    if not reason and proposer.by_image and file_format != "onnx":
        reason, others = "the number of its boxes depends on the image", "'onnx', 'fedhead' or 'state-dict'"
    if reason:
        raise UserError(f"{spec} cannot be exported as {file_format!r}, since {reason}. Export the model as {others}.")


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


def _state_dict(model: TransferModel) -> tuple[bytes, Callable[..., Outputs]]:
    parts = {"backbone": model.backbone.tensors(), "head": model.head.state_dict()}
    tensors = {
        f"{part}.{name}": tensor.detach().clone().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    content = save(tensors, {"format": "pt", **metadata_of(model)})
    return content, _rebuilt(model, load(content))


def _rebuilt(model: TransferModel, tensors: Mapping[str, Tensor]) -> Callable[..., Outputs]:
    """Return the classifier with all of its weights replaced by `tensors`."""
    classifier = copy.deepcopy(classifier_of(model))
    for part, module in (("backbone.", classifier.backbone), ("head.", classifier.head)):
        own = module.state_dict()
        for name, tensor in own.items():
            if tensor.is_floating_point():
                own[name] = torch.full_like(tensor, torch.nan)
        given = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        module.load_state_dict({**own, **given})
    return classifier


_WRITERS: Mapping[str, Callable[[TransferModel], tuple[bytes, Callable[..., Outputs]]]] = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "state-dict": _state_dict,
}


def _write_folder(model: TransferModel, path: Path) -> Exported:
    """Write model and backbone to a new folder, which is sufficient to load both."""
    with new_folder(path, "a model with its backbone needs a new or empty folder.") as temporary:
        model.backbone.save(temporary / BACKBONE_FILE)
        model.save(temporary / MODEL_FILE)
        read = TransferModel.load(temporary / MODEL_FILE, Backbone.load(temporary / BACKBONE_FILE))
        if model.head_spec == "none":
            difference = float((read.backbone.probe() - model.backbone.probe()).abs().max())
        else:
            difference = require_same(model, classifier_of(read), "fedhead")
        size = sum(file.stat().st_size for file in temporary.iterdir())
    return Exported(path, size, difference)
