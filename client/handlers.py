"""The handlers of all actions, for any number of sites at a time.

A real site is a list of one. Simulated sites share one `LabelledFeatures` and are answered together: by one reply that
is their sum where the coordinator wants no more, else by a reply each.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Context
from pydantic import ValidationError
from torch import Tensor

from fedhead.client.adaptation import adapt
from fedhead.client.agreement import (
    Agreement,
    agreement,
    forget,
    keep,
    keep_map,
    keep_standardisation,
    keep_unfit,
    map_form,
    proposed,
)
from fedhead.client.answers import Answer, Handler, of_several, shared
from fedhead.client.clusters import clusters
from fedhead.client.distances import DistancesRequest, add_unit_rows, count_distances
from fedhead.client.head_handlers import calibrate, compare, evaluate, gradient, report, train
from fedhead.client.personal import personalise
from fedhead.client.private_sums import private
from fedhead.client.refusals import sayable
from fedhead.client.release.masking import Asked, masking_of
from fedhead.client.release.step import release
from fedhead.client.rivals import rivals
from fedhead.client.secure_handlers import agree, open_session, unmask
from fedhead.client.site_data import OpenSite, Site
from fedhead.client.tails import tuned_rows
from fedhead.client.training import LabelledFeatures
from fedhead.data import IntArray
from fedhead.errors import FedheadError, UserError
from fedhead.protocol.actions import (
    ACTIONS,
    ADAPT,
    AGREE,
    CALIBRATE,
    CLUSTER,
    COMPARE,
    DESCRIBE,
    DISTANCES,
    EVALUATE,
    GRADIENT,
    INSTALL,
    MAP,
    OPEN,
    PERSONALISE,
    PRIVATE,
    REPORT,
    RIVALS,
    STANDARDISE,
    STATISTICS,
    TRAIN,
    UNMASK,
)
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import (
    MOST_STEPS,
    PROTOCOL,
    SITE_COUNTS,
    Description,
    Manifest,
    MessageError,
    Payload,
    StatisticsRequest,
    WeightsChunk,
    payload_bytes,
)
from fedhead.protocol.steps import Masking, Part
from fedhead.secure.replies import SECURE, without_session
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.moments import FeatureMoments
from fedhead.sums.packing import narrowed
from fedhead.sums.projection import projection_for
from fedhead.sums.sums import Arrays, Sums

logger = logging.getLogger(__name__)

BLOCK_ROWS = 2048
"""Rows whose features are summed at a time: few enough to stay in a processor's cache."""


def answer(
    action: str, sites: Sequence[Site], payload: Payload, context: Context, *, merged: bool = False
) -> Iterator[tuple[Sequence[int], Payload]]:
    """Answer one message to `sites`, and pass every reply through their release steps.

    Args:
        action: the requested action.
        sites: they share their steps, their limits and one `LabelledFeatures`; or one site.
        payload: the message.
        context: the run's state at these sites.
        merged: whether one reply is to speak for all of them.

    Yields:
        The positions in `sites` that a reply speaks for, and the reply.

    Raises:
        FedheadError: if the message cannot be answered; a sentence that may leave the site.
        UserError: if the site's own data or settings forbid it; not for others' eyes.
    """
    about = None
    if action in ABOUT_ROWS:
        agreed = agreement(context)
        manifest = agreed.manifest
        if agreed.task.dense and action not in ABOUT_PLACES:
            raise MessageError(f"it asks for {action}, which the task {manifest.task!r} does not answer")
        _admit(action, sites, manifest, masked=SECURE in payload.values)
        about = manifest if len(sites) == 1 else None
    payload, maskings = _maskings(action, sites, payload, context)
    made = HANDLERS[action](sites, payload, context, merged)
    if maskings and (unfit := agreement(context).unfit):
        made = _refusing(unfit)
    while True:
        try:
            one = next(made, None)
        # These are about the request's form, whatever the rows.
        except (MessageError, ValidationError):
            raise
        except Exception as error:
            if about is None:
                raise
            left = _release_failure(error, sites[0], action, about, maskings[0] if maskings else None)
            if left is None:
                raise
            yield [0], left
            return
        if one is None:
            return
        speaker, count = sites[one.positions[0]], len(one.positions)
        left = release(
            one.payload,
            speaker,
            action,
            manifest=one.manifest,
            parts=one.parts,
            sites=count,
            masking=maskings[one.positions[0]] if maskings else None,
            features=map_form(context) if one.parts else "",
            private=one.private,
        )
        yield one.positions, left


def _refusing(reason: str) -> Iterator[Answer]:
    raise FedheadError(reason)
    yield


def _admit(action: str, sites: Sequence[Site], manifest: Manifest, *, masked: bool) -> None:
    """Check with the release steps of all sites that they answer a request about rows.

    The manifest may have been accepted under other settings of the site, before it was restarted.

    Raises:
        FedheadError: if a site does not answer it.
    """
    for steps in {id(site.steps): site.steps for site in sites}.values():
        for step in steps:
            step.admit(action, manifest, masked=masked)


