"""The one trainer: the heads of S sites at once on cached features, in batched products.

A real client is S = 1, a simulation of a thousand sites S = 1,000. What a site's head becomes depends only on
the site, the incoming head, the settings, the seed and the round: not on which sites are trained beside it, nor on
their order. Only rounding in the parameters' own dtype may differ, since batched products may add up in another order.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.config import LocalConfig
from fedhead.data import mix
from fedhead.heads import Head
from fedhead.losses import loss_for

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

CHUNK_BYTES = 256 * 2**20
"""Working memory of one chunk, unless told otherwise."""

GRAM_BYTES = 512 * 2**20
"""What is kept from round to round, beside the features."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features `[N, d]` and labels (int64) on any device, perhaps memory-mapped; shared by all sites.

    Labels are class numbers `[N]`, or for multi-label rows `[N, C]` of 0 and 1.
    With `standardisation`, a mean and a scale `[d]`, heads see `(x - mean) / scale`. What is computed of the features
    for several rounds is kept in `grams`.
    """

    features: Tensor
    labels: Tensor
    standardisation: tuple[Tensor, Tensor] | None = None
    grams: "GramCache" = field(default_factory=lambda: GramCache(), compare=False, repr=False)

    def gather(self, rows: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `[..., d]` and labels `[...]` or `[..., C]` of `rows` `[...]`.

        Features have the device and dtype of `like`, labels its device.
        """
        index = torch.from_numpy(rows.ravel())
        features = self.features.index_select(0, index.to(self.features.device)).to(like)
        labels = self.labels.index_select(0, index.to(self.labels.device)).to(like.device)
        if self.standardisation is not None:
            mean, scale = self.standardisation
            features.sub_(mean.to(like)).div_(scale.to(like))
        return features.view(*rows.shape, -1), labels.view(*rows.shape, *labels.shape[1:])


class GramCache:
    """Products of sites' rows with each other, for as long as the same sites are trained together.

    Args:
        max_bytes: the oldest go where more would be kept.
    """

    def __init__(self, max_bytes: int = GRAM_BYTES) -> None:
        self.max_bytes = max_bytes
        self._standardisation: tuple[Tensor, Tensor] | None = None
        # The sites stand beside the products so that no other gets their ids.
        self._kept: dict[tuple[int, ...], tuple[Sequence[SiteRows], Tensor]] = {}

    def under(self, standardisation: tuple[Tensor, Tensor] | None) -> None:
        """Forget what was computed under another standardisation."""
        before = self._standardisation
        same = before is standardisation or (
            before is not None and standardisation is not None and all(map(torch.equal, before, standardisation))
        )
        if not same:
            self._kept.clear()
            self._standardisation = standardisation

    def get(self, sites: Sequence["SiteRows"], make: Callable[[Sequence["SiteRows"]], Tensor]) -> Tensor:
        """Return `[k, n, n]` of these sites, made now or before."""
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
        """64 bits of the name, that its orders are drawn by."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class TrainedHeads:
    """What local training made of the incoming head at S sites.

    Attributes:
        parameters: by name, each `[S, ...]`.
        losses: `[S]`, mean loss of the rows in the last epoch, each as its batch met it; 0 without rows.
        rows: `[S]`, how many rows each site trained on.
    """

    parameters: dict[str, Tensor]
    losses: FloatArray
    rows: IntArray


@dataclass(frozen=True)
class Evaluation:
    """How one head does at S sites, as sums that add across sites.

    Attributes:
        losses: `[S]`, the loss (see `fedhead.losses`) summed over the site's rows.
        correct: `[S]`, rows whose largest logit is their label's; of multi-label rows, those with all labels right.
        rows: `[S]`.
    """

    losses: FloatArray
    correct: IntArray
    rows: IntArray


def shuffled(seed: int, name: str, round_number: int, epoch: int, count: int) -> IntArray:
    """Return the order `[count]` in which the site `name` passes over its rows in one epoch.

    A function of its arguments alone: the same in every process and under every version of numpy, whose own
    permutations may change.
    """
    site = SiteRows(name, np.arange(count))
    order: IntArray = orders(seed, [site], round_number, np.array([epoch]))[0]
    return order


def orders(seed: int, sites: Sequence[SiteRows], round_number: int, epochs: IntArray) -> IntArray:
    """Return `[S, n]`, for each site the order of its rows in the epoch `[S]` that it is in.

    `n` is the most rows of any; the numbers after a site's own are no rows of it.
    """
    sizes = np.array([len(site.rows) for site in sites])
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
    """Train one copy of `incoming` at each site, and return them in the order of `sites`.

    See `train_in_chunks`, which does not keep all of them at once.
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
) -> Iterator[tuple[IntArray, TrainedHeads]]:
    """Train one copy of `incoming` at each site, as many sites at once as `chunk_bytes` hold.

    Each site minimises the mean loss of its minibatches (see `fedhead.losses`), the last one of an epoch as short as it
    comes, plus `proximal_mu / 2 * ||w - incoming||^2` (FedProx; Li et al., MLSys 2020). Optimisers start afresh, and do
    what `torch.optim.SGD` and `torch.optim.AdamW` do.

    Args:
        head: gives the form of the logits; its own parameters are not used.
        incoming: the parameters to start from, by name; training happens in their dtype and on their device.
        data: the features and labels of all sites.
        sites: who holds which rows.
        settings: epochs, batches and optimiser.
        seed: the run's.
        round_number: the round; another one gives other minibatches.
        chunk_bytes: an estimate: heads without closed-form gradients may take twice that, one large site more.

    Yields:
        Positions `[k]` in `sites`, and the heads trained there; larger sites first.
    """
    sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
    for positions in chunks(sizes, settings, incoming, chunk_bytes):
        yield positions, train_chunk(head, incoming, data, [sites[i] for i in positions], settings, seed, round_number)


