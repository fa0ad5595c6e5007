"""Which head is kept: the one with the least pooled held-out loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedhead.messages import METRICS, Arrays, FloatArray
from fedhead.server.exchange import Exchange

HELD_OUT, LOSS_SUM = METRICS.index("held_out"), METRICS.index("loss_sum")


@dataclass(frozen=True)
class Candidate:
    """A head that may turn out to be the best.

    Attributes:
        number: the round that it comes from.
        arrays: the head.
        losses: float64, the summed held-out loss at each site that evaluated every head so far, in the order of names.
    """

    number: int
    arrays: Arrays
    losses: FloatArray


class Contest:
    """Compares heads over the sites that evaluated every one of them.

    Sites are lost as a run goes on, so which head wins is known at its end only. A head that another one beats or
    equals at every site never wins, and is not kept.

    Args:
        sites: those that evaluated every head so far, in order; None before the first.
        candidates: the heads that are left, from the first round to the last.
    """

    def __init__(self, sites: Sequence[str] | None = None, candidates: Sequence[Candidate] = ()) -> None:
        self.sites = sites
        self.candidates = list(candidates)

    def enter(self, number: int, arrays: Arrays, evaluation: Exchange) -> None:
        """Take in a head, and what sites said of it."""
        known = evaluation.metrics.keys()
        if self.sites is None:
            self.sites = sorted(known)
        elif not known >= set(self.sites):
            left = [row for row, site in enumerate(self.sites) if site in known]
            self.sites = [self.sites[row] for row in left]
            self.candidates = [Candidate(one.number, one.arrays, one.losses[left]) for one in self.candidates]
        losses = np.array([evaluation.metrics[site][LOSS_SUM] for site in self.sites])
        before = np.array([one.losses for one in self.candidates]).reshape(len(self.candidates), len(losses))
        if np.all(before <= losses, axis=1).any():
            return
        left = np.flatnonzero(~np.all(losses <= before, axis=1)).tolist()
        self.candidates = [self.candidates[row] for row in left]
        self.candidates.append(Candidate(number, arrays, losses))

    def winner(self, evaluation: Exchange) -> Candidate | None:
        """Return the best head, or None where heads cannot be told apart fairly; the newest is kept then.

        That is where the sites that evaluated every head hold less than half of the held-out rows, as when few sites
        are sampled each round.

        Args:
            evaluation: what sites said of the newest head.
        """
        rows = sum(evaluation.metrics[name][HELD_OUT] for name in self.sites or ())
        if rows == 0 or rows < evaluation.sums()[HELD_OUT] / 2:
            return None
        return min(self.candidates, key=lambda one: float(sum(one.losses)))
