"""Handlers that answer whether a site can take part in a run, and take in the weights it lacks."""

import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from flwr.app import Context
from pydantic import ValidationError

from fedhead.client.agreement import (
    Agreement,
    agreement,
    forget,
    keep,
    proposed,
)
from fedhead.client.answers import Answer
from fedhead.client.refusals import sayable
from fedhead.client.site_data import Site
from fedhead.errors import FedheadError
from fedhead.protocol.fields import wrong_fields
from fedhead.protocol.messages import (
    MOST_STEPS,
    PROTOCOL,
    Description,
    Manifest,
    Payload,
    WeightsChunk,
    payload_bytes,
)

logger = logging.getLogger(__name__)


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
    """Return the number of rows in a description: 0 under secure summation or differential privacy."""
    return 0 if agreed.manifest.secure_sum or agreed.manifest.privacy else site.num_rows
