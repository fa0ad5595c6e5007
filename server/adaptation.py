"""The proof that heads adapt to rows without labels: each labelled site is treated as one without, in two exchanges."""

import logging

from fedhead.adaptation import Adaptation
from fedhead.protocol.actions import ADAPT
from fedhead.protocol.messages import Payload
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.personal import LEAST_SITES
from fedhead.server.roster import Roster
from fedhead.server.selection import Choice, Rival, figures, in_two_exchanges
from fedhead.solvers.adaptation import METHODS
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import FloatArray
from fedhead.sums.rivals import RivalSums

logger = logging.getLogger(__name__)

ERRORS = 2.0
"""Standard errors by which an adapted head must be better; eight are compared."""

RATIO = 0.98
"""An adapted head's loss must be below this share of the loss without adaptation: a tiny gain changes nothing."""


def prove_adaptations(
    messenger: Messenger, roster: Roster, solver: str, stats: FeatureStatistics, seed: int
) -> tuple[Adaptation | None, Choice | None, Exchange]:
    """Have each site adapt heads of the other sites' rows to its own, without their labels, and compare them.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        solver: of the run's head.
        stats: sums over all sites' training rows.
        seed: of the run.

    Returns:
        The adaptation that is proven best, the comparison, and the traffic; None if no site was asked.
    """
    if len(roster.nodes) < LEAST_SITES:
        logger.warning(
            "Adaptations are not compared: pooled sums are sent to %d sites or more, since each of two could subtract "
            "its own and learn the other's.",
            LEAST_SITES,
        )
        return None, None, Exchange()

    def payload_at(temperatures: FloatArray) -> Payload:
        return Payload({"solver": solver, "temperatures": temperatures.tolist()}, stats.to_arrays())

    sums, exchange = in_two_exchanges(messenger, roster.nodes, roster.rows, ADAPT, payload_at, len(METHODS))
    choice = choose_adaptation(sums)
    choice.log()
    by_method = dict(zip(METHODS, sums.temperatures().tolist(), strict=True))
    return Adaptation(stats, choice.taken, solver, by_method, seed), choice, exchange


def choose_adaptation(sums: RivalSums) -> Choice:
    """Choose the adaptation of least loss, if better than none by `ERRORS` standard errors and below `RATIO`."""
    question = "Rows without labels"
    rivals = [Rival(name, {}) for name in METHODS]
    gains = {name: sums.paired.gain(at, 0) for at, name in enumerate(METHODS) if at}
    margin = (1 - RATIO) * sums.losses[0] / max(sums.rows, 1)
    proven = {name: gain for name, (gain, error) in gains.items() if gain > max(ERRORS * error, margin)}
    best = max(gains, key=lambda name: gains[name][0])
    taken = max(proven, key=lambda name: proven[name], default=METHODS[0])
    if sums.rows < 2:
        reason = "There are too few held-out rows for a proof, so heads are not adapted."
    else:
        gain, error = gains[taken if proven else best]
        compared = (
            f"With each site in turn treated as one without labels, its mean held-out loss is {abs(gain):.4f} "
            f"{'less' if gain > 0 else 'more'} than that of the head as it is, with a paired standard error of "
            f"{error:.4f}"
        )
        reason = (
            f"{compared}."
            if proven
            else f"The best adaptation is {best!r}. {compared}, which does not prove it better."
        )
    return Choice(question, taken, reason, sums.rows, figures(rivals, sums))
