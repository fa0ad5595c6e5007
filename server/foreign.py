"""The test for foreign inputs: distances from pooled rows of unit length, and their distribution on held-out rows."""

import logging
from collections.abc import Mapping

from torch import Tensor

from fedhead.errors import UserError
from fedhead.evaluation.foreign import LEAST_ROWS, MOST_FEATURES, SHARE, Distances, Foreign
from fedhead.heads.feature_map import basis_for
from fedhead.protocol.actions import DISTANCES
from fedhead.protocol.messages import Payload
from fedhead.server.collect import Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.sums.foreign import DistanceSums
from fedhead.tasks import Task

logger = logging.getLogger(__name__)


def foreign_test(
    messenger: Messenger, nodes: Mapping[str, int], rows: Mapping[str, int], probe: Tensor, task: Task
) -> tuple[Foreign | None, Exchange]:
    """Ask the sites for sums of rows of unit length, and how far their held-out rows are; two exchanges.

    Args:
        messenger: reaches the sites.
        nodes: the sites to ask, by name.
        rows: the number of rows of each.
        probe: the features `[PROBES, d]` of the probe.
        task: of the run.

    Returns:
        The test, or None if there can be none, with a warning; and the exchange.
    """
    form, width = basis_for(probe), probe.shape[1]
    if width > MOST_FEATURES:
        logger.warning(
            "Foreign inputs are not recognised: the backbone has %d features, and their distances take %d or less.",
            width,
            MOST_FEATURES,
        )
        return None, Exchange()
    asked = Question(DISTANCES, Payload({"form": form}).to_content(), task.statistics(width))
    summed = collect(messenger, nodes, asked, rows)
    exchange = summed.exchange
    try:
        distances = Distances.from_statistics(summed.total, form)
    except UserError as problem:
        logger.warning("Foreign inputs are not recognised: %s", problem)
        return None, exchange
    question = Question(DISTANCES, Payload({"form": form}, distances.to_arrays()).to_content(), DistanceSums())
    # Only sites whose training rows are in the sums judge them.
    nodes = {name: node for name, node in nodes.items() if name not in exchange.dropped}
    collected = collect(messenger, nodes, question, rows)
    exchange.include(collected.exchange)
    if (counted := collected.total.rows) < LEAST_ROWS:
        logger.warning("Foreign inputs are not recognised: %d held-out rows are too few for a limit.", counted)
        return None, exchange
    # With fewer rows the limit would be beyond all of them.
    share = max(SHARE, 2 / counted)
    return Foreign(distances, collected.total, share), exchange
