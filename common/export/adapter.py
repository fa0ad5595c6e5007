"""The adapters of a run tuned with LoRA, as a folder that PEFT loads."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

from fedhead.backbones import Backbone
from fedhead.backbones.hf_causal import NextTokens
from fedhead.backbones.hf_seq2seq import NextTargets
from fedhead.backbones.tail_file import TAIL_FILE, load_tail, peft_files
from fedhead.backbones.weights import find_backbone, weights_path
from fedhead.errors import FedheadError, UserError
from fedhead.export.formats import Exported
from fedhead.export.verification import TOLERANCE
from fedhead.extras import require
from fedhead.files import new_folder
from fedhead.model import TransferModel

PEFT_FORMAT = "peft"
FOLDER = "adapter"
"""Default name of the folder."""


def export_adapter(model: TransferModel, run: Path, path: Path) -> Exported:
    """Write `adapter_config.json` and `adapter_model.safetensors`, once PEFT has loaded and merged them.

    Args:
        model: the model of the run, with its tuned backbone.
        run: the folder of the run, with its tuned parameters.
        path: the new folder.

    Raises:
        UserError: if the run has no adapters, PEFT is not installed, or `path` is not a new or empty folder.
        FedheadError: if the pretrained weights are not on this machine, or the merged features differ.
    """
    if not (run / TAIL_FILE).is_file():
        raise UserError(f"{run} has no adapters: the run was not tuned with LoRA, or its solved head was kept.")
    tail = load_tail(run / TAIL_FILE)
    base = find_backbone(tail.spec, tail.layer, tail.weights_digest)
    if base is None:
        raise FedheadError(
            f"The pretrained weights of {tail.spec}, on which the adapters are checked, are not on this machine; copy "
            f"them to {weights_path(tail.weights_digest)}."
        )
    files = peft_files(tail, *_names(base))
    with new_folder(path, "choose another --out.") as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        difference = _difference(model.backbone, base, temporary)
    return Exported(path, sum(map(len, files.values())), difference)


def _difference(tuned: Backbone, base: Backbone, folder: Path) -> float:
    """Return the largest difference of the features that PEFT's merged model gives, relative to the largest feature.

    Raises:
        FedheadError: if it is too large.
    """
    expected = tuned.probe()
    merged = copy.copy(base)
    merged.module = copy.deepcopy(base.module)
    model = _library_model(merged)
    peft = require("peft", "adapters", "An export for PEFT")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    difference = float((merged.probe() - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if not difference <= TOLERANCE:
        raise FedheadError(
            f"The adapters give other features in PEFT than in the run (by {difference:.1e}), so they are not exported."
        )
    return difference


def _library_model(backbone: Backbone) -> Any:
    """Return the model that PEFT adapts."""
    module: Any = backbone.module
    if isinstance(module, NextTokens):
        return module.causal
    return module.model if backbone.spec.startswith("hf:") else module


def _names(backbone: Backbone) -> tuple[str, str]:
    """Return what precedes the names of layers in the model that PEFT adapts, and PEFT's type of the task."""
    if isinstance(backbone.module, NextTargets):
        return "", "SEQ_2_SEQ_LM"
    if isinstance(backbone.module, NextTokens):
        return f"{backbone.module.causal.base_model_prefix}.", "CAUSAL_LM"
    return "", "FEATURE_EXTRACTION"
