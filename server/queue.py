"""Runs one after another, from a folder of TOML files, over sites that stay connected."""

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedhead.config import RunConfig
from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, write_atomically
from fedhead.server.report.journal import end_journal
from fedhead.wording import counted

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
SETTLED_SECONDS = 1.0
"""A file that changed within this time may still be being written."""


TAKEN = ".taken"
"""File that names the file whose run is going on, with its digest."""


class RunQueue:
    """A folder whose `*.toml` files are run in the order of their names.

    A file stays in place until its run has ended, so that a process that is killed resumes the run, or moves the file
    if the run had finished. The file moves to `done/`, or to `failed/` beside a text that gives the reason. Moved back
    from there, it is resumed too.

    Args:
        folder: it is made if it is missing.
        runs: holds a run folder for each file, named after it; by default `runs` in `folder`.

    Raises:
        UserError: if a folder cannot be made or read.
    """

    def __init__(self, folder: Path, runs: Path | None = None) -> None:
        self.folder = folder
        self.runs = runs or folder / "runs"
        with disk_errors(folder):
            for each in (folder, folder / "done", folder / "failed", self.runs):
                each.mkdir(parents=True, exist_ok=True)

    def serve(
        self, read: Callable[[Path], RunConfig], run: Callable[[RunConfig, Path, bool], object], *, ends: bool = False
    ) -> None:
        """Run each file that is or comes there, without end.

        Args:
            read: returns the configuration in a file.
            run: runs a configuration into a folder; the last argument says whether to resume the run there.
            ends: whether to return once no file is left.
        """
        waits = False
        while True:
            file = self.next()
            if file is not None:
                waits = False
                self._run(file, read, run)
            elif ends:
                return
            else:
                if not waits:
                    logger.info("Waiting for a run: a TOML file in %s.", self.folder)
                waits = True
                time.sleep(LOOK_SECONDS)

    def next(self) -> Path | None:
        """Return the file to run next, by name; None if there is none."""
        for file in sorted(self.folder.glob("*.toml")):
            # A file may be gone by now, or a link to nothing.
            with suppress(OSError):
                settled = time.time() - file.stat().st_mtime > SETTLED_SECONDS
                if file.is_file() and not file.name.startswith(".") and settled:
                    return file
        return None

    def _run(
        self, file: Path, read: Callable[[Path], RunConfig], run: Callable[[RunConfig, Path, bool], object]
    ) -> None:
        folder = self.runs / file.stem
        waiting = len([each for each in self.folder.glob("*.toml") if each != file])
        logger.info("Taking %s from the queue; %s after it.", file.name, counted(waiting, "run"))
        try:
            config, taken = read(file), _identity(file)
            if not (folder / "result.json").exists():
                write_atomically(self.folder / TAKEN, taken)
                run(config, folder, (folder / "run.toml").exists())
            elif self._was_taken(taken):
                logger.info("The run of %s had finished before its process ended.", file.name)
                end_journal(folder)
            else:
                raise UserError(f"{folder} holds a finished run of this name; give the file another name.")
        except FedheadError as error:
            logger.error("The run of %s failed: %s", file.name, error)
            self._move(file, "failed", str(error))
        # One run's failure must not end the others.
        except Exception as error:
            logger.exception("The run of %s failed unexpectedly.", file.name)
            self._move(file, "failed", f"{type(error).__name__}: {error}")
        else:
            self._move(file, "done")

    def _move(self, file: Path, where: str, reason: str = "") -> None:
        target, number = self.folder / where / file.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{file.stem}-{number}.toml")
        with disk_errors(target):
            file.rename(target)
            (self.folder / TAKEN).unlink(missing_ok=True)
        if reason:
            write_atomically(target.with_suffix(".txt"), f"{reason}\n")

    def _was_taken(self, taken: str) -> bool:
        """Return whether an earlier process took this very file and did not move it."""
        with suppress(OSError, ValueError):
            return (self.folder / TAKEN).read_text(encoding="utf-8") == taken
        return False


def _identity(file: Path) -> str:
    with disk_errors(file):
        return f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
