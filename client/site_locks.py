"""Which processes of a site may be up at the same time: one for each coordinator, all under one name."""

import hashlib
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedhead.client.settings import SiteSettings
from fedhead.data.specs import local_path
from fedhead.errors import UserError
from fedhead.files import disk_errors, home, locked, safe_name
from fedhead.locks import lock

logger = logging.getLogger(__name__)

_HOLDER = re.compile(rb"[a-z0-9_-]+, process [0-9]+")


@contextmanager
def only_process(settings: SiteSettings, coordinator: str) -> Iterator[None]:
    """Hold this site's name for one coordinator, and its data for this name.

    A site's ledger and atoms belong to its name, and are locked at each use. So several processes may serve the same
    data to different coordinators if they share the name: what leaves through one is compared with what left through
    the others. Under a second name nothing would be.

    Args:
        settings: the site's.
        coordinator: an identifier of the coordinator.

    Raises:
        UserError: if another process serves this coordinator, or has the data under another name.
    """
    there = local_path(settings.data)
    # Sites may share a table, each with its own rows of it: then the options tell them apart.
    options = settings.data.partition("?")[2]
    data = settings.data if there is None else f"{there}?{options}" if options else str(there)
    locks = home() / "sites" / "locks"
    name = safe_name(settings.name)
    prefix = f"data-{hashlib.sha256(data.encode()).hexdigest()[:32]}."
    with ExitStack() as held:
        with disk_errors(locks):
            locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(locks / "taking.lock"):
            _take(locks / f"name-{name}.{coordinator}", name, f"the site {settings.name} and this coordinator", held)
            names = _holders(locks, prefix)
            if other := next((holder for each, holder in names.items() if each != name), ""):
                raise UserError(
                    f"Another fedhead client is up for the data {settings.data} on this machine: {other}; data has one "
                    "name, also for several coordinators, so that one ledger sees all that leaves. End that client, or "
                    "have this coordinator register the site under that name."
                )
            _take(locks / f"{prefix}{name}.{coordinator}", name, f"the data {settings.data}", held)
            # Windows opens no folders.
            lockable = there is not None and (there.is_file() or sys.platform != "win32")
            if there is not None and lockable and not names and not options and os.access(there, os.R_OK):
                # The lock that processes with another FEDHEAD_HOME see, where the file system has one to give.
                _hold(os.open(there, os.O_RDONLY), f"the data {settings.data}", held)
        yield


def _take(path: Path, name: str, what: str, held: ExitStack) -> None:
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    _hold(handle, what, held)
    os.truncate(handle, 0)
    os.write(handle, f"{name}, process {os.getpid()}".encode())


def _holders(locks: Path, prefix: str) -> dict[str, str]:
    """Return the names under which processes have some data, each with such a process in words."""
    holders = {}
    for path in sorted(locks.glob(f"{prefix}*")):
        handle = os.open(path, os.O_RDWR)
        try:
            lock(handle, wait=False)
        except BlockingIOError:
            holders[path.name.removeprefix(prefix).rpartition(".")[0]] = _holder(handle).removeprefix(": ")
        except OSError as error:
            logger.debug("No lock is available: %s.", error)
        finally:
            os.close(handle)
    return holders


def _hold(handle: int, what: str, held: ExitStack) -> None:
    held.callback(os.close, handle)
    try:
        lock(handle, wait=False)
    except BlockingIOError:
        raise UserError(
            f"Another fedhead client is up for {what} on this machine{_holder(handle)}; a site has one. End it first."
        ) from None
    except OSError as error:
        logger.debug("No lock is available: %s.", error)


def _holder(handle: int) -> str:
    """Return the holder of a lock: the text that it wrote into one of ours, or its process if the system names it."""
    about = os.fstat(handle)
    if stat.S_ISREG(about.st_mode) and (said := _HOLDER.match(os.read(handle, 200))):
        return f": {said[0].decode()}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            _, kind, _, _, process, file, *_ = line.split()
            if kind == "FLOCK" and int(file.rpartition(":")[2]) == about.st_ino and int(process) > 0:
                return f": process {process}"
    return ""
