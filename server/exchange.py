"""Exchanges: one message to each site and its reply, with their traffic, and the sites that failed or were lost."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from fedhead.protocol.heads import HeadReply
from fedhead.sums.heads import EXAMPLES, METRICS, FloatArray, total_metrics
from fedhead.wording import one_line

logger = logging.getLogger(__name__)


POOL = "all sites"
"""Under secure summation, the name of all sites together where figures are listed by site."""


@dataclass
class Exchange:
    """The outcome of one or several exchanges.

    Attributes:
        replies: usable heads with the message each answers, by site name.
        metrics: `[len(METRICS)]` of each site that answered usably about a head.
        dropped: sites that did not, with the reason.
        late: those of `dropped` that did not answer in time, are gone, or no longer know of the run.
        joined: sites that came late or returned, and took part for the first time since.
        asked: how many sites were asked.
        bytes_down: payload sent.
        bytes_up: payload received.
        summed: under secure summation, the sites whose replies are in one sum, which `metrics` has under one name.
    """

    replies: list[tuple[Message, HeadReply]] = field(default_factory=list)
    metrics: dict[str, FloatArray] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    joined: list[str] = field(default_factory=list)
    asked: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    summed: Sequence[str] = ()

    @property
    def answered(self) -> int:
        """How many sites answered usably about a head."""
        return len(self.summed) or len(self.metrics)

    @property
    def trained(self) -> int:
        """How many sites' training made a head."""
        return len(self.summed) or sum(bool(row[EXAMPLES]) for row in self.metrics.values())

    def drop(self, sites: Iterable[str], reason: str) -> None:
        """Leave the reply of some sites out, and log it; the reason may quote the reply."""
        reason = one_line(reason)
        for site in sites:
            self.dropped[site] = reason
            logger.warning("A reply of %s is dropped: %s.", site, reason.rstrip("."))

    def forgive(self, sites: Iterable[str]) -> None:
        """Forget that some sites were dropped or late."""
        for site in sites:
            self.dropped.pop(site, None)
            self.late.discard(site)

    def add_traffic(self, other: "Exchange") -> None:
        """Count the traffic of `other` as part of this exchange."""
        self.bytes_down += other.bytes_down
        self.bytes_up += other.bytes_up

    def include(self, other: "Exchange") -> None:
        """Count `other` as part of this exchange: its traffic, and the sites that it dropped."""
        self.add_traffic(other)
        self.asked += other.asked
        self.dropped.update(other.dropped)
        self.late |= other.late

    def first_reasons(self) -> str:
        """Return a sentence for each of the first sites that were dropped, with a space before it."""
        return "".join(f" {name}: {reason.rstrip('.')}." for name, reason in sorted(self.dropped.items())[:3])

    def sums(self) -> FloatArray:
        """Return the metrics `[len(METRICS)]` summed over sites, losses of training weighted by their rows."""
        if not self.metrics:
            return np.zeros(len(METRICS))
        return total_metrics(np.array([self.metrics[name] for name in sorted(self.metrics)]))
