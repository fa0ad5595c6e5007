"""What many simulated sites answer with one reply, in a few array operations instead of a message each.

Every function does for all `sites` what `fedhead.client.app` does for one; sites share one `LabelledFeatures`.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from fedhead.client.app import (
    Kept,
    calibrate_sites,
    describe_site,
    description_of,
    empty_head,
    evaluate_sites,
    keep_standardisation,
    kept,
    ready,
)
from fedhead.client.averaging import average_heads
from fedhead.client.site_data import Site
from fedhead.data import BoolArray, IntArray
from fedhead.messages import (
    METRICS,
    RECORD,
    SITE_COUNTS,
    Arrays,
    CalibrateRequest,
    Description,
    FloatArray,
    HeadReply,
    HeadRequest,
    Payload,
    StatisticsRequest,
    WeightsChunk,
    payload_bytes,
)
from fedhead.moments import FeatureMoments
from fedhead.statistics import FeatureStatistics, origin_of, projection_for

BLOCK_ROWS = 2048
"""Rows whose features are summed at a time: few enough to stay in a processor's cache."""


def describe_together(sites: Sequence[Site], content: RecordDict, context: Context) -> RecordDict:
    """Keep the manifest that arrived, and answer for each site whether it can take part under it."""
    first = Description.from_content(describe_site(sites[0], content, context))
    if RECORD not in context.state:
        # It understood nothing of it, and the others are of the same version.
        return _described([first.model_copy(update={"site": site.name}) for site in sites])
    agreed = kept(context)
    return _described([first, *(description_of(site, agreed) for site in sites[1:])])


def install_together(sites: Sequence[Site], content: RecordDict, context: Context) -> RecordDict:
    """Have every site keep the weights, which go in one chunk, and answer as to a description."""
    agreed = kept(context)
    chunk = WeightsChunk.from_content(content)
    for site in sites:
        site.install(agreed.manifest, chunk)
    return _described([description_of(site, agreed) for site in sites])


def standardise_together(sites: Sequence[Site], content: RecordDict, context: Context) -> RecordDict:
    """Keep the mean and scale that heads are trained under."""
    keep_standardisation(Payload.from_content(content), context)
    return Payload().to_content()


def sum_together(sites: Sequence[Site], content: RecordDict, context: Context) -> RecordDict:
    """Return the sums over all sites' rows, with every site's rows by class."""
    agreed = kept(context)
    request = StatisticsRequest(**Payload.from_content(content).values)
    holdings = [site.open(agreed.manifest) for site in sites]
    summed = [(one.train if request.rows == "train" else one.summable).rows for one in holdings]
    together = np.concatenate([np.empty(0, dtype=np.int64), *summed])
    features, labels = holdings[0].data.features, holdings[0].data.labels
    if request.what == "moments":
        moments = FeatureMoments.empty(agreed.probe.mean(0))
        for rows in doublings(together):
            moments += moments
            for block in torch.split(rows, BLOCK_ROWS):
                moments = moments.updated(features[block].cpu())
        tensors, counts = moments.to_tensors(), {}
    else:
        project = projection_for(agreed.manifest.num_features, agreed.manifest.seed)
        origin = origin_of(agreed.probe, agreed.manifest.seed)
        classes = len(agreed.manifest.classes)
        stats = FeatureStatistics.empty(len(origin), classes, origin, multi_label=agreed.manifest.multi_label)
        for rows in doublings(together):
            stats += stats
            for block in torch.split(rows, BLOCK_ROWS):
                chosen = features[block].cpu()
                stats.update(chosen if project is None else project(chosen), labels[block].cpu())
        tensors = stats.to_tensors()
        counts = {SITE_COUNTS: _counts(summed, labels.cpu().numpy(), classes)}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    single = payload_bytes(Payload({}, arrays).to_content())
    return Payload({"num_bytes": single * len(sites)}, {**arrays, **counts}).to_content()


