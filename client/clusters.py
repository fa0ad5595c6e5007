"""Clusters of a site's rows: sums by cluster in which no cluster has fewer rows than the guard's minimum."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from fedhead.client.agreement import Agreement, agreement
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.site_data import Holding, Site
from fedhead.data import IntArray
from fedhead.protocol.clusters import ClusterRequest
from fedhead.protocol.messages import SITE_COUNTS, MessageError, Payload
from fedhead.solvers.clusters import assign
from fedhead.sums.clusters import ClusterSums, LikelihoodSums
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Arrays, Sums

BLOCK_ROWS = 2048


def clusters(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum rows by cluster, likelihoods of held-out rows, or features with clusters as classes.

    Raises:
        MessageError: if the run is not one of clusters.
    """
    agreed = agreement(context)
    if agreed.manifest.task != "clusters":
        raise MessageError("it asks for clusters, but its run is about labelled rows")
    request = ClusterRequest.from_payload(payload, len(agreed.origin))
    if request.map != agreed.map_digest:
        raise MessageError("it asks for clusters of features under another map than the site was sent")
    for positions in shared(sites, merged):
        holdings = [sites[position].open(agreed.manifest) for position in positions]
        sums, beside = sum_clusters(holdings, agreed, request)
        answered = of_several(sums.to_arrays(), len(positions), beside)
        yield Answer(positions, answered, agreed.manifest, (request.rows,))


def sum_clusters(holdings: Sequence[Holding], agreed: Agreement, request: ClusterRequest) -> tuple[Sums, Arrays]:
    """Return the sums of a request over the rows of some sites; for statistics of several, each site's rows by cluster.

    Each site's small clusters give their rows to the next nearest ones, so that no sum is over few rows.
    """
    if request.stage == "likelihood":
        assert request.mixtures is not None
        total = LikelihoodSums.empty(len(request.clusterings.sizes))
        for holding in holdings:
            for block in _Rows(holding, agreed, request).blocks():
                total = total + request.mixtures.likelihoods(request.directions.of(block))
        return total, {}
    if request.stage == "sums":
        added = ClusterSums.empty(request.clusterings.sizes, request.directions.width)
        for holding in holdings:
            added = added + _Rows(holding, agreed, request).sums()
        return added, {}
    (size,) = request.clusterings.sizes
    stats = FeatureStatistics.empty(len(agreed.origin), size, agreed.origin)
    counts = np.zeros((len(holdings), size), np.int64)
    for number, holding in enumerate(holdings):
        counts[number] = _Rows(holding, agreed, request).add_to(stats)
    return stats, {SITE_COUNTS: counts} if len(holdings) > 1 else {}


@dataclass(frozen=True)
class _Rows:
    """The rows of one site that a request is about.

    Attributes:
        holding: the site's rows.
        agreed: the run.
        request: the request.
    """

    holding: Holding
    agreed: Agreement
    request: ClusterRequest

    @property
    def rows(self) -> IntArray:
        if self.request.rows == "train":
            return self.holding.train.rows
        return (self.holding.summable if self.request.stage == "statistics" else self.holding.held_out).rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield features as they are summed, `[k, D]`."""
        data = replace(self.holding.data, mapping=self.agreed.mapping)
        project: Callable[[Tensor], Tensor] | None = projection_for(self.agreed.num_features, self.agreed.manifest.seed)
        for block in data.blocks_of(self.rows, BLOCK_ROWS):
            yield block if project is None else project(block)

    def assigned(self, banned: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield features `[k, D]`, directions `[k, r]` and clusters `[k, Q]`, without the banned clusters `[M]`."""
        centres = torch.from_numpy(self.request.clusterings.centres)
        for block in self.blocks():
            directions = self.request.directions.of(block)
            yield block, directions, assign(directions @ centres.T, self.request.clusterings.sizes, banned)

    def sums(self) -> ClusterSums:
        """Return rows and sums by cluster."""
        sizes = self.request.clusterings.sizes
        banned = self.banned()
        counts = torch.zeros(sum(sizes), dtype=torch.int64)
        sums = torch.zeros(sum(sizes), self.request.directions.width, dtype=torch.float64)
        for _, directions, found in self.assigned(banned):
            counts += found.flatten().bincount(minlength=len(counts))
            sums.index_add_(0, found.flatten(), directions.repeat_interleave(len(sizes), dim=0))
        return ClusterSums(sizes, counts.numpy(), sums.numpy())

    def add_to(self, stats: FeatureStatistics) -> IntArray:
        """Add the features to statistics with clusters as classes, in place; return the rows `[K]` by cluster."""
        before = stats.counts.clone()
        for block, _, found in self.assigned(self.banned()):
            stats.update(block, found[:, 0])
        added: IntArray = (stats.counts - before).numpy()
        return added

    def banned(self) -> Tensor:
        """Return which clusters `[M]` take no rows here: in each clustering the smallest, until none is too small."""
        sizes, least = self.request.clusterings.sizes, self.holding.min_class_count
        banned = torch.zeros(sum(sizes), dtype=torch.bool)
        while least > 1:
            counts = self._behind(banned)
            start, small = 0, False
            for part in torch.split(counts, list(sizes)):
                few = part.where((part > 0) & (part < least), least)
                if int(few.min()) < least:
                    banned[start + int(few.argmin())] = small = True
                start += len(part)
            if not small:
                break
        return banned

    def _behind(self, banned: Tensor) -> Tensor:
        """Return `[M]`, the number of rows of each cluster or, where rows have groups such as patients, of these."""
        counts = torch.zeros(len(banned), dtype=torch.int64)
        if self.holding.people is None:
            for _, _, found in self.assigned(banned):
                counts += found.flatten().bincount(minlength=len(counts))
            return counts
        people = torch.from_numpy(self.holding.people[self.rows])
        pairs, start = torch.empty(0, dtype=torch.int64), 0
        for _, _, found in self.assigned(banned):
            own = people[start : start + len(found)]
            start += len(found)
            pairs = torch.unique(torch.cat([pairs, (own[:, None] * len(banned) + found).flatten()]))
        return counts + (pairs % len(banned)).bincount(minlength=len(counts))