def _maskings(
    action: str, sites: Sequence[Site], payload: Payload, context: Context
) -> tuple[Payload, Sequence[Masking]]:
    """Return a request without its session, and how each site masks its reply; nothing if there is no session.

    Raises:
        FedheadError: if a site does not take part in the session.
    """
    if SECURE not in payload.values:
        return payload, ()
    if not ACTIONS[action].sums:
        raise MessageError(f"it asks for a secure sum of {action}, whose replies do not add")
    request, session = without_session(payload)
    asked = Asked(action, request, session, agreement(context).manifest)
    return request, [masking_of(site, asked) for site in sites]


def _release_failure(
    error: Exception, site: Site, action: str, manifest: Manifest, masking: Masking | None
) -> Payload | None:
    """Pass a failure through the release steps, as a reply is: whether a request fails can depend on a single row.

    Returns:
        The reply in place of masked sums, which nobody can tell from others; None if the failure itself is the reply.

    Raises:
        FedheadError: if nothing may leave, not even that the request failed.
    """
    parts: tuple[Part, ...] = ("train", "held_out")
    try:
        site.open(manifest)
    except Exception:
        if masking is None:
            logger.debug("It failed before a row was used.", exc_info=True)
            return None
        parts = ()
    reason = type(error).__name__
    if isinstance(error, FedheadError) and not isinstance(error, UserError):
        reason = sayable(error)
    payload = Payload({"failure": reason})
    if masking is None:
        release(payload, site, action, manifest=manifest, parts=parts)
        return None
    left = release(payload, site, action, manifest=manifest, parts=parts, masking=masking, failed=True)
    if not left.arrays:
        return None
    logger.error("%s cannot be answered, so the secure sum of all sites will not be usable.", action, exc_info=error)
    return left


