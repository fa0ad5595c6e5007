"""Who else watches a run from the command line: the live page, and trackers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedhead.cli.application import errors

if TYPE_CHECKING:
    from fedhead.server.observer import Observer


@contextmanager
def watching(dashboard: str, *, anywhere: bool, track: Sequence[str] | None) -> "Iterator[list[Observer]]":
    """Return the observers of a run; a live page is served until the block ends.

    Args:
        dashboard: `HOST:PORT` of the live page; empty for none.
        anywhere: whether that may be an address that other machines reach.
        track: the names of trackers.

    Raises:
        UserError: if an address or a tracker cannot be used.
    """
    from fedhead.server.tracking import Tracked, find_tracker

    observers: list[Observer] = [Tracked(name, find_tracker(name)) for name in track or ()]
    if not dashboard:
        yield observers
        return
    from fedhead.server.report.live import LivePage

    with LivePage(dashboard, anywhere=anywhere) as page:
        errors.print(f"The run's page is on {page.url}", highlight=False)
        yield [*observers, page]
