"""Atomic writes of files and folders, and fedhead's own folder."""

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedhead.errors import FedheadError, UserError
from fedhead.locks import lock
from fedhead.wording import printable

BINARY: int = getattr(os, "O_BINARY", 0)
"""Flag of `os.open` that keeps Windows from changing ends of lines."""
_REFUSALS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def home() -> Path:
    """Return where features and weights are kept: `FEDHEAD_HOME`, or `~/.cache/fedhead`."""
    chosen = os.environ.get("FEDHEAD_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fedhead"


_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")
"""Names that Windows keeps for devices, also with any ending."""


def safe_name(name: str) -> str:
    """Return a file name that any file system takes, a different one for every `name`."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) and not _DEVICES.fullmatch(name):
        return name
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower())[:48].strip("-")
    if _DEVICES.fullmatch(readable):
        readable = f"{readable}-site"
    return f"{readable or 'site'}.{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into sentences about `path`.

    Raises:
        UserError: if it may not be written there.
        FedheadError: if the disk is full, or the file would be larger than allowed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FedheadError(
                f"The disk is full: {path} could not be written. What was complete is kept. Free some space, "
                "or point FEDHEAD_HOME (features, weights) or --out (runs) to another disk, and start again."
            ) from error
        if error.errno == errno.EFBIG:
            raise FedheadError(
                f"{path} could not be written: a file on this disk, or of this process (ulimit -f), may be no larger. "
                "What was complete is kept. Raise the limit, or use another disk, and start again."
            ) from error
        if error.errno in _REFUSALS and _concerns(error.filename, path):
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
        raise


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Keep other processes from changing the content of a folder.

    Raises:
        UserError: if there is no such folder, or it cannot be read.
        FedheadError: if another process is changing it.
    """
    # Windows opens no folders.
    windows = sys.platform == "win32"
    try:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR if path.exists() else errno.ENOENT))
        handle = os.open(path / ".lock" if windows else path, os.O_RDWR | os.O_CREAT if windows else os.O_RDONLY)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be read: {error.strerror}.") from None
    try:
        try:
            lock(handle, wait=False)
        except BlockingIOError:
            raise FedheadError(f"{path} is being changed by another process; start again when it has ended.") from None
        yield
    finally:
        os.close(handle)


def _concerns(filename: object, path: Path) -> bool:
    """Return whether the file of an error is `path`, beside or below it, or a folder above."""
    if not isinstance(filename, str | os.PathLike):
        return True
    return Path(filename).is_relative_to(path.parent) or path.is_relative_to(filename)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it, and rename it to `path`; the folder is made if it is missing.

    Texts are written in UTF-8, made `printable`.

    Raises:
        UserError: if it may not be written.
        FedheadError: if the disk is full.
    """
    with replaced(path) as temporary:
        temporary.write_bytes(printable(content).encode() if isinstance(content, str) else content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to, which is flushed and renamed to `path` if all goes well, else removed.

    Raises:
        UserError: if it may not be written.
        FedheadError: if the disk is full.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def require_new_folder(path: Path, advice: str) -> None:
    """Check that nothing, or an empty folder, is at a path.

    Args:
        path: of a folder to write.
        advice: a sentence on the remedy otherwise.

    Raises:
        UserError: if something else is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; {advice}")


@contextmanager
def new_folder(path: Path, advice: str) -> Iterator[Path]:
    """Give a temporary folder to fill, which is renamed to `path` if nothing fails, and removed otherwise.

    Args:
        path: of the folder.
        advice: a sentence on the remedy if there is a folder with content.

    Raises:
        UserError: if `path` is something else than an empty folder, or cannot be written.
        FedheadError: if the disk is full.
    """
    with disk_errors(path):
        require_new_folder(path, advice)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            yield temporary
            temporary.chmod(0o755)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out that lock the same file, which is made if it is missing."""
    with path.open("w", encoding="utf-8") as file:
        lock(file.fileno())
        yield


def sync_folder(path: Path) -> None:
    """Make the names of the files in a folder survive a power cut, as their contents do; Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_private(path: Path) -> None:
    """Check that nobody but its owner can read a private key, by its mode; on Windows it has none.

    Raises:
        UserError: if others can.
    """
    if sys.platform != "win32" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise UserError(
            f"The private key {path} can be read by others on this machine (mode {mode:04o}): chmod 600 {path}."
        )


def flush(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, of which little is in memory at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
