"""The best checkpoint: the head with the least pooled held-out loss, at the temperature that fits it if known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedhead.server.exchange import Exchange
from fedhead.sums.heads import HELD_OUT, LOSS_SUM, METRICS, SCORE, FloatArray
from fedhead.sums.sums import Arrays
from fedhead.tasks.task import SelectsBy


@dataclass(frozen=True)
class Candidate:
    """A head that may still be the best.

    Attributes:
        number: its round.
        arrays: the head.
        losses: `[S]` float64, the summed held-out loss at each site that evaluated every head so far, in the order of
            names; of tuned heads `[S, K]`, at the temperatures `CURVE`.
    """

    number: int
    arrays: Arrays
    losses: FloatArray


class BestCheckpoint:
    """Compares heads over the sites that evaluated every one of them.

    Sites may be lost until a run ends, so the best head is known only then. A head that another one beats or equals at
    every site can never be the best, and is dropped.

    Args:
        sites: those that evaluated every head so far, in order; None before the first.
        candidates: the heads that may still be the best, from the first round to the last.
    """

    def __init__(self, sites: Sequence[str] | None = None, candidates: Sequence[Candidate] = ()) -> None:
        self.sites = sites
        self.candidates = list(candidates)

    def add(self, number: int, arrays: Arrays, evaluation: Exchange, *, by: SelectsBy = "loss") -> None:
        """Add a head with its evaluation by the sites.

        Args:
            number: its round.
            arrays: the head.
            evaluation: of the head.
            by: the figure that heads are compared by.
        """
        known = evaluation.metrics.keys()
        if self.sites is None:
            self.sites = sorted(known)
        elif not known >= set(self.sites):
            left = [row for row, site in enumerate(self.sites) if site in known]
            self.sites = [self.sites[row] for row in left]
            self.candidates = [Candidate(one.number, one.arrays, one.losses[left]) for one in self.candidates]
        losses = np.array([_losses(evaluation.metrics[site], by) for site in self.sites])
        before = np.array([one.losses for one in self.candidates]).reshape(len(self.candidates), losses.size)
        if np.all(before <= losses.ravel(), axis=1).any():
            return
        left = np.flatnonzero(~np.all(losses.ravel() <= before, axis=1)).tolist()
        self.candidates = [self.candidates[row] for row in left]
        self.candidates.append(Candidate(number, arrays, losses))

    def choose(self, evaluation: Exchange) -> Candidate | None:
        """Return the best head; None if heads cannot be compared fairly, so that the newest is kept.

        The comparison is unfair if the sites that evaluated every head hold less than half of the held-out rows, for
        example because few sites are sampled each round.

        Args:
            evaluation: the sites' evaluation of the newest head.
        """
        rows = sum(evaluation.metrics[name][HELD_OUT] for name in self.sites or ())
        if rows == 0 or rows < evaluation.sums()[HELD_OUT] / 2:
            return None
        return min(self.candidates, key=lambda one: float(np.min(one.losses.sum(axis=0))))


def _losses(metrics: FloatArray, by: SelectsBy) -> FloatArray:
    """Return a site's summed held-out loss, or its losses at the temperatures `CURVE` if it sent them."""
    if by == "score":
        lacking: FloatArray = metrics[HELD_OUT] - metrics[SCORE]
        return lacking
    if by == "token_loss":
        # A site weighs by its rows, which are bounded, and not by the tokens that it claims.
        of_rows: FloatArray = metrics[HELD_OUT] * metrics[LOSS_SUM] / max(metrics[SCORE], 1.0)
        return of_rows
    curve = metrics[len(METRICS) :]
    return curve if len(curve) else metrics[LOSS_SUM]
