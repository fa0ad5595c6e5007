"""The end of a tuned run: the head is solved once more on the tuned features, and the best is kept if proven."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from fedhead.errors import FedheadError
from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import SITE_COUNTS, Payload, StatisticsRequest
from fedhead.server.collect import Question
from fedhead.server.evaluation import some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.rounds import Version
from fedhead.server.runs.history import Round
from fedhead.server.selection import BAR, Choice, Rival, choose_tuned, compare_rivals, errors_to_gain
from fedhead.server.tuned_form import TunedForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.rivals import RivalSums
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task
from fedhead.wording import duration, signed, size

logger = logging.getLogger(__name__)

LEAST_RATE = 0.01
"""Points per megabyte or minute that are worth reporting."""


@dataclass(frozen=True)
class Decision:
    """What is delivered of a tuned run.

    Attributes:
        number: the round whose tail is kept; 0 for the solved head.
        arrays: the parameters, as they were compared.
        delivered: the parameters with the head solved from all rows, held-out ones included; None for others.
        choice: the comparison, as JSON types.
        exchange: the traffic.
    """

    number: int
    arrays: Arrays
    delivered: Arrays | None
    choice: Mapping[str, Any]
    exchange: Exchange


class _Version(NamedTuple):
    """A tail whose head is solved again.

    Attributes:
        number: of its round.
        tail: its parameters; none of the backbone as it is.
        train: statistics of its features over training rows.
        solved: the parameters with the head solved from these.
    """

    number: int
    tail: Arrays
    train: FeatureStatistics
    solved: Arrays


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
    def of(cls, finished: Sequence[Round], last: Version, sites: int) -> Self:
        """Return the cost of finished rounds and of the last version, without that of round 0."""
        spent = [(one.bytes_down + one.bytes_up, one.seconds) for one in finished if one.number]
        if last.number:
            spent.append((last.made_by.bytes_down + last.made_by.bytes_up, last.seconds))
        total, seconds = (sum(values) for values in zip((0, 0.0), *spent, strict=True))
        return cls(total / 1e6 / max(sites, 1), seconds / 60)

    def __str__(self) -> str:
        return f"{size(round(1e6 * self.megabytes))} of each site and {duration(60 * self.minutes)}"


def gain_of_tuning(sums: RivalSums, at: int, cost: Cost) -> str:
    """Describe the gain of a tuned version in points with its paired 95 % interval, and its cost."""
    points, error = (100 * one for one in sums.more_right(at, 0))
    half = 1.96 * error if math.isfinite(error) else 100.0
    changed, low, high = (signed(one, 1) for one in (points, points - half, points + half))
    rates = [
        f"{signed(points / spent, 2)} points per {unit}"
        for spent, unit in ((cost.megabytes, "megabyte and site"), (cost.minutes, "minute"))
        if spent and abs(points / spent) >= LEAST_RATE
    ]
    each = f": {', and '.join(rates)}" if rates else ""
    return f"Tuning changed the score by {changed} points ({low} to {high}), for {cost}{each}."


def _version(
    pooling: Pooling, form: TunedForm, task: Task, number: int, arrays: Arrays, exchange: Exchange
) -> _Version | None:
    """Return the tail of a round with sums over its features; None if these determine no head."""
    tail = form.tail_of(arrays)
    try:
        train = _tuned_statistics(pooling, task, tail, StatisticsRequest(), exchange)
        solved = form.solved_on(tail, train)
    except FedheadError as error:
        logger.warning("No head can be solved on the features of round %d: %s", number, error)
        return None
    return _Version(number, tail, train, solved)


def decide(
    messenger: Messenger,
    roster: Roster,
    pooling: Pooling,
    form: TunedForm,
    task: Task,
    stats: FeatureStatistics,
    best: tuple[int, Arrays],
    last: tuple[int, Arrays],
    cost: Cost,
    seed: int,
) -> Decision:
    """Solve the head on tuned features, and compare it with the solved head of round 0.

    The tail of the last round comes first: nothing has selected it, so that held-out rows prove it best. The tail with
    the least held-out loss comes second, with a higher bar, and third its trained head.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        pooling: asks them for sums.
        form: of the tail and its head.
        task: of the run.
        stats: of the frozen backbone's features.
        best: the round and the parameters with the least held-out loss; of round 0 if no tail is better.
        last: the last round and its parameters.
        cost: of all rounds.
        seed: draws sites where there are very many.

    Raises:
        FedheadError: if too few sites answer.
    """
    exchange = Exchange()
    versions = [_Version(0, {}, stats, form.start(stats))]
    rivals, bars = [Rival("the solved head", versions[0].solved)], [0.0]
    selected = errors_to_gain(last[0])
    for number, arrays, bar in ((*last, BAR), (*best, selected)):
        if number in [version.number for version in versions]:
            continue
        if (version := _version(pooling, form, task, number, arrays, exchange)) is not None:
            rivals.append(Rival(f"round {number} with its head solved again", version.solved, "tail"))
            bars.append(bar)
            versions.append(version)
    if best[0]:
        rivals.append(Rival(f"round {best[0]}", best[1], "tail", trained=True))
        bars.append(selected)
    if len(rivals) == 1:
        return _undecided(rivals[0], exchange)
    sums, asking = compare_rivals(messenger, some_sites(roster.nodes, seed), roster.rows, rivals)
    exchange.include(asking)
    taken, choice = choose_tuned(rivals, bars, sums)
    if sums.rows:
        choice = replace(choice, reason=f"{choice.reason} {gain_of_tuning(sums, taken or 1, cost)}")
    choice.log()
    number, delivered = versions[taken].number if taken < len(versions) else best[0], None
    if 0 < taken < len(versions):
        delivered = _solved_from_all(pooling, form, task, versions[taken], exchange)
    return Decision(number, rivals[taken].arrays, delivered, choice.to_dict(), exchange)


def _solved_from_all(
    pooling: Pooling, form: TunedForm, task: Task, kept: _Version, exchange: Exchange
) -> Arrays | None:
    """Return a version with its head solved from held-out rows, too; None if these could not be summed."""
    try:
        held_out = _tuned_statistics(pooling, task, kept.tail, StatisticsRequest(rows="held_out"), exchange)
    except FedheadError as error:
        logger.warning("The head is solved from training rows alone: %s", error)
        return None
    return form.solved_on(kept.tail, kept.train + held_out)


def _undecided(solved: Rival, exchange: Exchange) -> Decision:
    choice = Choice("Tuning", solved.name, "No tuned version could be compared with it.", 0, [])
    return Decision(0, solved.arrays, None, choice.to_dict(), exchange)


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
