"""Handlers that keep a map of features, and the mean and scale that heads are trained under."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from flwr.app import Context

from fedhead.client.agreement import (
    agreement,
    forget,
    keep_map,
    keep_standardisation,
    keep_unfit,
)
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.site_data import Site
from fedhead.errors import FedheadError
from fedhead.protocol.actions import MAP, STANDARDISE
from fedhead.protocol.mapping import MapRequest
from fedhead.protocol.messages import Manifest, Payload

logger = logging.getLogger(__name__)


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
    """Accept a map or a standardisation under which no sums leave: a refusal would disclose this site's rows."""
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