def describe(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Check the manifest that arrived, keep it, and answer whether each site can take part under it."""
    forget(context)
    try:
        agreed = proposed(_manifest(payload), payload)
    except FedheadError as error:
        yield from _descriptions([Description(site=site.name, refusal=str(error)) for site in sites], None, merged)
        return
    descriptions = [description_of(site, agreed, steps=not merged) for site in sites]
    if not all(one.refusal for one in descriptions):
        keep(agreed, context)
    yield from _descriptions(descriptions, agreed.manifest, merged)


def _manifest(payload: Payload) -> Manifest:
    """Read a manifest.

    Raises:
        FedheadError: if it is of another protocol, or none that this site knows.
    """
    if (spoken := payload.values.get("protocol")) != PROTOCOL:
        other = (
            f"the coordinator {spoken}" if isinstance(spoken, int) and 0 <= spoken < 1000 else "the coordinator none"
        )
        raise FedheadError(
            f"This site speaks protocol {PROTOCOL} and {other}; install the coordinator's version of fedhead."
        )
    try:
        return Manifest(**payload.values)
    except ValidationError as error:
        raise FedheadError(
            f"The manifest asks for what this site does not know, or decides by itself: {wrong_fields(error)}."
        ) from None


def install(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Take in a chunk of the weights; answer how much is here, or once all is, whether each site can take part."""
    agreed, chunk = agreement(context), WeightsChunk.from_payload(payload)
    descriptions = []
    for site in sites:
        received = site.install(agreed.manifest, chunk)
        if received is None:
            descriptions.append(description_of(site, agreed, steps=not merged))
        else:
            descriptions.append(Description(site=site.name, rows=_told_rows(site, agreed), received=received))
    if all(one.refusal for one in descriptions):
        forget(context)
    yield from _descriptions(descriptions, agreed.manifest, merged)


def _descriptions(descriptions: Sequence[Description], manifest: Manifest | None, merged: bool) -> Iterator[Answer]:
    if not merged:
        # A real site's own log says why; of simulated sites the coordinator's does, in the same process.
        for one in descriptions:
            if one.refusal:
                logger.error("This site takes no part in the run. %s", one.refusal)
    if not merged:
        for position, one in enumerate(descriptions):
            yield Answer([position], Payload(one.wire()), manifest)
        return
    values = [one.wire() for one in descriptions]
    # Twice, as in the header of a payload, which is as long as this makes it.
    lengths = np.array([len(json.dumps(json.dumps(one))) for one in values])
    _, firsts, times = np.unique(lengths, return_index=True, return_counts=True)
    num_bytes = sum(
        payload_bytes(Payload(values[first]).to_content()) * count
        for first, count in zip(firsts.tolist(), times.tolist(), strict=True)
    )
    yield Answer(range(len(values)), Payload({"sites": values, "num_bytes": num_bytes}), manifest)


def description_of(site: Site, agreed: Agreement, *, steps: bool = False) -> Description:
    """Return whether `site` can take part in the run that was described to it, and if not, the reason.

    Args:
        site: the site.
        agreed: the run as described.
        steps: whether to describe the release steps; of simulated sites, the coordinator's process knows them.
    """
    has_weights, refusal = False, ""
    try:
        site.check_data(agreed.manifest)
        has_weights = site.has_weights(agreed.manifest)
        if has_weights:
            site.check(agreed.manifest, agreed.probe)
    except FedheadError as error:
        refusal = sayable(error)
    if refusal:
        # A guard's refusal tells no number of rows, and neither may anything beside it.
        return Description(site=site.name, refusal=refusal)
    applied = [step for step in site.steps if steps and step.applies(agreed.manifest)]
    described = tuple(said for step in applied if (said := step.describe()))[:MOST_STEPS]
    return Description(site=site.name, rows=_told_rows(site, agreed), has_weights=has_weights, steps=described)


def _told_rows(site: Site, agreed: Agreement) -> int:
    """Return the number of rows that a description tells: none under secure summation or differential privacy."""
    return 0 if agreed.manifest.secure_sum or agreed.manifest.privacy else site.num_rows


def map_features(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Keep a map of features, if every site's own rules allow sums of so many."""
    agreed = agreement(context)
    manifest = agreed.manifest
    request = MapRequest.from_payload(payload, manifest.num_features)
    mapping = request.build(manifest.num_features, manifest.seed)
    unfit = ""
    for site in sites:
        holds_back = _conceals(site, manifest)
        try:
            if holds_back:
                site.open(manifest)
            site.check_map(manifest, mapping)
        except FedheadError as error:
            if not holds_back:
                raise
            unfit = str(error)
    keep_map(request, context)
    if unfit:
        _hold_back(MAP, unfit, context)
    for positions in shared(sites, merged):
        yield Answer(positions, of_several({}, len(positions)), manifest)


def _conceals(site: Site, manifest: Manifest) -> bool:
    return any(step.conceals(manifest) for step in site.steps)


def _hold_back(action: str, reason: str, context: Context) -> None:
    """Accept a map or a standardisation under which no sums leave: a refusal would tell of this site's rows."""
    logger.error("No sums of this site will be usable: %s", reason)
    keep_unfit(action, reason, context)


def standardise(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Keep the mean and scale that heads are trained under."""
    keep_standardisation(payload, context)
    agreed = agreement(context)
    assert agreed.standardisation is not None
    for site in sites:
        holds_back = _conceals(site, agreed.manifest)
        if not holds_back:
            # A site that joins late extracts its features now, and not while others wait for it in a round.
            site.open(agreed.manifest)
        try:
            holding = site.open(agreed.manifest)
            if agreed.manifest.tune:
                site.tuning(agreed.manifest)
            data = replace(holding.data, mapping=agreed.mapping)
            site.training.check_scale(data.blocks_of(holding.train.rows), *agreed.standardisation)
        except FedheadError as error:
            if holds_back:
                _hold_back(STANDARDISE, str(error), context)
                continue
            forget(context)
            raise
    for positions in shared(sites, merged):
        yield Answer(positions, of_several({}, len(positions)), agreed.manifest)


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
    if data.places is not None:
        if request.what == "moments":
            raise MessageError("it asks for moments of features, which are not standardised in tasks about places")
        total = agreed.task.statistics(len(agreed.origin), agreed.origin)
        for rows in doublings(together):
            total += total
            data.places.add(total, data.features, rows.numpy())
    elif request.what == "moments":
        plain = agreed.probe.mean(0) if agreed.mapping is None else agreed.origin
        total = FeatureMoments.empty(agreed.task.origin_to_standardise(plain))
        for rows in doublings(together):
            total += total
            for block in torch.split(rows, BLOCK_ROWS):
                total = total.updated(agreed.task.to_standardise(data.exact(block), targets[block].cpu()))
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


def _exchange(reply: Callable[[Site, Payload, Manifest], Arrays]) -> Handler:
    """Return the handler of an exchange of a secure sum in which no sums leave."""

    def handle(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
        manifest = agreement(context).manifest
        for position, site in enumerate(sites):
            yield Answer([position], Payload({}, reply(site, payload, manifest)), manifest)

    return handle


HANDLERS: Mapping[str, Handler] = {
    DESCRIBE: describe,
    INSTALL: install,
    MAP: map_features,
    STATISTICS: statistics,
    STANDARDISE: standardise,
    PRIVATE: private,
    TRAIN: train,
    GRADIENT: gradient,
    EVALUATE: evaluate,
    REPORT: report,
    CALIBRATE: calibrate,
    COMPARE: compare,
    RIVALS: rivals,
    PERSONALISE: personalise,
    ADAPT: adapt,
    DISTANCES: distances,
    CLUSTER: clusters,
    OPEN: _exchange(open_session),
    AGREE: _exchange(agree),
    UNMASK: _exchange(unmask),
}
"""The handler of each action of `fedhead.protocol.actions`."""

ABOUT_ROWS = frozenset(HANDLERS) - {DESCRIBE, INSTALL, OPEN, AGREE, UNMASK}
"""The actions whose handlers compute on rows."""

ABOUT_PLACES = frozenset({STATISTICS, EVALUATE, REPORT})
"""Those that are defined if rows are places of items."""
