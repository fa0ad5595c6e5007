"""Whatever an image is stored as, a Pillow image of mode L or RGB.

| stored as | becomes |
|---|---|
| grey or colour of 8 bits | the same |
| black and white (one bit, booleans) | grey, 0 and 255 |
| palette | RGB |
| transparency (RGBA, grey with alpha, a transparent palette entry or colour) | laid on white |
| CMYK, YCbCr, HSV | RGB by Pillow's formulas; colour profiles are not applied |
| 16 bits | 8 bits, by the type's range: 65,535 is white |
| 32-bit integers (as PGM of 16 bits is opened) | the same way; values above 65,535 or below 0 are refused |
| floats | 8 bits, 1 is white; values outside 0..1 or not finite are refused |
| several frames (GIF, TIFF) | the first |
| EXIF orientation | turned |
| DICOM | see `fedhead.data.dicom` |
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fedhead.data.dicom import decode_dicom
from fedhead.data.samples import MODE, UnreadableSampleError


def read_image(path: Path) -> Image.Image:
    """Decode an image file whole into mode L or RGB, turned as its EXIF data says; DICOM files as well.

    Raises:
        UnreadableSampleError: if it is missing, truncated or not an image.
    """
    try:
        return decode_image(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UnreadableSampleError(f"{path} cannot be read: there is no such file.") from None
    except OSError as error:
        raise UnreadableSampleError(f"{path} cannot be read: {error.strerror}.") from None


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file whole, as `read_image` does.

    Raises:
        UnreadableSampleError: if they are truncated or not an image's, calling it `name`.
    """
    if content[128:132] == b"DICM":
        return decode_dicom(content, name)
    if not content:
        raise UnreadableSampleError(f"{name} is empty; expected an image.")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return as_grey_or_rgb(ImageOps.exif_transpose(image), name)
    except UnreadableSampleError:
        raise
    except UnidentifiedImageError:
        raise UnreadableSampleError(f"{name} cannot be read as an image: its content is none that is known.") from None
    # Pillow's decoders raise nearly anything on damaged input.
    except Exception as error:
        raise UnreadableSampleError(f"{name} cannot be read as an image: {str(error).rstrip('.')}.") from error


def to_image(value: Any, name: str) -> Image.Image:
    """Turn a PIL image, an array or a tensor into a PIL image of mode L or RGB.

    Args:
        value: a PIL image; or `[H, W]`, `[H, W, 1]`, `[H, W, 3]`, `[H, W, 4]` or the same channels first, of uint8,
            uint16, booleans, or floats in 0..1.
        name: what messages call it.

    Raises:
        UnreadableSampleError: if its shape or its values are not an image's.
    """
    if isinstance(value, Image.Image):
        return as_grey_or_rgb(value, name)
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise UnreadableSampleError(f"{name} has shape {list(array.shape)}, which is not a grey or colour image's.")
    if array.size == 0:
        raise UnreadableSampleError(f"{name} has shape {list(array.shape)}: it holds no pixels.")
    image = Image.fromarray(np.ascontiguousarray(_in_eight_bits(array, name)))
    return as_grey_or_rgb(image, name) if image.mode == "RGBA" else image


def as_grey_or_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image in mode L or RGB, by the rules of this module; `info` remembers the mode that it had.

    Raises:
        UnreadableSampleError: if its values do not fit its type, or there is no rule for its mode.
    """
    mode = image.mode
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        plain = Image.fromarray(_in_eight_bits(np.asarray(image), name))
    elif image.has_transparency_data:
        plain = _on_white(image)
    elif image.mode == "1":
        plain = image.convert("L")
    elif image.mode in ("L", "RGB"):
        return image
    else:
        try:
            plain = image.convert("RGB")
        except ValueError:
            raise UnreadableSampleError(f"{name} has mode {mode}, which cannot be turned into grey or RGB.") from None
    plain.info = {**image.info, MODE: mode}
    return plain


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("L", "LA", "1")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("L" if grey else "RGB")


def _in_eight_bits(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Scale values by their type's range; 32-bit integers as if of 16 bits, since Pillow opens 16-bit PGM so."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UnreadableSampleError(f"{name} has values that are not finite (NaN or infinity).")
        if array.min() < 0 or array.max() > 1:
            raise UnreadableSampleError(
                f"{name} has values from {array.min():g} to {array.max():g}; floats must be in 0..1."
            )
        rounded: npt.NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
        return rounded
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        scaled: npt.NDArray[np.uint8] = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return scaled
    raise UnreadableSampleError(
        f"{name} has values of type {array.dtype} from {array.min()} to {array.max()}; expected uint8, uint16, "
        "booleans, or floats in 0..1."
    )
