"""Images of any form as Pillow images of mode L or RGB.

| stored as | becomes |
|---|---|
| grey or colour of 8 bits | the same |
| black and white (one bit, booleans) | grey, 0 and 255 |
| palette | RGB |
| transparency (RGBA, grey with alpha, a transparent palette entry or colour) | laid on white |
| CMYK, YCbCr, HSV | RGB by Pillow's formulas; colour profiles are not applied |
| uint16, and PGM and PNG of 16 bits | 8 bits, by the type's range: 65,535 is white |
| other integers | by their values: up to 255 of 8 bits, up to 65,535 of 16 bits; others are refused |
| floats | 8 bits, 1 is white; values outside 0..1 or not finite are refused |
| several frames (GIF, TIFF) | the first |
| EXIF orientation | rotated upright |
| DICOM | see `fedhead.data.dicom` |

Files and images in memory follow the same rules.
"""

import io
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from fedhead.data.dicom import decode_dicom
from fedhead.data.items import MODE, UnreadableSampleError
from fedhead.data.positions import as_plain

White = Literal[255, 65535]
"""Value of white in integers whose type does not determine it."""

SIXTEEN_BITS = ("PPM", "PNG")
"""Formats with 16-bit images that Pillow opens in a 32-bit mode."""


def read_image(path: Path) -> Image.Image:
    """Decode an image file completely into mode L or RGB, rotated by its EXIF data; also DICOM files.

    Raises:
        UnreadableSampleError: if it is missing, truncated or not an image.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableSampleError(f"{path} cannot be read: there is no such file.", lasting=False) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableSampleError(f"{path} cannot be read: {reason}.", lasting=False) from None
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file completely, as in `read_image`.

    Raises:
        UnreadableSampleError: naming them `name`, if they are truncated or not an image.
    """
    if content[128:132] == b"DICM":
        return decode_dicom(content, name)
    if not content:
        raise UnreadableSampleError(f"{name} is empty; expected an image.")
    register_heif()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _loaded(image, name)
    except UnidentifiedImageError:
        raise _unidentified(content, name) from None
    except UnreadableSampleError:
        raise
    # Pillow's decoders may raise any error on damaged input.
    except Exception as error:
        raise _undecodable(error, name) from error


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image, and rotate it upright.

    Raises:
        UnreadableSampleError: if it is damaged.
    """
    form = image.format
    try:
        image.load()
        upright = ImageOps.exif_transpose(image) if _is_turned(image) else image
    # Pillow's decoders may raise any error on damaged input.
    except Exception as error:
        raise _undecodable(error, name) from error
    return as_grey_or_rgb(upright, name, 65535 if form in SIXTEEN_BITS else None)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    # The image itself may be intact if its EXIF data is damaged.
    except Exception:
        return False


def _undecodable(error: Exception, name: str) -> UnreadableSampleError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    # Another installation of Pillow may have the decoder.
    lasting = not (reason.startswith("decoder ") and reason.endswith("not available"))
    return UnreadableSampleError(f"{name} cannot be read as an image: {reason}.", lasting=lasting)


def _unidentified(content: bytes, name: str) -> UnreadableSampleError:
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    for brands, form, package in (
        ((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC", "pillow-heif"),
        ((b"avif", b"avis"), "AVIF", "--upgrade pillow"),
    ):
        if brand in brands and not (register_heif() if form == "HEIC" else features.check("avif")):
            return UnreadableSampleError(
                f"{name} is an image in {form}, which this installation of Pillow does not read: pip install "
                f"{package}.",
                lasting=False,
            )
    return UnreadableSampleError(f"{name} cannot be read as an image: its format is unknown.")


@cache
def register_heif() -> bool:
    """Register HEIC with Pillow if `pillow-heif` is installed; return whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def to_image(value: Any, name: str, white: White | None = None) -> Image.Image:
    """Convert a PIL image, an array or a tensor to a PIL image of mode L or RGB.

    Args:
        value: a PIL image; or `[H, W]`, `[H, W, 1]`, `[H, W, 3]`, `[H, W, 4]` or the same channels first, of uint8,
            uint16, other integers in 0..65535, booleans, or floats in 0..1.
        name: the subject of messages.
        white: the value of white in integers other than uint8 and uint16; None infers it from the image's own values.

    Raises:
        UnreadableSampleError: if it is damaged, or its shape or values are not those of an image.
    """
    if isinstance(value, Image.Image):
        return _loaded(value, name)
    try:
        array = np.asarray(as_plain(value))
    except (TypeError, ValueError, RuntimeError):
        array = np.empty((), dtype=object)
    if array.dtype.kind not in "biuf":
        raise UnreadableSampleError(f"{name} is of type {type(value).__name__}; expected an image.")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise UnreadableSampleError(f"{name} has shape {list(array.shape)}, which is not that of an image.")
    if array.size == 0:
        raise UnreadableSampleError(f"{name} has shape {list(array.shape)}: it has no pixels.")
    image = Image.fromarray(np.ascontiguousarray(_in_eight_bits(array, name, white)))
    return as_grey_or_rgb(image, name) if image.mode == "RGBA" else image


def as_grey_or_rgb(image: Image.Image, name: str, white: White | None = None) -> Image.Image:
    """Return an image in mode L or RGB, by the rules of this module; `info` keeps the original mode.

    Raises:
        UnreadableSampleError: if its values do not fit its type, or there is no rule for its mode.
    """
    mode = image.mode
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        plain = Image.fromarray(_in_eight_bits(np.asarray(image), name, white))
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
            raise UnreadableSampleError(f"{name} has mode {mode}, which cannot be converted to grey or RGB.") from None
    plain.info = {**image.info, MODE: mode}
    return plain


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("L", "LA", "1")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("L" if grey else "RGB")


def has_wide_integers(dtype: np.dtype[Any]) -> bool:
    """Return whether a type leaves the value of white open: integers other than uint8 and uint16."""
    return dtype.kind in "iu" and dtype not in (np.uint8, np.uint16)


def white_of(values: npt.NDArray[Any]) -> White:
    """Return the value of white in integers whose type does not determine it: 255 if none is greater."""
    return 255 if values.size == 0 or values.max() <= 255 else 65535


def _in_eight_bits(array: npt.NDArray[Any], name: str, white: White | None = None) -> npt.NDArray[np.uint8]:
    """Scale values to 0..255; integers by `white` if their type does not determine it."""
    # Files may have either byte order.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
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
    if array.dtype == np.uint16:
        white = 65535
    elif white is None:
        white = white_of(array)
    if array.min() < 0 or array.max() > white:
        raise UnreadableSampleError(
            f"{name} has values of type {array.dtype} from {array.min()} to {array.max()}; expected integers in "
            f"0..{white}, booleans, or floats in 0..1."
        )
    if white == 255:
        return array.astype(np.uint8)
    scaled: npt.NDArray[np.uint8] = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return scaled
