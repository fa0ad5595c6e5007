"""Sounds of any form as clips of one channel.

| stored as | becomes |
|---|---|
| integers (WAV, FLAC) | divided by the type's range: -1..1 |
| floats | the same; values that are not finite or beyond `LOUDEST` are refused |
| several channels | their mean |
| any sampling rate from 1,000 to 384,000 Hz | the same: a backbone resamples to its own |
| no samples, or more than `LONGEST` seconds | refused |
| truncated files | refused |

Files, bytes and arrays in memory follow the same rules. Files need the extra `audio` (libsndfile).
"""

import io
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedhead.data.items import Clip, UnreadableSampleError
from fedhead.data.positions import as_plain
from fedhead.errors import UserError
from fedhead.extras import require

LONGEST = 600
"""Limit of a clip's duration in seconds."""

MOST_SAMPLES = LONGEST * 48_000
"""Limit of a clip's samples; it bounds the memory of a clip at a high rate."""

LOUDEST = 1e6
"""Limit of the magnitude of samples, far above any scale in use, so that powers stay finite."""

RATES = (1_000, 384_000)
"""Lowest and highest sampling rate in Hz."""

FORMATS = ("FLAC", "MP3", "OGG", "RF64", "WAV", "WAVEX")
"""Formats by libsndfile's names; it also reads formats of measurements and of other programs, which are not sounds."""

_BLOCK = 1 << 18
_TAIL = 1 << 16

Samples32 = npt.NDArray[np.float32]


