"""Flower's Grid, with further abilities of fedhead's own Grids."""

import time
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence

from flwr.serverapp import Grid


class SiteGrid(Grid, ABC):
    """A Grid that knows more of its sites than Flower asks for; the methods here answer for one that does not.

    Attributes:
        in_process: whether the sites are in this process, so that the first pull returns every reply.
    """

    in_process = False

    def site_name(self, node_id: int) -> str | None:
        """Return the name that a node is registered under; None if it is not known."""
        return None

    def together(self, node_ids: Sequence[int]) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
        """Return nodes that each answer for several of `node_ids`, with these, and the rest of `node_ids`."""
        return {}, list(node_ids)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages that are no longer waited for, and replies to them."""

    def wait(self, seconds: float) -> None:
        """Return once a reply has come since the last pull or wait, or after `seconds`."""
        time.sleep(seconds)
