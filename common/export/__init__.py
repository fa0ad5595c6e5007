"""Exports of a model for other software, from prepared input to calibrated probabilities, verified before writing."""

from fedhead.export.description import describe_export, describe_preprocessing
from fedhead.export.formats import FORMATS, Exported
from fedhead.export.verification import BATCH_SIZES, TOLERANCE
from fedhead.export.writing import check_format, export_model

__all__ = [
    "BATCH_SIZES",
    "FORMATS",
    "TOLERANCE",
    "Exported",
    "check_format",
    "describe_export",
    "describe_preprocessing",
    "export_model",
]
