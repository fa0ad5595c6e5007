"""The end of a tuned run: the head is solved once more on the tuned features, and the best is kept if proven."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import SITE_COUNTS, Payload, StatisticsRequest
from fedhead.server.collect import Question
from fedhead.server.evaluation import some_sites
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.pooling import Pooling
from fedhead.server.roster import Roster
from fedhead.server.selection import Rival, choose_tuned, compare_rivals
from fedhead.server.tuned_form import TunedForm
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What is delivered of a tuned run.

    Attributes:
        arrays: the parameters.
        tuned: whether the tail is kept; otherwise the solved head is.
        choice: the comparison, as JSON types.
        exchange: the traffic.
    """

    arrays: Arrays
    tuned: bool
    choice: Mapping[str, Any]
    exchange: Exchange


def decide(
    messenger: Messenger,
    roster: Roster,
    pooling: Pooling,
    form: TunedForm,
    task: Task,
    stats: FeatureStatistics,
    best: tuple[int, Arrays],
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
        seed: draws sites where there are very many.

    Raises:
        FedheadError: if too few sites answer.
    """
    number, arrays = best
    exchange = Exchange()
    origin = pooling.origin()
    content = Payload(StatisticsRequest().payload().values, form.tail_of(arrays)).to_content()
    question = Question(STATISTICS, content, task.statistics(len(origin), origin), beside=(SITE_COUNTS,))
    collected = pooling.summed(question, known=True)
    exchange.include(collected.exchange)
    rivals = [
        Rival("the solved head", form.start(stats)),
        Rival(f"round {number}", arrays, "tail"),
        Rival(f"round {number} with its head solved again", form.solved_on(arrays, collected.total), "tail"),
    ]
    sums, asking = compare_rivals(messenger, some_sites(roster.nodes, seed), roster.rows, rivals)
    exchange.include(asking)
    taken, choice = choose_tuned(rivals, sums)
    logger.info("%s: %s. %s", choice.question, choice.taken, choice.reason)
    return Decision(rivals[taken].arrays, taken > 0, choice.to_dict(), exchange)
