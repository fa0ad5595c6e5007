"""Training of heads on places of items: minibatches are of items, whose places are expanded a few items at a time."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.minibatches import batches
from fedhead.client.optimizers import OPTIMIZERS
from fedhead.client.training import TrainedHeads
from fedhead.config import LocalConfig
from fedhead.data import IntArray
from fedhead.heads import Head
from fedhead.tasks.dense import ItemPlaces


def train_on_places(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    *,
    seed: int,
    round_number: int,
    min_batch: int = 1,
) -> Iterator[tuple[int, TrainedHeads]]:
    """Train one copy of `incoming` at each site, one site after the other.

    The steps are those of `train_in_chunks`, except that a batch's loss is the mean over its items of
    `DenseTask.training_loss`.

    Yields:
        The position in `sites`, and the head trained there.
    """
    for position, site in enumerate(sites):
        parameters = {name: value[None].clone() for name, value in incoming.items()}
        optimizer, loss = OPTIMIZERS[settings.optimizer](settings, head.rates), 0.0
        if len(site.rows):
            for batch in batches([site], settings, seed, round_number, min_batch):
                rows = site.rows[batch.places[0]]
                gradients, value = _gradients(head, parameters, data, rows)
                loss += float(batch.share[0]) * value
                if settings.proximal_mu:
                    for name, own in parameters.items():
                        gradients[name].add_(own - incoming[name], alpha=settings.proximal_mu)
                with torch.no_grad():
                    optimizer.step(parameters, gradients)
        yield position, TrainedHeads(parameters, np.array([loss]), np.array([len(site.rows)]))


def outputs_at_places(head: Head, parameters: Mapping[str, Tensor], data: LabelledFeatures, features: Tensor) -> Tensor:
    """Return outputs `[..., p, C]` at places with features `[..., p, d]`, standardised as the run says."""
    like = next(iter(parameters.values()))
    features = features.to(like)
    if data.standardisation is not None:
        mean, scale = data.standardisation
        features = (features - mean.to(like)) / scale.to(like)
    return head.outputs(parameters, features)


def _gradients(
    head: Head, parameters: Mapping[str, Tensor], data: LabelledFeatures, rows: IntArray
) -> tuple[dict[str, Tensor], float]:
    """Return the gradients of the loss of some items, each with a leading dimension of 1, and the loss."""
    places = data.places
    assert isinstance(places, ItemPlaces)
    total, value = {name: torch.zeros_like(one) for name, one in parameters.items()}, 0.0
    for values, annotations in places.blocks(data.features, rows):
        found = places.task.expand(values, annotations, places.geometry)
        share = len(annotations) / len(rows)
        if not len(found.features):
            continue
        with torch.enable_grad():
            leaves = {name: one.detach().requires_grad_() for name, one in parameters.items()}
            outputs = outputs_at_places(head, leaves, data, found.features[None])[0]
            targets = found.targets[:, : outputs.shape[1]].to(outputs)
            loss = share * places.task.training_loss(outputs, targets)
            slopes = torch.autograd.grad(loss, list(leaves.values()))
        for name, slope in zip(leaves, slopes, strict=True):
            total[name] += slope
        value += float(loss.detach())
    return total, value
