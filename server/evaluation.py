"""Detailed evaluation of a head: each site's counts on its held-out rows, and calibration."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedhead.protocol.actions import CALIBRATE, REPORT
from fedhead.protocol.heads import CalibrateRequest, HeadRequest, ReportRequest
from fedhead.server.collect import Each, Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.sums import Arrays
from fedhead.tasks import Calibrated, Task

MOST_SITES = 1000
"""Of more sites, so many drawn at random evaluate a head in detail and calibrate it."""


def some_sites(nodes: Mapping[str, int], seed: int) -> dict[str, int]:
    """Return the sites that evaluate in detail, by name: all of them, or `MOST_SITES` drawn at random."""
    if len(nodes) <= MOST_SITES:
        return dict(nodes)
    return {name: nodes[name] for name in sorted(random.Random(seed).sample(sorted(nodes), MOST_SITES))}


@dataclass
class DetailedEvaluation:
    """Asks sites about one head on their held-out rows.

    Args:
        messenger: reaches the sites.
        nodes: the sites to ask.
        rows: the number of rows of each.
        task: of the run.
        request: the head, as the sites train it.
        bins: where outputs and residuals are counted.

    Attributes:
        exchange: the traffic so far, and the sites that were dropped or late.
    """

    messenger: Messenger
    nodes: Mapping[str, int]
    rows: Mapping[str, int]
    task: Task
    request: HeadRequest
    bins: ScoreBins
    exchange: Exchange = field(default_factory=Exchange, init=False)

    def by_site(self) -> dict[str, Any]:
        """Return the evaluation sums of each site with held-out rows, by name."""
        found: dict[str, Any] = {}

        def note(sites: tuple[str, ...], sums: Any, beside: Arrays) -> None:
            if sums.rows:
                found.update(dict.fromkeys(sites, sums))

        content = ReportRequest(self.request, self.bins).to_content()
        self._collect(Question(REPORT, content, self.task.no_rows(self.bins), together=False), note)
        return dict(sorted(found.items()))

    def calibrate(self) -> Calibrated | None:
        """Calibrate the head on one half of the held-out rows, and judge it on the other; two exchanges.

        Returns:
            None if one of the halves has no row, or models of the task are not calibrated.
        """
        if not self.task.calibrates:
            return None
        chosen = self.choose()
        temperature = self.task.temperature(chosen)
        judged = self._summed(self.task.judging(None, None, temperature, self.bins), temperature)
        return self.task.calibrated(chosen, judged) if chosen.rows and judged.rows else None

    def choose(self) -> Any:
        """Return the sums over one half of the held-out rows that choose the head's calibration; one exchange."""
        return self._summed(self.task.choosing(None, None, self.bins), 0.0)

    def _summed(self, nothing: Any, temperature: float) -> Any:
        request = CalibrateRequest(self.request, temperature, None if self.task.scales_outputs else self.bins)
        return self._collect(Question(CALIBRATE, request.to_content(), nothing))

    def _collect(self, question: Question[Any], each: Each[Any] | None = None) -> Any:
        collected = collect(self.messenger, self.nodes, question, self.rows, each)
        self.exchange.include(collected.exchange)
        return collected.total
