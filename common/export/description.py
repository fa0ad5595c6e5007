"""The description of an export: its input, the steps of preprocessing in sentences, its output and digests."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedhead import __version__
from fedhead.backbones import Backbone
from fedhead.backbones.audio import SHORTEST, AudioPreprocessing
from fedhead.backbones.catalogue import entry_of
from fedhead.backbones.digests import digest_tensors
from fedhead.backbones.hf_audio import LEAST_SECONDS, AudioEncoder
from fedhead.backbones.preprocessing import ImagePreprocessing, TextPreprocessing
from fedhead.evaluation.foreign import UNLIKE, Foreign
from fedhead.export.classifier import EXCESS, by_image, input_names, sample_inputs
from fedhead.model import TransferModel
from fedhead.tasks.dense import DenseTask

DOCUMENT = "fedhead"
"""Key of a file's metadata for its description as JSON; see `describe_export`."""


def describe_export(model: TransferModel) -> dict[str, Any]:
    """Return everything needed to use an export, as JSON types: input, preprocessing, output, digests."""
    backbone, text = model.backbone, model.backbone.kind == "text"
    entry = entry_of(backbone.spec)
    shapes: dict[str, Any] = {name: ["batch", "length"] for name in ("input_ids", "attention_mask")}
    if backbone.kind == "audio":
        first, *others = sample_inputs(backbone, 1)
        shapes = {"clips": ["batch", "length", *first.shape[2:]], **({"lengths": ["batch"]} if others else {})}
    elif not text:
        shapes = {input_names(backbone)[0]: [batch_of(backbone), *sample_inputs(backbone, 1)[0].shape[1:]]}
    return {
        "format": "fedhead-export-1",
        "fedhead": __version__,
        "task": f"{'tabular' if backbone.kind == 'table' else backbone.kind}-{model.task.family}",
        "input": {"shapes": shapes, "dtype": "int64" if text else "float32"},
        "preprocessing": describe_preprocessing(backbone),
        "output": {
            "name": model.task.answer_name,
            "shape": [batch_of(backbone), *_answer_shape(model)],
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


def batch_of(backbone: Backbone) -> int | str:
    """Return the first dimension of a program's inputs and outputs: 1 if it takes one image at a time."""
    return 1 if by_image(backbone) else "batch"


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


def metadata_of(model: TransferModel) -> dict[str, str]:
    """Return a file's metadata: `describe_export` as JSON, and the texts that preprocessing needs."""
    files = {name: text for name, text in model.backbone.files.items() if name in ("tokenizer.json", "words.txt")}
    return {DOCUMENT: json.dumps(describe_export(model), ensure_ascii=False, indent=1), **files}
