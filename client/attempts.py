"""The journal of attempts: a message that ended the site's process twice is not answered a third time."""

import logging
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhead.errors import FedheadError
from fedhead.files import write_atomically
from fedhead.protocol.fields import Digest

logger = logging.getLogger(__name__)

MOST_DEATHS = 2
KEPT = 64
"""Messages of which deaths are remembered, the latest."""


class _Journal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    current: Digest | None = None
    deaths: dict[Digest, Annotated[int, Field(ge=1, le=MOST_DEATHS)]] = Field({}, max_length=KEPT)


class Attempts:
    """Knows which message the process answers, and how often a process ended abruptly while it answered one.

    A process that is asked to stop, or fails with an error, ends its attempt. One that is killed or aborts cannot, so
    the next process finds the attempt in the journal.

    Args:
        path: the journal. A damaged one counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = _Journal()
        try:
            self._journal = _Journal.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError, RecursionError):
            logger.warning("The journal of attempts %s cannot be read, and is begun anew.", path)
        if (died := self._journal.current) is not None:
            deaths = min(self._journal.deaths.pop(died, 0) + 1, MOST_DEATHS)
            logger.warning(
                "An earlier process ended abruptly while it answered a message (%d of %d).", deaths, MOST_DEATHS
            )
            self._journal.deaths[died] = deaths
            for oldest in list(self._journal.deaths)[:-KEPT]:
                del self._journal.deaths[oldest]
            self._journal.current = None
            try:
                self._write()
            except FedheadError as error:
                logger.warning("%s", error)

    def begin(self, message: str) -> bool:
        """Note that a message is being answered, on disk before this returns; False if it may not be.

        Args:
            message: the SHA-256 of the request.

        Raises:
            UserError: if the journal may not be written.
            FedheadError: if the disk is full.
        """
        if self._journal.deaths.get(message, 0) >= MOST_DEATHS:
            return False
        self._journal.current = message
        self._write()
        return True

    def end(self, *, answered: bool = True) -> None:
        """Note that the message is not being answered any more; once it was answered, earlier deaths do not count."""
        if self._journal.current is None:
            return
        if answered:
            self._journal.deaths.pop(self._journal.current, None)
        self._journal.current = None
        try:
            self._write()
        except FedheadError as error:
            logger.warning("%s", error)

    def _write(self) -> None:
        write_atomically(self.path, self._journal.model_dump_json() + "\n")
