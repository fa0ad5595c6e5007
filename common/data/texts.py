"""Text files."""

from pathlib import Path

from fedhead.data.samples import UnreadableSampleError


def read_text(path: Path) -> str:
    """Read a file whole, as one text in UTF-8.

    Raises:
        UnreadableSampleError: if it is missing or in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UnreadableSampleError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(f"{path} is not a text in UTF-8 (byte {error.start}); save it as such.") from None