@torch.inference_mode()
def evaluate_head(
    head: Head,
    parameters: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Evaluation:
    """Evaluate one head at each site, as many rows at once as `chunk_bytes` hold."""
    like = next(iter(parameters.values()))
    sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in sites)])
    losses, correct = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    step = max(1, chunk_bytes // row_bytes(parameters))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        features, labels = data.gather(rows[block], like)
        logits = head.logits(parameters, features)
        loss = loss_for(logits, labels)
        losses[block] = loss.values(logits, labels).cpu().numpy()
        correct[block] = loss.correct(logits, labels).cpu().numpy()
    owner = np.repeat(np.arange(len(sites)), sizes)
    return Evaluation(
        losses=np.bincount(owner, weights=losses, minlength=len(sites)).astype(np.float64),
        correct=np.bincount(owner[correct], minlength=len(sites)),
        rows=sizes,
    )


def row_bytes(parameters: Mapping[str, Tensor]) -> int:
    """Estimate what one row takes on its way to the loss: itself and its units, with their gradients."""
    units = sum(len(value) for value in parameters.values())
    like = next(iter(parameters.values()))
    width = max(value.shape[-1] for value in parameters.values())
    return 4 * like.element_size() * (width + units)


def chunks(
    sizes: IntArray, settings: LocalConfig, incoming: Mapping[str, Tensor], chunk_bytes: int
) -> Iterator[IntArray]:
    """Yield the positions of sites that are trained at once, by size, descending."""
    order = np.argsort(-sizes, kind="stable")
    widths = np.minimum(sizes[order], settings.batch_size)
    copies = 6  # parameter, gradient, up to two of optimiser state, temporaries
    head_bytes = copies * sum(value.nbytes for value in incoming.values())
    start = 0
    while start < len(order):
        width = int(widths[start])
        room = max(1, chunk_bytes // (head_bytes + width * row_bytes(incoming)))
        # Rows are padded to those of the largest: a chunk ends where that would more than double them.
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
) -> TrainedHeads:
    """Train at sites that come with their rows descending in number."""
    like = next(iter(incoming.values()))
    parameters = {name: value.expand(len(sites), *value.shape).clone() for name, value in incoming.items()}
    losses = like.new_zeros(len(sites))
    optimizer = OPTIMIZERS[settings.optimizer](settings)
    table = table_of(sites)
    for batch in batches(sites, settings, seed, round_number):
        count = len(batch.places)
        active = {name: value[:count] for name, value in parameters.items()}
        features, labels = data.gather(np.take_along_axis(table[:count], batch.places, axis=1), like)
        weights = torch.from_numpy(batch.weights).to(like)
        gradients, values = head.gradients(active, features, labels, weights)
        losses[:count] += torch.from_numpy(batch.share).to(like) * values
        if settings.proximal_mu:
            for name, value in active.items():
                gradients[name] = gradients[name].add(value - incoming[name], alpha=settings.proximal_mu)
        optimizer.step(active, gradients)
    sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
    return TrainedHeads(parameters, losses.cpu().double().numpy(), sizes)


@dataclass(frozen=True)
class Batch:
    """One minibatch of `b` rows at each of the first `k` sites of a chunk.

    Attributes:
        places: `[k, b]`, which of the site's rows; a shorter batch repeats its last one.
        weights: `[k, b]`, one over the batch's true length, and 0 for repeated rows.
        share: `[k]`, the batch's share of the site's rows in the last epoch; 0 in the epochs before.
    """

    places: IntArray
    weights: FloatArray
    share: FloatArray


def batches(sites: Sequence[SiteRows], settings: LocalConfig, seed: int, round_number: int) -> Iterator[Batch]:
    """Yield the minibatches of all epochs of sites that come with their rows descending in number.

    Those still at work are always the first of `sites`.
    """
    sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
    per_epoch = -(-sizes // settings.batch_size)
    steps = per_epoch * settings.epochs
    order = np.zeros((len(sites), sizes.max(initial=0)), dtype=np.int64)
    for step in range(steps[0]):
        count = np.count_nonzero(steps > step)
        epoch, within = np.divmod(step, per_epoch[:count])
        if len(starting := np.flatnonzero(within == 0)):
            drawn = orders(seed, [sites[i] for i in starting.tolist()], round_number, epoch[starting])
            order[starting, : drawn.shape[1]] = drawn
        first = within * settings.batch_size
        lengths = np.minimum(settings.batch_size, sizes[:count] - first)
        columns = np.arange(lengths.max())
        places = np.take_along_axis(
            order[:count], np.minimum(first[:, None] + columns, sizes[:count, None] - 1), axis=1
        )
        weights = (columns < lengths[:, None]) / lengths[:, None]
        share = (epoch == settings.epochs - 1) * lengths / sizes[:count]
        yield Batch(places, weights, share)


def table_of(sites: Sequence[SiteRows]) -> IntArray:
    """Return `[S, n]`, the rows of sites, a shorter site's filled up with its first one."""
    width = max((len(site.rows) for site in sites), default=0)
    table = np.zeros((len(sites), width), dtype=np.int64)
    for row, site in zip(table, sites, strict=True):
        if count := len(site.rows):
            row[:count] = site.rows
            row[count:] = site.rows[0]
    return table


class Optimizer(ABC):
    """Steps of heads `[k, ...]`; their number `k` may fall from step to step, never rise."""

    def __init__(self, settings: LocalConfig) -> None:
        self.settings = settings

    @abstractmethod
    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Change `parameters` in place."""


class _SGD(Optimizer):
    def __init__(self, settings: LocalConfig) -> None:
        super().__init__(settings)
        self.velocities: dict[str, Tensor] = {}

    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        momentum, decay = self.settings.momentum, self.settings.weight_decay
        for name, parameter in parameters.items():
            gradient = gradients[name]
            if decay:
                gradient = gradient.add(parameter, alpha=decay)
            if momentum:
                if name in self.velocities:
                    gradient = self.velocities[name][: len(gradient)].mul_(momentum).add_(gradient)
                else:
                    gradient = self.velocities[name] = gradient.clone()
            parameter.sub_(gradient, alpha=self.settings.lr)


class _AdamW(Optimizer):
    """Loshchilov & Hutter, ICLR 2019, with the betas and epsilon of torch."""

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, settings: LocalConfig) -> None:
        super().__init__(settings)
        self.steps = 0
        self.means: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.steps += 1
        lr = self.settings.lr
        mean_bias, square_bias = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for name, parameter in parameters.items():
            gradient = gradients[name]
            if self.steps == 1:
                self.means[name] = torch.zeros_like(gradient)
                self.squares[name] = torch.zeros_like(gradient)
            mean = self.means[name][: len(gradient)].lerp_(gradient, 1 - self.beta1)
            square = self.squares[name][: len(gradient)].mul_(self.beta2)
            square.addcmul_(gradient, gradient, value=1 - self.beta2)
            parameter.mul_(1 - lr * self.settings.weight_decay)
            parameter.addcdiv_(mean, square.sqrt().div_(square_bias**0.5).add_(self.epsilon), value=-lr / mean_bias)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": _SGD, "adamw": _AdamW}
