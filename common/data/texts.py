"""Texts from files and from values."""

from pathlib import Path
from typing import Any

from fedhead.data.items import UnreadableSampleError
from fedhead.data.labels import is_missing


def read_text(path: Path) -> str:
    """Read a whole file as one text in UTF-8.

    Raises:
        UnreadableSampleError: if it is missing, empty or in another encoding.
    """
    try:
        return plain_text(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UnreadableSampleError(
                f"{path} is not a text in UTF-8 (byte {error.start}); save it in that encoding."
            ) from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableSampleError(f"{path} cannot be read: {reason}.", lasting=False) from error


def plain_text(value: Any, name: str) -> str:
    """Return a value as a text.

    Raises:
        UnreadableSampleError: naming it `name`, if it is missing, blank, or not a text.
    """
    if isinstance(value, str) and value.strip():
        return str(value)
    if is_missing(value) or isinstance(value, str):
        raise UnreadableSampleError(f"{name} has no text.")
    raise UnreadableSampleError(f"{name} is of type {type(value).__name__}, not a text.")
