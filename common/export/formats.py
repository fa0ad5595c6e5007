"""The formats of exports, and the result of an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FORMATS: Mapping[str, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "state-dict.safetensors",
    "fedhead": "with-backbone",
}
"""Formats with their default file names; `fedhead` is a folder."""


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