def require_soundfile(purpose: str) -> Any:
    """Import `soundfile`.

    Args:
        purpose: the part that needs it, as a sentence begins.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    try:
        return require("soundfile", "audio", purpose)
    # The package is installed, but not the library that it wraps.
    except OSError as error:
        raise UserError(f"{purpose} needs libsndfile, which cannot be loaded ({error}): install libsndfile1.") from None


def read_clip(path: Path) -> Clip:
    """Decode a sound file (WAV, FLAC, OGG or MP3) and mix its channels.

    Raises:
        UnreadableSampleError: if it is missing, truncated, too long, or not a sound.
    """
    try:
        with path.open("rb") as file:
            return _decode(file, str(path))
    except FileNotFoundError:
        raise UnreadableSampleError(f"{path} cannot be read: there is no such file.", lasting=False) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableSampleError(f"{path} cannot be read: {reason}.", lasting=False) from None


def decode_clip(content: bytes, name: str) -> Clip:
    """Decode the bytes of a sound file as in `read_clip`.

    Raises:
        UnreadableSampleError: naming them `name`, if they are truncated or not a sound.
    """
    return _decode(io.BytesIO(content), name)


def to_clip(value: Any, rate: Any, name: str) -> Clip:
    """Convert an array or a tensor of samples to a clip.

    Args:
        value: `[length]`, `[length, channels]` or `[channels, length]`, with at most 32 channels: floats, or integers
            of 8 (unsigned), 16 or 32 bits.
        rate: samples per second.
        name: the subject of messages.

    Raises:
        UnreadableSampleError: if the shape, the values or the rate are not those of a sound.
    """
    try:
        array = np.asarray(as_plain(value))
    except (TypeError, ValueError, RuntimeError):
        array = np.empty((), dtype=object)
    if array.dtype.kind not in "iuf":
        raise UnreadableSampleError(f"{name} is of type {type(value).__name__}; expected the samples of a sound.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and min(array.shape) > 32):
        raise UnreadableSampleError(
            f"{name} has shape {list(array.shape)}; expected [length], [length, channels] or [channels, length]."
        )
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    hertz = _checked_rate(rate, name)
    _require_short(len(array), hertz, name)
    scales = {"uint8": 128, "int16": 2**15, "int32": 2**31}
    if array.dtype.kind == "f":
        floats = array.astype(np.float32)
    elif array.dtype.name in scales:
        # Unsigned samples are centred at half of their range.
        centre = 128 if array.dtype.kind == "u" else 0
        floats = ((array.astype(np.float64) - centre) / scales[array.dtype.name]).astype(np.float32)
    else:
        raise UnreadableSampleError(
            f"{name} has samples of type {array.dtype}; expected floats, or integers of type {', '.join(scales)}."
        )
    return _clip([_mixed(floats)], hertz, name)


def _decode(file: IO[bytes], name: str) -> Clip:
    try:
        soundfile = require_soundfile(f"{name} is a sound, and reading it")
    except UserError as error:
        raise UnreadableSampleError(str(error), lasting=False) from None
    if not file.read(1):
        raise UnreadableSampleError(f"{name} is empty; expected a sound.")
    file.seek(0)
    if reason := _missing_end(file):
        raise UnreadableSampleError(f"{name} is truncated: {reason}.")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.format not in FORMATS:
                raise UnreadableSampleError(f"{name} is in the format {sound.format}; expected WAV, FLAC, OGG or MP3.")
            rate = _checked_rate(sound.samplerate, name)
            # The number in a header may be wrong or unknown, so the blocks are counted as well.
            stated = sound.frames if 0 <= sound.frames < 2**62 else 0
            _require_short(stated, rate, name)
            blocks: list[Samples32] = []
            length, most = 0, max(1, _BLOCK // max(1, sound.channels))
            while len(block := sound.read(most, dtype="float32", always_2d=True)):
                blocks.append(_mixed(block))
                length += len(block)
                _require_short(length, rate, name)
    except UnreadableSampleError:
        raise
    # libsndfile's own errors, and those of its wrapper on damaged input.
    except Exception as error:
        reason = (getattr(error, "error_string", "") or str(error).partition("\n")[0] or type(error).__name__).strip()
        raise UnreadableSampleError(f"{name} cannot be read as a sound: {reason.rstrip('.')}.") from error
    if length < stated:
        raise UnreadableSampleError(f"{name} is truncated: it has {length} of {stated} samples.")
    return _clip(blocks, rate, name)


def _missing_end(file: IO[bytes]) -> str:
    """Return why a file is truncated, if its container shows it and libsndfile does not; otherwise an empty text."""
    start = file.read(12)
    size = file.seek(0, io.SEEK_END)
    if start.startswith(b"RIFF") and start[8:] == b"WAVE":
        place = 12
        while place + 8 <= size:
            file.seek(place)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                # A program that writes to a pipe leaves the length open.
                missing = 0 if length >= 2**32 - 2**16 else place + 8 + length - size
                return f"{missing} bytes of {length} are missing" if missing > 0 else ""
            place += 8 + length + length % 2
        return "it has no samples"
    if start.startswith(b"OggS"):
        file.seek(max(0, size - _TAIL))
        tail = file.read(_TAIL)
        last = tail.rfind(b"OggS")
        if last < 0 or len(tail) < last + 6 or not tail[last + 5] & 4:
            return "its last page is missing"
    return ""


def _mixed(samples: Samples32) -> Samples32:
    """Return the mean of the channels of `[length, channels]`; `[length]` is returned unchanged."""
    if samples.ndim == 1:
        return samples
    if samples.shape[1] == 1:
        return samples[:, 0]
    mixed: Samples32 = samples.mean(1, dtype=np.float64).astype(np.float32)
    return mixed


def _checked_rate(rate: Any, name: str) -> int:
    whole = isinstance(rate, int | float | np.integer | np.floating) and float(rate).is_integer()
    if not whole or not RATES[0] <= rate <= RATES[1]:
        raise UnreadableSampleError(
            f"{name} has a sampling rate of {rate!s:.40} Hz; expected {RATES[0]:,} to {RATES[1]:,} Hz."
        )
    return int(rate)


def _require_short(length: int, rate: int, name: str) -> None:
    most = min(LONGEST * rate, MOST_SAMPLES)
    if length > most:
        raise UnreadableSampleError(
            f"{name} lasts {length / rate:,.0f} s or more; a clip of {rate:,} Hz can last {most // rate} s at most. "
            "Cut it into clips."
        )


def _clip(blocks: list[Samples32], rate: int, name: str) -> Clip:
    samples = np.concatenate(blocks) if blocks else np.empty(0, dtype=np.float32)
    if len(samples) == 0:
        raise UnreadableSampleError(f"{name} has a length of 0; it has no sound.")
    if not np.isfinite(samples).all():
        raise UnreadableSampleError(f"{name} has samples that are not finite (NaN or infinity).")
    if (loudest := float(np.abs(samples).max())) > LOUDEST:
        raise UnreadableSampleError(f"{name} has samples up to {loudest:.2g}; expected values in -1..1.")
    return Clip(np.ascontiguousarray(samples), rate)
