"""Words for refusals: a site's own paths, which may hold a person's name, stay in its log."""

import logging
from pathlib import Path

from fedhead.errors import FedheadError
from fedhead.files import home

logger = logging.getLogger(__name__)

SAID_IN_LOG = "The site cannot do it; its own log says why."


def sayable(error: FedheadError) -> str:
    """Return the sentence of an error that names no folder of this machine; else log it, and return another one."""
    text = str(error)
    folders = {str(home()), str(home().resolve()), str(Path.home())} - {"/"}
    if not any(folder in text for folder in folders):
        return text
    logger.error("%s", text)
    return SAID_IN_LOG
