"""The trainer: the heads of S sites at once on cached features, in batched products.

A real client has S = 1, a simulation of a thousand sites S = 1,000. A site's trained head depends only on the site, the
incoming head, the settings, the seed and the round, and not on the other sites or their order. Only rounding in the
parameters' own dtype may differ, because batched products may add in another order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.client.labelled_features import Cohort, LabelledFeatures, SiteRows, sizes_of
from fedhead.client.minibatches import batches
from fedhead.client.optimizers import OPTIMIZERS
from fedhead.config import LocalConfig
from fedhead.heads import Head
from fedhead.sums.heads import CURVE
from fedhead.sums.paired import MOST_LOSS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


CHUNK_BYTES = 256 * 2**20
"""Default working memory of one chunk."""


@dataclass(frozen=True)
class TrainedHeads:
    """Heads trained at S sites from the incoming head.

    Attributes:
        parameters: by name, each `[S, ...]`.
        losses: `[S]`, mean loss of the rows in the last epoch, each at the time of its batch; 0 without rows.
        rows: `[S]`, the number of training rows.
    """

    parameters: dict[str, Tensor]
    losses: FloatArray
    rows: IntArray


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one head at S sites, as sums that add across sites.

    Attributes:
        losses: `[S]`, the loss summed over the site's rows.
        scores: `[S]`, the score summed over the site's rows: for classes, the number of correct rows.
        rows: `[S]`, the number of rows.
        curves: `[S, K]`, the losses at the temperatures `CURVE`, summed over the site's rows; `[S, 0]` if the head is
            not compared by them.
    """

    losses: FloatArray
    scores: FloatArray
    rows: IntArray
    curves: FloatArray


