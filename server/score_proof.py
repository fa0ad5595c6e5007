"""Choice between the solved head and one from rounds by the task's own score on held-out items."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedhead.evaluation.metrics import Estimate
from fedhead.server.exchange import POOL
from fedhead.server.selection import BAR, Choice
from fedhead.tasks import Task
from fedhead.wording import signed

LEAST_SITES = 3
"""Sites with a score below which their differences have no standard error worth the name."""

_Z = 1.959963984540054


def choose_by_score(
    task: Task, before: Mapping[str, Any], after: Mapping[str, Any], round_number: int
) -> tuple[bool, Choice]:
    """Choose between two heads: the one from rounds if its score is higher by `BAR` standard errors.

    The error is that of the sites' paired differences, weighted by items; of fewer than `LEAST_SITES` sites, and where
    only the pool's sums are known, that of two independent scores, which is larger.

    Args:
        task: of the run.
        before: evaluation sums of the solved head by site.
        after: those of the head from rounds.
        round_number: the round that it comes from.

    Returns:
        Whether rounds are proven better, and the choice for readers.
    """
    names = ("round 0", f"round {round_number}")
    sites = sorted(before.keys() & after.keys())
    pooled = [task.pooled([sums[site] for site in sites]) for sums in (before, after)]
    scores: list[Estimate] = [task.report(sums).score for sums in pooled]
    rivals = [{"name": name, "score": one.value} for name, one in zip(names, scores, strict=True)]
    old, new = scores[0].value, scores[1].value
    if not sites or old is None or new is None:
        said = "Nothing held out has a score, so rounds are not proven better."
        return False, Choice("Kept head", names[0], said, 0, rivals)
    error, how = _error(task, before, after, sites, scores)
    proven = error is not None and new - old > BAR * error
    limit = "has no standard error" if error is None else f"has {how} of {error:.4f}, and a proof takes {BAR:g} of them"
    verdict = "which proves rounds better" if proven else "which does not prove rounds better"
    reason = (
        f"{task.score_title} after rounds is {new:.4f}, and {old:.4f} before; the difference, {signed(new - old, 4)}, "
        f"{limit}, {verdict}."
    )
    return proven, Choice("Kept head", names[int(proven)], reason, pooled[0].rows, rivals)


def _error(
    task: Task, before: Mapping[str, Any], after: Mapping[str, Any], sites: list[str], scores: list[Estimate]
) -> tuple[float | None, str]:
    """Return the standard error of the difference and its name; None if it is not known."""
    pairs = [
        (after_score - before_score, before[site].rows)
        for site in sites
        if site != POOL
        and (before_score := task.score_of(before[site])) is not None
        and (after_score := task.score_of(after[site])) is not None
    ]
    if len(pairs) >= LEAST_SITES:
        gains, weights = np.array(pairs, np.float64).T
        spread = np.square(weights * (gains - np.average(gains, weights=weights))).sum()
        error = float(np.sqrt(spread * len(pairs) / (len(pairs) - 1)) / weights.sum())
        return error, "a paired standard error over sites"
    widths = [one.high - one.low for one in scores if one.high is not None and one.low is not None]
    if len(widths) < len(scores):
        return None, ""
    return math.hypot(*widths) / (2 * _Z), "the standard error of two independent scores,"
