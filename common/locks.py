"""Locks between processes on open files: `flock` on POSIX, one byte far behind the content on Windows.

The lock is on the very file that is protected, which a library of lock files beside it does not offer: processes with
another `FEDHEAD_HOME` see it, read-only folders can be locked, and the file can name its holder.
"""

import os
import sys
import time

LOOK_SECONDS = 0.05
LOCKED_BYTE = 2**30


def lock(handle: int, *, wait: bool = True) -> None:
    """Lock an open file until it is closed.

    Args:
        handle: its descriptor.
        wait: whether to wait while another process has the lock.

    Raises:
        BlockingIOError: if another process has it, and `wait` is False.
        OSError: if the file system has no locks.
    """
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while not _lock_byte(handle):
        if not wait:
            raise BlockingIOError("The file is locked by another process.")
        time.sleep(LOOK_SECONDS)


def _lock_byte(handle: int) -> bool:
    """Lock one byte of a file with Windows' C runtime; return whether it was free."""
    import msvcrt

    position = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError:
        return False
    finally:
        os.lseek(handle, position, os.SEEK_SET)
    return True