def calibrate_together(sites: Sequence[Site], content: RecordDict, context: Context) -> RecordDict:
    """Return what chooses or judges a temperature, summed over all sites' held-out rows."""
    agreed = kept(context)
    request = CalibrateRequest.from_content(content, empty_head(agreed.manifest))
    arrays = calibrate_sites(sites, agreed, request).to_arrays()
    single = payload_bytes(Payload({}, arrays).to_content())
    return Payload({"num_bytes": single * len(sites)}, arrays).to_content()


def train_together(sites: Sequence[Site], agreed: Kept, request: HeadRequest) -> HeadReply:
    """Train the head at all sites, screen each as the coordinator would, and return the mean of those that pass."""
    manifest = agreed.manifest
    holdings, data, head, incoming = ready(sites, agreed, request)
    local = manifest.local
    if request.proximal_mu is not None:
        local = local.model_copy(update={"proximal_mu": request.proximal_mu})
    averaged, evaluation = average_heads(
        head,
        incoming,
        data,
        [holding.train for holding in holdings],
        local,
        [holding.held_out for holding in holdings],
        seed=manifest.seed,
        round_number=request.server_round,
        repeated=request.everyone,
    )
    metrics = np.stack(
        [averaged.rows, averaged.losses, evaluation.rows, evaluation.losses, evaluation.correct], axis=1
    ).astype(np.float64)
    arrays = {name: value.cpu().numpy() for name, value in averaged.parameters.items()}
    return _merged(sites, metrics, averaged.usable, arrays)


def evaluate_together(sites: Sequence[Site], agreed: Kept, request: HeadRequest) -> HeadReply:
    """Evaluate the head on the held-out rows of all sites."""
    metrics = evaluate_sites(sites, agreed, request)
    finite: BoolArray = np.isfinite(metrics.sum(1))
    return _merged(sites, metrics, finite, {})


def _merged(sites: Sequence[Site], metrics: FloatArray, usable: BoolArray, arrays: Arrays) -> HeadReply:
    assert metrics.shape[1] == len(METRICS)
    reason = "its head or its metrics hold values that are not finite"
    return HeadReply(
        metrics[usable],
        arrays,
        tuple(site.name for site, use in zip(sites, usable.tolist(), strict=True) if use),
        {site.name: reason for site, use in zip(sites, usable.tolist(), strict=True) if not use},
        len(sites) * HeadReply(np.zeros((1, len(METRICS))), arrays).single_bytes(),
    )


def _described(descriptions: Sequence[Description]) -> RecordDict:
    values = [one.model_dump() for one in descriptions]
    # Twice, as in the header of a payload, which is as long as this makes it.
    lengths = np.array([len(json.dumps(json.dumps(one))) for one in values])
    _, firsts, times = np.unique(lengths, return_index=True, return_counts=True)
    num_bytes = sum(
        payload_bytes(Payload(values[first]).to_content()) * count
        for first, count in zip(firsts.tolist(), times.tolist(), strict=True)
    )
    return Payload({"sites": values, "num_bytes": num_bytes}).to_content()


def doublings(rows: IntArray) -> Iterator[Tensor]:
    """Yield, in the order that they lie in, the rows to add after what there is was doubled.

    That sums rows that many sites share as often as they are held, at the price of a few times: the binary digits of
    how often are summed one after the other (Horner).
    """
    distinct, times = np.unique(rows, return_counts=True)
    for digit in reversed(range(int(times.max(initial=0)).bit_length())):
        yield torch.from_numpy(distinct[(times >> digit & 1).astype(np.bool_)])


def _counts(rows: Sequence[IntArray], labels: IntArray, classes: int) -> IntArray:
    """Return `[S, C]`, how many of each site's rows are of each class."""
    owners = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    own = labels[np.concatenate([np.empty(0, dtype=np.int64), *rows])]
    if labels.ndim == 1:
        counts = np.bincount(owners * classes + own, minlength=len(rows) * classes)
        return counts.reshape(len(rows), classes).astype(np.int64)
    counts = np.zeros((len(rows), classes), dtype=np.int64)
    np.add.at(counts, owners, own)
    return counts
