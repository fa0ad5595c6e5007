"""Personal heads of sites: each site makes its own from pooled sums or the shared head, and counts how it does."""

import logging

from fedhead.evaluation.personal import PersonalComparison, PersonalHeads, compare_personal
from fedhead.protocol.actions import PERSONALISE
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import Payload
from fedhead.server.collect import Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.roster import Roster
from fedhead.sums.comparison import ComparisonSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays

logger = logging.getLogger(__name__)

LEAST_SITES = 3
"""Of two sites, each would learn the other's sums by subtracting its own from the pooled ones."""

_POOL = "pool."


def personalise(
    messenger: Messenger,
    roster: Roster,
    mode: str,
    head: HeadRequest,
    stats: FeatureStatistics | None,
    family: Arrays | None = None,
) -> tuple[PersonalHeads | None, Exchange]:
    """Have every site make and keep a head of its own, and compare it with the shared head.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        mode: the setting `personal`, other than `none`; `adapters` for those that stay at sites.
        head: the shared head, in the coordinates of training.
        stats: the pooled training statistics.
        family: the parameters that sites share, for `adapters`.

    Returns:
        The comparison, and the traffic; None if no site was asked.
    """
    arrays: Arrays = family or {}
    if mode == "closed":
        if stats is None or len(roster.nodes) < LEAST_SITES:
            logger.warning(
                "No personal heads are made: pooled sums are sent to %d sites or more, since each of two could "
                "subtract its own and learn the other's. personal = 'ditto' needs no sums.",
                LEAST_SITES,
            )
            return None, Exchange()
        arrays = {f"{_POOL}{name}": array for name, array in stats.to_arrays().items()}
    plain = Payload.from_content(head.to_content())
    content = Payload({**plain.values, "mode": mode}, {**plain.arrays, **arrays}).to_content()
    sites: dict[str, PersonalComparison] = {}

    def note(names: tuple[str, ...], sums: ComparisonSums, beside: Arrays) -> None:
        compared = compare_personal(sums)
        if compared is not None and messenger.summation is None:
            sites[names[0]] = compared

    question = Question(PERSONALISE, content, ComparisonSums.zeros(), together=False)
    collected = collect(messenger, roster.nodes, question, roster.rows, note)
    pooled = compare_personal(collected.total)
    return PersonalHeads(mode, pooled, dict(sorted(sites.items()))), collected.exchange
