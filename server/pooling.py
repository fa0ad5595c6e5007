"""The sums of the sites' features, pooled."""

from collections.abc import Callable, Collection
from typing import Literal, TypeVar

import numpy as np
import torch
from flwr.app import RecordDict

from fedhead.heads import FeatureMap
from fedhead.protocol.actions import MAP, STANDARDISE, STATISTICS
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import SITE_COUNTS, Manifest, Payload, StatisticsRequest
from fedhead.server.collect import Collected, Each, Question, collect
from fedhead.server.exchange import Exchange
from fedhead.server.messenger import Messenger
from fedhead.server.roster import Roster
from fedhead.server.site_sums import SiteSums
from fedhead.server.timeout import Timeout
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.packing import widened
from fedhead.sums.projection import origin_of
from fedhead.sums.sums import Arrays, Sums
from fedhead.tasks import Task

S = TypeVar("S", bound=Sums)


class Pooling:
    """Asks the sites for sums of their features, and adds them.

    Args:
        messenger: reaches the sites.
        manifest: of the run.
        roster: the sites that take part.
        probe: the features `[PROBES, d]` of the probe; sums are about their mean.
        sums: where each site's statistics are kept, if anywhere.
        task: of the run.
        wire: the number type of sums of features in the sites' replies.

    Attributes:
        counts: each site's training rows by class, `[C]`, once statistics were summed; `[0]` under secure summation,
            where they are unknown.
        mapping: of the features, as the sites were told.
        map_digest: of the request for the map; empty for plain features.
        wait: waits for enough sites after a secure sum that too few finished, and returns the traffic of those that
            came; None if nobody waits.
    """

    def __init__(
        self,
        messenger: Messenger,
        manifest: Manifest,
        roster: Roster,
        probe: torch.Tensor,
        sums: SiteSums | None,
        task: Task,
        wire: Literal["float64", "float32"] = "float64",
    ) -> None:
        self.counts: dict[str, torch.Tensor] = {}
        self.mapping: FeatureMap | None = None
        self.wait: Callable[[Exchange, Timeout], Exchange] | None = None
        self.map_digest = ""
        self._messenger = messenger
        self._manifest = manifest
        self._roster = roster
        self._probe = probe
        self._kept = sums
        self._task = task
        self._wire = wire

    def statistics(
        self, request: StatisticsRequest, *, into: SiteSums | Literal["folder"] | None = "folder"
    ) -> Collected[FeatureStatistics]:
        """Return the sum of the sites' statistics, and keep each site's own: in the run's folder, or `into` another.

        Raises:
            FedheadError: if no site's statistics could be used.
        """
        origin = self.origin()
        kept = self._kept if into == "folder" else into
        question = Question(
            STATISTICS,
            self._named(request.model_copy(update={"wire": self._wire})).payload().to_content(),
            self._task.statistics(len(origin), origin),
            together=kept is None,
            beside=(SITE_COUNTS,),
            widen=widened if self._wire == "float32" else None,
        )

        def note(sites: tuple[str, ...], stats: FeatureStatistics, beside: Arrays) -> None:
            if self._messenger.summation is not None:
                return
            counts = self._site_counts(sites, stats, beside)
            if kept is not None:
                (site,) = sites
                kept.save(site, request.rows, stats)
            if request.rows == "train":
                self.counts.update(zip(sites, counts, strict=True))

        # Of a site that came late no training rows were summed, and so no others are.
        collected = self.summed(question, note, known=request.rows == "held_out")
        if self._messenger.summation is not None and request.rows == "train":
            self.counts.update({site: torch.zeros(0, dtype=torch.int64) for site in collected.sites})
        return collected

    def forget(self) -> None:
        """Forget the statistics that were summed, before those of other sites are summed."""
        self.counts.clear()
        if self._kept is not None:
            self._kept.clear()

    def remove(self, sites: Collection[str]) -> None:
        """Forget the statistics of some sites."""
        for site in sites:
            self.counts.pop(site, None)
        if self._kept is not None:
            self._kept.remove(sites)

    def moments(self) -> Collected[FeatureMoments]:
        """Return the sum of the sites' moments.

        Raises:
            FedheadError: if no site's moments could be used.
        """
        plain = self._probe.mean(0) if self.mapping is None else self.origin()
        nothing = FeatureMoments.empty(self._task.origin_to_standardise(plain))
        content = self._named(StatisticsRequest(what="moments")).payload().to_content()
        return self.summed(Question(STATISTICS, content, nothing))

    def summed(self, question: Question[S], each: Each[S] | None = None, *, known: bool = False) -> Collected[S]:
        """Ask all sites for sums, or those whose statistics are `known`; a secure sum until enough sites finish it.

        Raises:
            FedheadError: if no reply could be used, or too few sites finished until the deadline had passed.
        """
        timeout, spent = Timeout(self._messenger.deadline), Exchange()
        while True:
            nodes = {name: node for name, node in self._roster.nodes.items() if not known or name in self.counts}
            collected = collect(self._messenger, nodes, question, self._roster.rows, each)
            collected.exchange.add_traffic(spent)
            if collected.replies or self._messenger.summation is None or self.wait is None:
                collected.require_one()
                return collected
            spent = Exchange()
            spent.add_traffic(collected.exchange)
            spent.add_traffic(self.wait(collected.exchange, timeout))

    def map(self, request: MapRequest) -> Exchange:
        """Have the sites map their features before all sums and heads from now on."""
        self.map_digest = request.digest
        self.mapping = request.build(self._manifest.num_features, self._manifest.seed)
        return self._messenger.ask(
            self._roster.nodes, MAP, request.payload().to_content(), lambda reply: None, together=False
        )

    def _named(self, request: StatisticsRequest) -> StatisticsRequest:
        """Return the request with the digest of the map of features."""
        return request.model_copy(update={"map": self.map_digest})

    def origin(self) -> torch.Tensor:
        """Return the origin `[D]` of all sums."""
        return origin_of(self._probe, self._manifest.seed, self.mapping)

    def announce(self, standardisation: RecordDict) -> Exchange:
        """Send the sites the mean and scale that heads are trained under."""
        return self._messenger.ask(self._roster.nodes, STANDARDISE, standardisation, lambda reply: None)

    def _site_counts(self, sites: tuple[str, ...], stats: FeatureStatistics, beside: Arrays) -> list[torch.Tensor]:
        """Return the rows of each site by class.

        Raises:
            ValueError: if a merged reply has them in another form.
        """
        counts = beside.get(SITE_COUNTS)
        if counts is None and len(sites) == 1:
            return [self._task.counts_of(stats)]
        shape = (len(sites), len(self._task.counted))
        if counts is None or counts.shape != shape or counts.dtype != np.int64:
            raise ValueError("it counts rows for other sites than its own")
        return list(torch.from_numpy(np.array(counts)))


def standardise_content(
    standardisation: tuple[torch.Tensor, torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor] | None = None,
    shares: torch.Tensor | None = None,
) -> RecordDict:
    """Return the message with the mean and scale that heads are trained under.

    Args:
        standardisation: of the features, `[d]` each.
        targets: of real targets, `[C]` each.
        shares: `[C]`, of each class in all rows, for sites that adjust logits by them.
    """
    arrays = dict(zip(("mean", "scale"), standardisation, strict=True))
    if targets is not None:
        arrays |= zip(("target_mean", "target_scale"), targets, strict=True)
    if shares is not None:
        arrays["shares"] = shares
    return Payload({}, {name: value.float().numpy() for name, value in arrays.items()}).to_content()
