"""The end of a tuned run: the head is solved once more on the tuned features, and the best is kept if proven."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import SITE_COUNTS, Payload, StatisticsRequest
from fedhead.server.collect import Question
from fedhead.server.evaluation import some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.runs.history import Round
from fedhead.server.selection import Rival, choose_tuned, compare_rivals
from fedhead.server.tuned_form import TunedForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.rivals import RivalSums
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

logger = logging.getLogger(__name__)

SOLVED_AGAIN = 2
"""Position of the tail with its head solved again among the rivals."""


@dataclass(frozen=True)
class Decision:
    """What is delivered of a tuned run.

    Attributes:
        arrays: the parameters, as they were compared.
        delivered: the parameters with the head solved from all rows, held-out ones included; None for others.
        tuned: whether the tail is kept; otherwise the solved head is.
        choice: the comparison, as JSON types.
        exchange: the traffic.
    """

    arrays: Arrays
    delivered: Arrays | None
    tuned: bool
    choice: Mapping[str, Any]
    exchange: Exchange


@dataclass(frozen=True)
class Cost:
    """The cost of all rounds.

    Attributes:
        megabytes: of payload to and from a site, on average.
        minutes: from the first to the last round.
    """

    megabytes: float
    minutes: float

    @classmethod
    def of(cls, rounds: Sequence[Round], sites: int) -> Self:
        """Return the cost of rounds, of which that of round 0 is no part of tuning."""
        tuned = [one for one in rounds if one.number]
        total = sum(one.bytes_down + one.bytes_up for one in tuned)
        return cls(total / 1e6 / max(sites, 1), sum(one.seconds for one in tuned) / 60)


def _gain(sums: RivalSums, at: int, cost: Cost) -> str:
    """Say how many points a tuned version gains, and at what cost.

    The interval takes the two versions' errors as independent, and so is wider than a paired one.
    """
    solved, tuned = (float(sums.right[one]) / sums.rows for one in (0, at))
    points = 100 * (tuned - solved)
    half = 196 * math.sqrt((solved * (1 - solved) + tuned * (1 - tuned)) / sums.rows)
    rates = [
        f"{points / spent:+.2g} {unit}"
        for spent, unit in ((cost.megabytes, "per megabyte and site"), (cost.minutes, "per minute"))
        if spent > 0
    ]
    return (
        f"Tuning changed the score by {points:+.1f} points ({points - half:+.1f} to {points + half:+.1f}), "
        f"for {cost.megabytes:.2g} MB of each site and {cost.minutes:.2g} minutes: {' and '.join(rates)}."
    )


def decide(
    messenger: Messenger,
    roster: Roster,
    pooling: Pooling,
    form: TunedForm,
    task: Task,
    stats: FeatureStatistics,
    best: tuple[int, Arrays],
    rounds: int,
    cost: Cost,
    seed: int,
) -> Decision:
    """Solve the head on the best tail's features, and compare it, the trained one and the solved head of round 0.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        pooling: asks them for sums.
        form: of what is trained.
        task: of the run.
        stats: of the frozen backbone's features.
        best: the round and the parameters of the best tail.
        rounds: the number of rounds that it is the best of.
        cost: of all rounds.
        seed: draws sites where there are very many.

    Raises:
        FedheadError: if too few sites answer.
    """
    number, arrays = best
    exchange = Exchange()
    tail = form.tail_of(arrays)
    train = _tuned_statistics(pooling, task, tail, StatisticsRequest(), exchange)
    rivals = [
        Rival("the solved head", form.start(stats)),
        Rival(f"round {number}", arrays, "tail"),
        Rival(f"round {number} with its head solved again", form.solved_on(tail, train), "tail"),
    ]
    sums, asking = compare_rivals(messenger, some_sites(roster.nodes, seed), roster.rows, rivals)
    exchange.include(asking)
    taken, choice = choose_tuned(rivals, sums, rounds)
    if sums.rows:
        choice = replace(choice, reason=f"{choice.reason} {_gain(sums, taken or SOLVED_AGAIN, cost)}")
    logger.info("%s: %s. %s", choice.question, choice.taken, choice.reason)
    delivered = None
    if taken == SOLVED_AGAIN:
        held_out = _tuned_statistics(pooling, task, tail, StatisticsRequest(rows="held_out"), exchange)
        delivered = form.solved_on(tail, train + held_out)
    return Decision(rivals[taken].arrays, delivered, taken > 0, choice.to_dict(), exchange)


def _tuned_statistics(
    pooling: Pooling, task: Task, tail: Arrays, request: StatisticsRequest, exchange: Exchange
) -> FeatureStatistics:
    """Return the sum of the sites' statistics of a tail's features."""
    origin = pooling.origin()
    content = Payload(request.payload().values, tail).to_content()
    question = Question(STATISTICS, content, task.statistics(len(origin), origin), beside=(SITE_COUNTS,))
    collected = pooling.summed(question, known=True)
    exchange.include(collected.exchange)
    return collected.total
