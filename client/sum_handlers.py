"""Handlers that sum over the features of rows: statistics, moments, and distances."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from fedhead.client.agreement import Agreement, agreement
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.distances import DistancesRequest, add_unit_rows, count_distances
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.site_data import OpenSite, Site
from fedhead.client.tails import tuned_rows
from fedhead.data import IntArray
from fedhead.errors import FedheadError
from fedhead.protocol.messages import (
    SITE_COUNTS,
    Manifest,
    MessageError,
    Payload,
    StatisticsRequest,
)
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.packing import narrowed
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Arrays, Sums

BLOCK_ROWS = 2048
"""Rows whose features are summed at a time: few enough to stay in a processor's cache."""

MOMENT_ROWS = 256
"""The same for moments, which are few operations on each value in float64."""


def statistics(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum over the sites' rows, block by block in float64 about the probe's mean."""
    agreed = agreement(context)
    request = StatisticsRequest(**payload.values)
    if request.map and request.map != agreed.map_digest:
        raise MessageError("it asks for sums of features under another map than the site was sent")

    def seen(data: LabelledFeatures) -> LabelledFeatures:
        if not payload.arrays:
            return data
        if not agreed.manifest.tune or request.what != "gram":
            raise MessageError("it asks for sums of the features of a tail, which the run does not tune")
        rows = tuned_rows(data, agreed, sites[0].tuning(agreed.manifest), payload.arrays)
        sites[0].check_tail(agreed.manifest, rows.exact)
        return rows

    for positions in shared(sites, merged):
        sums = sum_rows([sites[position] for position in positions], agreed, request, seen)
        if request.wire == "float32" and len(positions) == 1:
            sums = _as_float32(sums, agreed.manifest)
        yield Answer(positions, sums, agreed.manifest, (request.rows,))


def _as_float32(sums: Payload, manifest: Manifest) -> Payload:
    if manifest.secure_sum or manifest.privacy:
        raise MessageError("it asks for float32 sums, which can be neither masked nor noisy")
    try:
        return Payload(sums.values, narrowed(sums.arrays))
    except ValueError as error:
        raise FedheadError(f"Its sums cannot be sent as float32: {error}; set wire = 'float64' in the run.") from None


def sum_rows(
    sites: Sequence[OpenSite],
    agreed: Agreement,
    request: StatisticsRequest,
    seen: Callable[[LabelledFeatures], LabelledFeatures] = lambda data: data,
) -> Payload:
    """Return the sums over all rows of `sites`; of several sites, with each one's rows by class beside them.

    Args:
        sites: they share one `LabelledFeatures`.
        agreed: what is known of the run.
        request: for sums.
        seen: returns the data whose features are summed, given that of the sites.
    """
    holdings = [site.open(agreed.manifest) for site in sites]
    summed = [(one.train if request.rows == "train" else one.summable).rows for one in holdings]
    together = np.concatenate([np.empty(0, dtype=np.int64), *summed])
    data = seen(replace(holdings[0].data, mapping=agreed.mapping))
    targets = data.labels
    counts: Arrays = {}
    total: FeatureMoments | FeatureStatistics
    if request.what == "moments":
        total = _moments(data, agreed, together)
    elif data.places is not None:
        total = agreed.task.statistics(len(agreed.origin), agreed.origin)
        for rows in doublings(together):
            total += total
            data.places.add(total, data.features, rows.numpy())
    else:
        project = projection_for(agreed.num_features, agreed.manifest.seed)
        total = agreed.task.statistics(len(agreed.origin), agreed.origin)
        for rows in doublings(together):
            total += total
            for block in torch.split(rows, BLOCK_ROWS):
                chosen = data.exact(block)
                total.update(chosen if project is None else project(chosen), targets[block].cpu())
    if request.what == "gram" and len(sites) > 1:
        owners = np.repeat(np.arange(len(summed)), [len(own) for own in summed])
        counts = {SITE_COUNTS: agreed.task.count_rows(targets.cpu().numpy()[together], owners, len(summed))}
    return of_several(total.to_arrays(), len(sites), counts)


def _moments(data: LabelledFeatures, agreed: Agreement, rows: IntArray) -> FeatureMoments:
    plain = agreed.probe.mean(0) if agreed.mapping is None else agreed.origin
    total = FeatureMoments.empty(agreed.task.origin_to_standardise(plain))
    for distinct in doublings(rows):
        total += total
        if data.places is not None:
            for places in data.places.each(data.features, distinct.numpy()):
                total = total.with_item(places)
            continue
        for block in torch.split(distinct, MOMENT_ROWS):
            total = total.updated(agreed.task.to_standardise(data.exact(block), data.labels[block].cpu()))
    return total


def doublings(rows: IntArray) -> Iterator[Tensor]:
    """Yield, in ascending order, the rows to add after the sum so far was doubled.

    Sums rows that many sites share as often as they are held, at the price of a few times: the binary digits of the
    multiplicities are summed one after the other (Horner's method).
    """
    distinct, times = np.unique(rows, return_counts=True)
    for digit in reversed(range(int(times.max(initial=0)).bit_length())):
        yield torch.from_numpy(distinct[(times >> digit & 1).astype(np.bool_)])


def distances(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum over training rows of unit length, or count held-out rows by their distance from those of all sites."""
    agreed = agreement(context)
    manifest = agreed.manifest
    request = DistancesRequest.from_payload(payload, manifest.num_features, len(manifest.classes))
    for positions in shared(sites, merged):
        holdings = [sites[position].open(manifest) for position in positions]
        data, part = holdings[0].data, request.part
        rows = np.concatenate(
            [holding.train.rows if part == "train" else holding.held_out.rows for holding in holdings]
        )
        sums: Sums
        if request.distances is None:
            stats = agreed.task.statistics(manifest.num_features)
            for chosen in doublings(rows):
                stats += stats
                add_unit_rows(stats, data, chosen, request.form)
            sums = stats
        else:
            sums = count_distances(request.distances, data, torch.from_numpy(rows))
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), manifest, (part,))
