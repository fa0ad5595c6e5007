"""Robust pooling: a site whose sums make the head worse at the other sites is left out of the pool.

The sites' kept sums give the head without any one site at the price of a solution (leave-one-site-out influence; Cook,
Technometrics 1977). All sites evaluate it, and the pooled head, on their held-out rows. A site is left out if the
others predict more rows correctly without it, by more than chance. Correct rows are compared instead of losses, because
a site can lie about a loss without bound, and about correct rows only within its share. The means over sites are
trimmed, so that up to a fifth of the sites cannot have another one left out, nor protect one.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedhead.errors import UserError
from fedhead.server.exchange import Exchange
from fedhead.server.site_sums import SiteSums
from fedhead.server.starting_head import UNSOLVED, HeadForm
from fedhead.solvers.closed_form import solve_head
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.heads import HELD_OUT, SCORE, FloatArray
from fedhead.sums.sums import Arrays
from fedhead.tasks import Task

logger = logging.getLogger(__name__)

HARMFUL = "its sums make the head worse"
"""Beginning of the reason why a site is left out."""
LEAST_OTHERS = 3
"""Sites that must compare the heads; fewer cannot outvote a liar."""
LEAST_GAIN = 0.01
"""Share of rows that must be gained; below, leaving a site out is not worth its rows."""
LEAST_ROWS = 5
"""Rows that must be gained: two standard errors, where each was a toss-up between the heads."""
TRIMMED = 0.2
"""Share of the comparing sites that is trimmed at either end, at least one site."""
HEAVIEST = 4.0
"""Most weight of a site, as a multiple of the median site's."""
MOST_CANDIDATES = 30
"""Of more sites, so many whose absence changes the head most are examined."""


@dataclass(frozen=True)
class Gain:
    """What other sites gain from leaving a site out.

    Attributes:
        share: of their held-out rows that only the head without the site predicts correctly, net; a trimmed mean.
        error: its standard error, from the differences between sites.
        rows: the same as `share`, in rows.
        sites: the number of sites that compared.
    """

    share: float
    error: float
    rows: float
    sites: int

    @property
    def significant(self) -> bool:
        """Whether the gain is more than chance, and enough."""
        return self.sites >= LEAST_OTHERS and self.rows >= LEAST_ROWS and self.share > max(LEAST_GAIN, self.error)


def gain(gained: FloatArray, rows: FloatArray) -> Gain:
    """Return the trimmed mean gain over sites, weighted by rows, with its winsorised error (Yuen, Biometrika 1974).

    Args:
        gained: `[m]`, for each comparing site, how many rows more the head without the site predicts correctly.
        rows: `[m]`, its held-out rows, at least 1.
    """
    count = len(rows)
    if count < LEAST_OTHERS:
        return Gain(0.0, math.inf, 0.0, count)
    weights, shares = np.minimum(rows, HEAVIEST * np.median(rows)), gained / rows
    cut = max(1, int(TRIMMED * count))
    core = shares.argsort(kind="stable")[cut : count - cut]
    share = float(np.average(shares[core], weights=weights[core]))
    clipped = np.clip(shares, shares[core[0]], shares[core[-1]])
    spread = weights * (clipped - np.average(clipped, weights=weights))
    error = float(np.sqrt(np.square(spread).sum()) / weights.sum() / (1 - 2 * cut / count))
    return Gain(share, error, share * float(weights[core].sum()), count)


def without(pool: FeatureStatistics, own: FeatureStatistics) -> FeatureStatistics:
    """Return statistics with the class means and the within-class covariance of all sites but one.

    The number of rows of each class stays that of the pool, as the others' rows must not seem to gain from a change
    of priors if a site with other classes goes. A class that no other site has keeps its mean.

    Args:
        pool: the sum of all sites' statistics, where each row has one class.
        own: the statistics of the site.
    """
    rest = pool - own
    counts = pool.counts.double()
    there, known = pool.counts > 0, rest.counts > 0
    means = torch.where(
        known[:, None],
        rest.sums / rest.counts.clamp(min=1)[:, None],
        pool.sums / pool.counts.clamp(min=1)[:, None],
    )
    made = pool.copy()
    made.sums = means * counts[:, None]
    made.total = made.sums.sum(0)
    between = (made.sums[there].T / counts[there]) @ made.sums[there]
    made.upper = rest.within_scatter() * (pool.rows / rest.rows) + between
    return made


