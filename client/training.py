"""The trainer: the heads of S sites at once on cached features, in batched products.

A real client has S = 1, a simulation of a thousand sites S = 1,000. A site's trained head depends only on the site, the
incoming head, the settings, the seed and the round, and not on the other sites or their order. Only rounding in the
parameters' own dtype may differ, because batched products may add in another order.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.client.optimizers import OPTIMIZERS
from fedhead.config import LocalConfig
from fedhead.data import mix
from fedhead.heads import FeatureMap, Head
from fedhead.sums.heads import CURVE
from fedhead.sums.paired import MOST_LOSS
from fedhead.tasks.dense import ItemPlaces
from fedhead.tasks.losses import CrossEntropy, Loss

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNK_BYTES = 256 * 2**20
"""Default working memory of one chunk."""

GRAM_BYTES = 512 * 2**20
"""Memory for results cached between rounds, in addition to the features."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features `[N, d]` and labels on any device, possibly memory-mapped; shared by all sites.

    Attributes:
        features: `[N, d]`.
        labels: the targets `[N]` or `[N, C]`, in the form that `loss` expects.
        standardisation: a mean and a scale `[D]`; heads see `(x - mean) / scale`.
        loss: of outputs against targets.
        target_standardisation: the same for the targets, `[C]` each; heads are trained on `(y - mean) / scale`.
        mapping: of features `[..., d]` to `[..., D]`, before all else; None for plain features.
        places: how items become the places that are learned from; None if rows are items.
        grams: cached products of the features.
    """

    features: Tensor
    labels: Tensor
    standardisation: tuple[Tensor, Tensor] | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    target_standardisation: tuple[Tensor, Tensor] | None = None
    mapping: FeatureMap | None = None
    places: ItemPlaces | None = None
    grams: "GramCache" = field(default_factory=lambda: GramCache(), compare=False, repr=False)

    @property
    def width(self) -> int:
        """`D`."""
        return self.features.shape[1] if self.mapping is None else self.mapping.width

    def mapped(self, features: Tensor) -> Tensor:
        """Return the mapped features `[..., D]` of plain ones `[..., d]`."""
        return features if self.mapping is None else self.mapping(features)

    def exact(self, rows: Tensor) -> Tensor:
        """Return the mapped features `[n, D]` of `rows` `[n]` on the CPU, computed in float64 if there is a map."""
        features = self.features[rows.to(self.features.device)].cpu()
        return features if self.mapping is None else self.mapping(features.double())

    def blocks_of(self, rows: IntArray, size: int = 2048) -> Iterator[Tensor]:
        """Yield what `exact` returns, block by block."""
        yield from map(self.exact, torch.split(torch.from_numpy(rows), size))

    def gather(self, rows: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `[..., D]` and targets `[...]` or `[..., C]` of `rows` `[...]`, standardised.

        Features have the device and dtype of `like`, and so do real targets; labels have its device.
        """
        index = torch.from_numpy(rows.ravel())
        features = self.mapped(self.features.index_select(0, index.to(self.features.device)).to(like))
        labels = self.targets(index, like)
        if self.standardisation is not None:
            mean, scale = self.standardisation
            features.sub_(mean.to(like)).div_(scale.to(like))
        return features.view(*rows.shape, -1), labels.view(*rows.shape, *labels.shape[1:])

    def loss_at(self, sites: Sequence["SiteRows"]) -> Loss:
        """Return the loss that heads are trained by at some sites."""
        return self.loss

    def targets(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the targets `[n]` or `[n, C]` of `rows` `[n]`, standardised, on the device of `like`."""
        targets = self.labels.index_select(0, rows.to(self.labels.device))
        if self.target_standardisation is None:
            return targets.to(like.device)
        mean, scale = (part.to(targets) for part in self.target_standardisation)
        return targets.sub(mean).div_(scale).to(like)


class GramCache:
    """Cached products of sites' rows with each other, valid while the same sites are trained together.

    Args:
        max_bytes: the size limit; the oldest products are evicted.
    """

    def __init__(self, max_bytes: int = GRAM_BYTES) -> None:
        self.max_bytes = max_bytes
        self._standardisation: tuple[Tensor, Tensor] | None = None
        # The sites are stored with the products so that their ids are not reused.
        self._kept: dict[tuple[int, ...], tuple[Sequence[SiteRows], Tensor]] = {}

    def under(self, standardisation: tuple[Tensor, Tensor] | None) -> None:
        """Discard products computed under another standardisation."""
        before = self._standardisation
        same = before is standardisation or (
            before is not None and standardisation is not None and all(map(torch.equal, before, standardisation))
        )
        if not same:
            self._kept.clear()
            self._standardisation = standardisation

    def get(self, sites: Sequence["SiteRows"], make: Callable[[Sequence["SiteRows"]], Tensor]) -> Tensor:
        """Return `[k, n, n]` for these sites, from the cache or computed by `make`."""
        key = tuple(map(id, sites))
        if key in self._kept:
            return self._kept[key][1]
        gram = make(sites)
        if gram.nbytes <= self.max_bytes:
            self._kept[key] = (sites, gram)
        while sum(kept.nbytes for _, kept in self._kept.values()) > self.max_bytes:
            self._kept.pop(next(iter(self._kept)))
        return gram


@dataclass(frozen=True)
class SiteRows:
    """A site's name and its rows `[n]` among the shared features."""

    name: str
    rows: IntArray

    @cached_property
    def key(self) -> int:
        """64 bits derived from the name, which seed the site's row orders."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


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


def shuffled(seed: int, name: str, round_number: int, epoch: int, count: int) -> IntArray:
    """Return the order `[count]` of a site's rows in one epoch.

    It depends only on the arguments and is the same in every process and under every version of numpy, whose own
    permutations may change.
    """
    site = SiteRows(name, np.arange(count))
    order: IntArray = orders(seed, [site], round_number, np.array([epoch]))[0]
    return order


def orders(seed: int, sites: Sequence[SiteRows], round_number: int, epochs: IntArray) -> IntArray:
    """Return `[S, n]`, the order of each site's rows in its current epoch, given as `[S]`.

    `n` is the largest number of rows; entries after a site's own rows are not valid rows.
    """
    sizes = sizes_of(sites)
    keys = np.array([site.key for site in sites], dtype=np.uint64)
    different = epochs[:1] if (epochs == epochs[0]).all() else epochs
    drawn = np.array([_stream(seed, round_number, epoch) for epoch in different.tolist()], dtype=np.uint64)
    columns = np.arange(sizes.max(initial=0), dtype=np.uint64)
    values = mix(np.add(mix(keys ^ drawn)[:, None], columns * _GOLDEN, dtype=np.uint64))
    values[columns >= sizes[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
    drawn_orders: IntArray = values.argsort(axis=1, kind="stable")
    return drawn_orders


@cache
def _stream(seed: int, round_number: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"order {seed}/{round_number}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


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
    sizes = sizes_of(sites)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in sites)])
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
    owner = np.repeat(np.arange(len(sites)), sizes)
    return Evaluation(
        losses=np.bincount(owner, weights=losses, minlength=len(sites)).astype(np.float64),
        scores=np.bincount(owner, weights=scores, minlength=len(sites)).astype(np.float64),
        rows=sizes,
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
    together: int | None = None,
) -> Iterator[IntArray]:
    """Yield the positions of sites that are trained together, at most `together`, by descending size."""
    order = np.argsort(-sizes, kind="stable")
    widths = np.minimum(sizes[order], settings.batch_size)
    copies = 6  # parameter, gradient, up to two of optimiser state, temporaries
    head_bytes = copies * sum(value.nbytes for value in incoming.values())
    start = 0
    while start < len(order):
        width = int(widths[start])
        room = together or max(1, chunk_bytes // (head_bytes + width * row_bytes(incoming)))
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
    optimizer = OPTIMIZERS[settings.optimizer](settings)
    table = table_of(sites)
    loss = data.loss_at(sites)
    for batch in batches(sites, settings, seed, round_number, min_batch):
        count = len(batch.places)
        active = {name: value[:count] for name, value in parameters.items()}
        features, labels = data.gather(np.take_along_axis(table[:count], batch.places, axis=1), like)
        weights = torch.from_numpy(batch.weights).to(like)
        gradients, values = head.gradients(active, features, labels, weights, loss)
        losses[:count] += torch.from_numpy(batch.share).to(like) * values
        if settings.proximal_mu:
            for name, value in active.items():
                gradients[name] = gradients[name].add(value - incoming[name], alpha=settings.proximal_mu)
        optimizer.step(active, gradients)
    sizes = sizes_of(sites)
    return TrainedHeads(parameters, losses.cpu().double().numpy(), sizes)


@dataclass(frozen=True)
class Batch:
    """One minibatch of `b` rows at each of the first `k` sites of a chunk.

    Attributes:
        places: `[k, b]`, indices into the site's rows; a shorter batch repeats its last one.
        weights: `[k, b]`, the inverse of the batch's true length, and 0 for repeated rows.
        share: `[k]`, the batch's share of the site's rows in the last epoch; 0 in earlier epochs.
    """

    places: IntArray
    weights: FloatArray
    share: FloatArray


def batches(
    sites: Sequence[SiteRows], settings: LocalConfig, seed: int, round_number: int, min_batch: int = 1
) -> Iterator[Batch]:
    """Yield the minibatches of all epochs of sites sorted by descending number of rows.

    The sites that still have batches are always the first of `sites`. A last minibatch of an epoch with fewer than
    `min_batch` rows is merged with the previous one.
    """
    sizes = sizes_of(sites)
    per_epoch = -(-sizes // settings.batch_size)
    per_epoch -= (per_epoch > 1) & (sizes - (per_epoch - 1) * settings.batch_size < min_batch)
    steps = per_epoch * settings.epochs
    order = np.zeros((len(sites), sizes.max(initial=0)), dtype=np.int64)
    for step in range(steps[0]):
        count = np.count_nonzero(steps > step)
        epoch, within = np.divmod(step, per_epoch[:count])
        if len(starting := np.flatnonzero(within == 0)):
            drawn = orders(seed, [sites[i] for i in starting.tolist()], round_number, epoch[starting])
            order[starting, : drawn.shape[1]] = drawn
        first = within * settings.batch_size
        last = within == per_epoch[:count] - 1
        lengths = np.where(last, sizes[:count] - first, settings.batch_size)
        columns = np.arange(lengths.max())
        places = np.take_along_axis(
            order[:count], np.minimum(first[:, None] + columns, sizes[:count, None] - 1), axis=1
        )
        weights = (columns < lengths[:, None]) / lengths[:, None]
        share = (epoch == settings.epochs - 1) * lengths / sizes[:count]
        yield Batch(places, weights, share)


def table_of(sites: Sequence[SiteRows]) -> IntArray:
    """Return `[S, n]`, the rows of each site, padded with the site's first row."""
    sizes = sizes_of(sites)
    columns = np.arange(sizes.max(initial=0))
    # One row more, for sites without rows.
    rows = np.concatenate([*(site.rows for site in sites), np.zeros(1, dtype=np.int64)])
    places = np.where(columns < sizes[:, None], columns, 0) + (np.cumsum(sizes) - sizes)[:, None]
    table: IntArray = rows[places]
    table[sizes == 0] = 0
    return table


def sizes_of(sites: Sequence[SiteRows]) -> IntArray:
    """Return `[S]`, the number of rows of each site."""
    return np.fromiter((len(site.rows) for site in sites), np.int64, len(sites))
