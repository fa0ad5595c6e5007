"""Tails of which a part stays at each site: `lora:8:sa` shares adapters' first matrices alone (Guo et al., 2024)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from fedhead.client import head_handlers
from fedhead.client.agreement import Agreement, agreement, head_of
from fedhead.client.answers import Answer
from fedhead.client.head_answers import answered_alone, evaluated
from fedhead.client.head_handlers import (
    Prepared,
    asked_settings,
    evaluate_sites,
    form_of,
    held_out_rows,
    outputs_of,
    prepare,
)
from fedhead.client.site_data import Site
from fedhead.client.tails import tuned_head
from fedhead.client.training import train_in_chunks
from fedhead.heads import LinearHead
from fedhead.heads.tail import HEAD, TAIL, part_of
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import Manifest, Payload
from fedhead.sums.heads import FloatArray
from fedhead.sums.sums import Arrays
from fedhead.tuning import parse_tune

NEWEST = 2**62
"""A round after all others."""


def is_personal(manifest: Manifest) -> bool:
    """Return whether a part of the run's tail stays at each site."""
    return bool(manifest.tune) and parse_tune(manifest.tune).personal


def _family(manifest: Manifest) -> str:
    """Return the name under which adapters stay: a coordinator can give several runs one name."""
    return f"{manifest.run} {manifest.backbone_digest} {manifest.tune} {manifest.objective}"


def train(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Train as `head_handlers.train`, or a tail at each site with its own part of it, which it keeps."""
    agreed = agreement(context)
    if not is_personal(agreed.manifest) or not part_of(payload.arrays, TAIL):
        yield from head_handlers.train(sites, payload, context, merged)
        return
    request = HeadRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    asked, limits = asked_settings(agreed, request), sites[0].training
    limits.check(asked)
    local = agreed.task.local(asked, head_of(agreed))
    manifest, number = agreed.manifest, request.server_round
    ready = [prepare_with_own(site, agreed, request, number) for site in sites]

    def trained() -> Iterator[tuple[int, Arrays, int, float]]:
        for position, (site, one) in enumerate(zip(sites, ready, strict=True)):
            ((_, made),) = train_in_chunks(
                one.head,
                one.parameters,
                one.data,
                [one.holdings[0].train],
                local,
                seed=manifest.seed,
                round_number=number,
                min_batch=min(limits.min_batch, local.batch_size),
            )
            arrays = {name: value[0].cpu().numpy() for name, value in made.parameters.items()}
            own = {name: value for name, value in arrays.items() if name not in request.arrays}
            if all(bool(np.isfinite(value).all()) for value in arrays.values()):
                site.own_adapters.keep(_family(manifest), number, own)
            shared = {name: arrays[name] for name in request.arrays}
            yield position, shared, int(made.rows[0]), float(made.losses[0])

    yield from answered_alone(sites, manifest, request.arrays, _evaluated(ready), trained(), merged)


def evaluate(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Evaluate as `head_handlers.evaluate`, or at each site with its own part of the tail."""
    agreed = agreement(context)
    if not is_personal(agreed.manifest):
        yield from head_handlers.evaluate(sites, payload, context, merged)
        return
    request = HeadRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    ready = [prepare_with_own(site, agreed, request, request.server_round + 1) for site in sites]
    yield from evaluated(sites, agreed.manifest, _evaluated(ready), merged)


def _evaluated(ready: Sequence[Prepared]) -> FloatArray:
    """Return metrics `[S, width]` of sites that are prepared one by one."""
    return np.concatenate([evaluate_sites(one) for one in ready])


def prepare_with_own(site: Site, agreed: Agreement, request: HeadRequest, number: int = NEWEST) -> Prepared:
    """Prepare a site with the head that arrived and, if it has a tail, the site's own part of it before a round."""
    ready = prepare([site], agreed, request)
    if not part_of(request.arrays, TAIL) or not is_personal(agreed.manifest):
        return ready
    tuning = site.tuning(agreed.manifest)
    stored = site.own_adapters.before(_family(agreed.manifest), number, tuning.own_form)
    own = {f"{TAIL}{name}": value for name, value in tuning.tail.trainable().items()}
    device = tuning.store.device
    kept: Mapping[str, Tensor] = {name: torch.from_numpy(value).to(device) for name, value in stored.items()}
    parameters = {**own, **ready.parameters, **kept}
    return replace(ready, head=tuned_head(agreed, tuning), parameters=parameters)


def own_outputs(sites: Sequence[Site], agreed: Agreement, request: HeadRequest) -> tuple[Tensor, Tensor]:
    """Return outputs `[n, C]` and targets of the held-out rows of sites, each with its own part of the tail."""
    made = [prepare_with_own(site, agreed, request) for site in sites]
    parts = [outputs_of(held_out_rows(one), one, agreed) for one in made]
    return torch.cat([outputs for outputs, _ in parts]), torch.cat([targets for _, targets in parts])


def personal_model(site: Site, agreed: Agreement, request: HeadRequest) -> tuple[LinearHead, Mapping[str, Tensor]]:
    """Return the head for features as they are, and the tail's parameters, of a site's own model."""
    parameters = prepare_with_own(site, agreed, request).parameters
    head = head_of(agreed)
    assert isinstance(head, LinearHead)
    head.assign({name: value.cpu() for name, value in part_of(parameters, HEAD).items()})
    if agreed.standardisation is not None:
        head.fold(*agreed.standardisation)
    return head, part_of(parameters, TAIL)
