"""Adapters that stay at a site: a file for each round in which it trained, of the latest runs."""

import hashlib
import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.errors import FedheadError
from fedhead.files import disk_errors, write_atomically
from fedhead.sums.sums import Arrays, check_form

logger = logging.getLogger(__name__)

ROUNDS_KEPT = 2
"""Rounds of a run whose adapters are kept: the latest, and the one that it started from, should it be done again."""

RUNS_KEPT = 8
"""Runs whose adapters a site keeps."""


class OwnAdapters:
    """The adapters of one site that never leave it.

    Args:
        folder: the site's own; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, run: str, number: int, form: Arrays) -> Arrays:
        """Return the adapters of the latest round before one; none before the site's first.

        Args:
            run: the name of a run and its layers.
            number: of the round.
            form: arrays of the expected names, shapes and dtype.

        Raises:
            FedheadError: if the file is damaged.
        """
        earlier = [found for found in self._rounds(run) if found < number]
        if not earlier:
            return {}
        path = self._path(run, max(earlier))
        try:
            arrays = load(path.read_bytes())
            check_form(arrays, form)
        except (OSError, SafetensorError, ValueError) as error:
            logger.error("The adapters that stay at this site cannot be read from %s: %s", path, error)
            raise FedheadError(
                "The adapters that stay at this site are damaged; its own log names the file. Without the file, the "
                "site starts again with adapters that change nothing."
            ) from None
        return arrays

    def keep(self, run: str, number: int, arrays: Arrays) -> None:
        """Keep the adapters of a round, and forget those of later rounds, which are done again.

        Raises:
            FedheadError: if they cannot be written.
        """
        path = self._path(run, number)
        with disk_errors(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, save(dict(arrays)))
            rounds = self._rounds(run)
            kept = [found for found in rounds if found <= number][-ROUNDS_KEPT:]
            for other in set(rounds) - set(kept):
                self._path(run, other).unlink(missing_ok=True)
            for old in sorted(self.folder.iterdir(), key=lambda one: one.stat().st_mtime)[:-RUNS_KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def _rounds(self, run: str) -> list[int]:
        found = self._path(run, 0).parent.glob("*.safetensors")
        return sorted(int(path.stem) for path in found if path.stem.isdecimal())

    def _path(self, run: str, number: int) -> Path:
        # A run's name is the coordinator's choice.
        return self.folder / hashlib.sha256(run.encode()).hexdigest()[:32] / f"{number}.safetensors"