def train_heads(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    *,
    seed: int,
    round_number: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> TrainedHeads:
    """Train one copy of `incoming` at each site, and return the heads in the order of `sites`.

    See `train_in_chunks`, which does not keep all heads at once.
    """
    count = len(sites)
    parameters = {name: value.new_empty((count, *value.shape)) for name, value in incoming.items()}
    losses, rows = np.zeros(count), np.zeros(count, dtype=np.int64)
    for positions, trained in train_in_chunks(
        head, incoming, data, sites, settings, seed=seed, round_number=round_number, chunk_bytes=chunk_bytes
    ):
        for name, value in trained.parameters.items():
            parameters[name][torch.from_numpy(positions).to(value.device)] = value
        losses[positions], rows[positions] = trained.losses, trained.rows
    return TrainedHeads(parameters, losses, rows)


def train_in_chunks(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    *,
    seed: int,
    round_number: int,
    chunk_bytes: int = CHUNK_BYTES,
    min_batch: int = 1,
) -> Iterator[tuple[IntArray, TrainedHeads]]:
    """Train one copy of `incoming` at each site, with as many sites at once as fit in `chunk_bytes`.

    Each site minimises the mean loss of its minibatches (see `fedhead.tasks.losses`; the last one of an epoch may be
    short) plus `proximal_mu / 2 * ||w - incoming||^2` (FedProx; Li et al., MLSys 2020). Optimiser state is reset,
    and steps equal those of `torch.optim.SGD` and `torch.optim.AdamW`.

    Args:
        head: defines the form of the outputs; its own parameters are not used.
        incoming: the initial parameters by name; training uses their dtype and device.
        data: the features and labels of all sites.
        sites: the rows of each site.
        settings: epochs, batches and optimiser.
        seed: the run's seed.
        round_number: the round, which determines the minibatches.
        chunk_bytes: an estimate: heads without closed-form gradients may take twice as much, one large site more.
        min_batch: the least rows of a minibatch; a smaller last one is merged with the previous one.

    Yields:
        Positions `[k]` in `sites` and the heads trained there, larger sites first.
    """
    sizes = sizes_of(sites)
    for positions in chunks(sizes, settings, incoming, chunk_bytes, head.together):
        chosen = [sites[i] for i in positions]
        yield positions, train_chunk(head, incoming, data, chosen, settings, seed, round_number, min_batch)


@torch.inference_mode()
def evaluate_head(
    head: Head,
    parameters: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Evaluation:
    """Evaluate one head at each site, with as many rows at once as fit in `chunk_bytes`."""
    like = next(iter(parameters.values()))
    cohort = data.cohorts.of(sites)
    rows = cohort.rows
    losses, scores = np.empty(len(rows)), np.empty(len(rows))
    curves = np.empty((len(rows), len(CURVE) if head.curved else 0))
    step = max(1, chunk_bytes // row_bytes(parameters))
    if head.most_rows is not None:
        step = min(step, head.most_rows)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        features, labels = data.gather(rows[block], like)
        outputs = head.outputs(parameters, features)
        losses[block] = data.loss.values(outputs, labels).cpu().numpy()
        scores[block] = data.loss.score(outputs, labels).cpu().numpy()
        for place in range(curves.shape[1]):
            curves[block, place] = data.loss.values(outputs / CURVE[place], labels).cpu().numpy()
    if head.curved:
        # A version that diverged is a bad one, and not a broken reply.
        losses, curves = (np.nan_to_num(one, nan=MOST_LOSS).clip(0, MOST_LOSS) for one in (losses, curves))
    owner = cohort.owners
    return Evaluation(
        losses=np.bincount(owner, weights=losses, minlength=len(sites)).astype(np.float64),
        scores=np.bincount(owner, weights=scores, minlength=len(sites)).astype(np.float64),
        rows=cohort.sizes,
        curves=np.array(
            [np.bincount(owner, weights=curve, minlength=len(sites)).astype(np.float64) for curve in curves.T]
        ).T.reshape(len(sites), curves.shape[1]),
    )


def row_bytes(parameters: Mapping[str, Tensor]) -> int:
    """Estimate the memory of one row up to the loss: the row and its activations, with their gradients."""
    units = sum(len(value) for value in parameters.values())
    like = next(iter(parameters.values()))
    width = max(value.shape[-1] for value in parameters.values())
    return 4 * like.element_size() * (width + units)


def chunks(
    sizes: IntArray,
    settings: LocalConfig,
    incoming: Mapping[str, Tensor],
    chunk_bytes: int,
    together: Callable[[int], int | None] = lambda rows: None,
) -> Iterator[IntArray]:
    """Yield the positions of sites that are trained together, at most `together(rows)` in batches of so many rows."""
    order = np.argsort(-sizes, kind="stable")
    widths = np.minimum(sizes[order], settings.batch_size)
    copies = 6  # parameter, gradient, up to two of optimiser state, temporaries
    head_bytes = copies * sum(value.nbytes for value in incoming.values())
    start = 0
    while start < len(order):
        width = int(widths[start])
        room = together(width) or max(1, chunk_bytes // (head_bytes + width * row_bytes(incoming)))
        # Rows are padded to the largest site's: a chunk ends where padding would more than double them.
        alike = int(np.count_nonzero(2 * sizes[order] >= sizes[order[start]]))
        stop = min(start + room, alike)
        yield order[start:stop]
        start = stop


@torch.no_grad()
def train_chunk(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    seed: int,
    round_number: int,
    min_batch: int = 1,
) -> TrainedHeads:
    """Train at sites sorted by descending number of rows."""
    like = next(iter(incoming.values()))
    parameters = {name: value.expand(len(sites), *value.shape).clone() for name, value in incoming.items()}
    losses = like.new_zeros(len(sites))
    optimizer = OPTIMIZERS[settings.optimizer](settings, head.rates)
    cohort = Cohort(sites)
    loss = data.loss_at(sites)
    head.seed_draws(f"{seed}/{sites[0].name}/{round_number}")
    for batch in batches(cohort, settings, seed, round_number, min_batch):
        count = len(batch.places)
        active = {name: value[:count] for name, value in parameters.items()}
        features, labels = data.gather(np.take_along_axis(cohort.table[:count], batch.places, axis=1), like)
        weights = torch.from_numpy(batch.weights).to(like)
        gradients, values = head.gradients(active, features, labels, weights, loss)
        losses[:count] += torch.from_numpy(batch.share).to(like) * values
        if settings.proximal_mu:
            for name, value in active.items():
                gradients[name] = gradients[name].add(value - incoming[name], alpha=settings.proximal_mu)
        optimizer.step(active, gradients)
    return TrainedHeads(parameters, losses.cpu().double().numpy(), cohort.sizes)
