"""DICOM files as grey or RGB images of 8 bits, as a viewer would show them.

The stored values are rescaled (modality LUT, or slope and intercept), then windowed by the file's VOI LUT or by the
first of its windows, and turned over where MONOCHROME1 says that small values are white. Without a window the least
value becomes black and the greatest white. Colour is turned into RGB. Of several frames the first is taken. The patient
is the group of the image.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedhead.data.items import GROUP, MODE, UnreadableSampleError
from fedhead.extras import require


def decode_dicom(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of a DICOM file; needs the extra `medical`.

    Raises:
        UserError: if pydicom is not installed.
        UnreadableSampleError: naming the file `name`, if the bytes are damaged, without pixels, or compressed in a
            format without an installed decoder.
    """
    pydicom = require("pydicom", "medical", "Reading DICOM files")
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
    # pydicom may raise any error on damaged input.
    except Exception as error:
        raise UnreadableSampleError(f"{name} cannot be read as DICOM: {_first_line(error)}.") from error
    if "PixelData" not in dataset and "FloatPixelData" not in dataset and "DoubleFloatPixelData" not in dataset:
        raise UnreadableSampleError(f"{name} is a DICOM file without pixels.")
    try:
        pixels = _decoded(dataset, name)
        image = Image.fromarray(_shown(dataset, pixels))
    except UnreadableSampleError:
        raise
    except Exception as error:
        raise UnreadableSampleError(f"{name} cannot be read as DICOM: {_first_line(error)}.") from error
    image.info[MODE] = f"DICOM {dataset.get('PhotometricInterpretation', '')}".strip()
    if patient := str(dataset.get("PatientID") or "").strip():
        image.info[GROUP] = patient
    return image


def _decoded(dataset: Any, name: str) -> npt.NDArray[Any]:
    from pydicom.pixels.utils import pixel_array

    try:
        pixels: npt.NDArray[Any] = pixel_array(dataset, index=0)
    except (RuntimeError, NotImplementedError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise UnreadableSampleError(
            f"{name} is compressed as {syntax.name}, and no decoder for it works here: pip install pylibjpeg "
            f"pylibjpeg-libjpeg pylibjpeg-openjpeg. ({_first_line(error)}.)"
        ) from error
    return pixels


def _shown(dataset: Any, pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the displayed image, `[H, W]` or `[H, W, 3]`."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi

    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return _in_eight_bits(pixels, 0, np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:
        return _in_eight_bits(pixels, 0, 2**dataset.BitsStored - 1)
    values = apply_modality_lut(pixels, dataset)
    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        shown = _in_eight_bits(apply_voi(values, dataset), 0, 2**bits - 1)
    elif _first(dataset, "WindowWidth") is not None and _first(dataset, "WindowCenter") is not None:
        shown = _windowed(dataset, values)
    else:
        shown = _in_eight_bits(values, values.min(), values.max())
    return 255 - shown if kind == "MONOCHROME1" else shown


def _windowed(dataset: Any, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Apply the first window (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    centre, width = _first(dataset, "WindowCenter"), _first(dataset, "WindowWidth")
    assert centre is not None
    assert width is not None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return _in_eight_bits(np.tanh(2 * (values - centre) / width), -1, 1)
    if function == "LINEAR":
        # A width of 1 is a threshold between two integers.
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    return _in_eight_bits(values, centre - width / 2, centre + width / 2)


def _in_eight_bits(values: npt.NDArray[Any], black: float, white: float) -> npt.NDArray[np.uint8]:
    spread = max(float(white) - float(black), 1e-12)
    return np.rint(np.clip((values.astype(np.float64) - black) / spread, 0, 1) * 255).astype(np.uint8)


def _first(dataset: Any, keyword: str) -> float | None:
    """Return the first of the values of an element, or None if it is missing or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return float(value)
    return next((float(one) for one in value), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
