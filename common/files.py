"""Files that are there whole or not at all, and where fedhead keeps its own."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedhead.errors import FedheadError, UserError


def home() -> Path:
    """Return where features and weights are kept: `FEDHEAD_HOME`, or `~/.cache/fedhead`."""
    chosen = os.environ.get("FEDHEAD_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fedhead"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into sentences about `path`.

    Raises:
        UserError: if it may not be written there.
        FedheadError: if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FedheadError(
                f"The disk is full: {path} could not be written. What was complete is kept. Free some space, "
                "or point FEDHEAD_HOME (features, weights) or --out (runs) to another disk, and start again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it, and rename it to `path`; the folder is made where missing.

    Raises:
        UserError: if it may not be written.
        FedheadError: if the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