def require_robust_pooling(task: Task, form: HeadForm, sums: SiteSums | None) -> None:
    """Check that there will be single sites' sums to compare.

    Raises:
        UserError: if not.
    """
    if not task.kind.exclusive:
        raise UserError(f"pooling 'robust' is for rows of one class each, not for the task {task.name!r}.")
    if form.init in UNSOLVED:
        raise UserError(f"pooling 'robust' needs a head solved from sums, and init {form.init!r} needs none.")
    if sums is None or sums.keep != "folder":
        raise UserError("pooling 'robust' needs a run folder that keeps each site's sums.")


class RobustPooling:
    """Finds sites to leave out, one at a time, as each changes the pool and how features are standardised.

    Args:
        load: returns a site's training statistics.
        solve: returns the head of statistics, as sites train it.
        evaluate: has all sites evaluate a head.

    Attributes:
        exchange: the traffic so far, and the sites that were late.
    """

    def __init__(
        self,
        load: Callable[[str], FeatureStatistics],
        solve: Callable[[FeatureStatistics], Arrays],
        evaluate: Callable[[Arrays], Exchange],
    ) -> None:
        self._load = load
        self._solve = solve
        self._evaluate = evaluate
        self.exchange = Exchange()

    def without_harmful(
        self, pool: FeatureStatistics, sites: Collection[str], leave_out: Callable[[str, str], FeatureStatistics]
    ) -> FeatureStatistics:
        """Leave out harmful sites, fewer than half, and return the sum of the other sites' statistics.

        Args:
            pool: the sum of the sites' statistics.
            sites: their names.
            leave_out: leaves out a site for a reason, and returns the sum of the others'.
        """
        rest = set(sites)
        least = len(rest) // 2 + 1
        while len(rest) > least and (harmful := self.most_harmful(pool, rest)):
            rest.remove(harmful[0])
            pool = leave_out(*harmful)
        return pool

    def most_harmful(self, pool: FeatureStatistics, sites: Collection[str]) -> tuple[str, str] | None:
        """Return the site that most needs to be left out, with the reason; None if none does.

        Args:
            pool: the sum of the sites' statistics.
            sites: their names.
        """
        if len(sites) <= LEAST_OTHERS:
            logger.warning("Robust pooling needs more than %d sites, and the run has %d.", LEAST_OTHERS, len(sites))
            return None
        gains = self._gains(pool, sites)
        worst = max(sorted(gains), key=lambda site: gains[site].share, default=None)
        if worst is None:
            return None
        one = gains[worst]
        return worst, (
            f"{HARMFUL}: without them, the other sites predict {100 * one.share:.1f} % more of "
            f"their held-out rows correctly (standard error {100 * one.error:.1f} %, {one.sites} sites)"
        )

    def _gains(self, pool: FeatureStatistics, sites: Collection[str]) -> dict[str, Gain]:
        """Return the significant gains of leaving out each of the sites."""
        before = self._scores(self._solve(pool), sites)
        found = {}
        for site in self._candidates(pool, sites):
            try:
                head = self._solve(without(pool, self._load(site)))
            except UserError as error:
                logger.info("No head can be solved without %s: %s", site, error)
                continue
            after = self._scores(head, sites)
            others = sorted((before.keys() & after.keys()) - {site})
            rows = np.array([before[name][0] for name in others])
            gained = np.array([after[name][1] - before[name][1] for name in others])
            one = gain(gained, rows)
            if one.significant:
                found[site] = one
        return found

    def _candidates(self, pool: FeatureStatistics, sites: Collection[str]) -> list[str]:
        """Return the sites whose absence changes the head most, of many sites only some."""
        names = sorted(sites)
        if len(names) <= MOST_CANDIDATES:
            return names
        weight, _ = solve_head(pool).affine()
        scale = pool.scale()
        change = {}
        for name in names:
            try:
                other, _ = solve_head(without(pool, self._load(name))).affine()
            except UserError:
                continue
            change[name] = float(((other - weight) * scale).norm())
        return sorted(change, key=lambda name: -change[name])[:MOST_CANDIDATES]

    def _scores(self, head: Arrays, sites: Collection[str]) -> Mapping[str, tuple[float, float]]:
        """Return the held-out rows of each site that has any, and how many of them a head predicts correctly."""
        exchange = self._evaluate(head)
        self.exchange.add_traffic(exchange)
        self.exchange.late |= exchange.late
        self.exchange.dropped.update({site: exchange.dropped[site] for site in exchange.late})
        return {
            site: (float(row[HELD_OUT]), float(row[SCORE]))
            for site, row in exchange.metrics.items()
            if row[HELD_OUT] and site in sites
        }
