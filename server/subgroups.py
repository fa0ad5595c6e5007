"""Evaluation of a head in each subgroup of the sites' held-out rows, such as sexes or scanners."""

import logging
from collections.abc import Mapping
from typing import Any

from fedhead.config import RunConfig
from fedhead.evaluation.subgroups import compare_groups, worst_group
from fedhead.protocol.actions import SUBGROUPS
from fedhead.protocol.heads import HeadRequest, SubgroupsRequest
from fedhead.server.collect import Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.sums.subgroups import SubgroupSums
from fedhead.tasks import Task
from fedhead.wording import listed

logger = logging.getLogger(__name__)


def evaluate_subgroups(
    messenger: Messenger,
    nodes: Mapping[str, int],
    rows: Mapping[str, int],
    config: RunConfig,
    task: Task,
    head: HeadRequest,
    temperature: float,
) -> tuple[dict[str, Any], Exchange]:
    """Ask the sites how a head does in each subgroup of the run; one exchange.

    Args:
        messenger: reaches the sites.
        nodes: the sites to ask, by name.
        rows: the number of rows of each.
        config: of the run, with one subgroup or more.
        task: of the run.
        head: the head, as the sites train it.
        temperature: the divisor of its logits.

    Returns:
        The comparison as JSON types, empty if no row was counted; and the exchange.
    """
    names = config.subgroups
    nothing = SubgroupSums([task.no_rows() for _ in names])
    content = SubgroupsRequest(head, names, temperature).to_content()
    collected = collect(messenger, nodes, Question(SUBGROUPS, content, nothing), rows)
    counted = {name: sums for name, sums in zip(names, collected.total.parts, strict=True) if sums.rows}
    if not counted:
        logger.warning(
            "No subgroup was evaluated: at every site, %s (%s) has too few held-out rows, or no site names their "
            "column (group_by). Merge small subgroups, such as ages into bands.%s",
            "the only subgroup" if len(names) == 1 else f"each of {len(names)} subgroups",
            listed(names, 5),
            collected.exchange.first_reasons(),
        )
        return {}, collected.exchange
    groups = compare_groups(counted, task.columns, config.sensitivity or None)
    sentence = worst_group(groups)
    logger.info("%s", sentence)
    without = [name for name in names if name not in counted]
    return {"groups": [one.to_dict() for one in groups], "sentence": sentence, "without": without}, collected.exchange
