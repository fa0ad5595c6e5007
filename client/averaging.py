"""The weighted mean of S sites' heads, computed without the individual heads if that is faster.

An averaging strategy needs only one head from a round. For a linear head, gradient descent stays in the span of the
features: `W = a W0 + A^T X`, with a number `a` and a site's coefficients `A` `[n, C]`. Given `K = X X^T`, a local step
needs only products of `K` and `A`, and the mean of all sites' heads is one product over all rows. This is exact for
momentum, weight decay and the proximal term, which are linear in the head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedhead.client.training import (
    CHUNK_BYTES,
    OPTIMIZERS,
    Evaluation,
    FloatArray,
    IntArray,
    LabelledFeatures,
    SiteRows,
    batches,
    chunks,
    evaluate_head,
    table_of,
    train_chunk,
)
from fedhead.config import LocalConfig
from fedhead.data import BoolArray
from fedhead.heads import Head

BLOCK_BYTES = 8 * 2**20
"""Size of the blocks of features in a product."""

COEFFICIENT_BYTES = 16 * 2**20
"""Memory for the products `K` of the sites that are trained together."""

_DENSE = 3
"""Largest ratio of all rows to needed rows for which all rows are multiplied in place instead of copying some."""

_REPEATS = 20
"""Expected number of rounds that reuse the products `K` if the same sites take part in every round."""

_FAR = 32.0
"""Ratio of mean to deviation above which features are centred before multiplication instead of correcting products."""

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class AveragedHeads:
    """The average of heads trained at S sites from the incoming head.

    Attributes:
        parameters: by name, the mean over `usable` sites weighted by their rows; the incoming head without rows.
        usable: `[S]`, whether a site's head and losses are finite, on held-out rows too.
        losses: `[S]`, mean loss of the rows in the last epoch, each at the time of its batch; 0 without rows.
        rows: `[S]`, the number of training rows.
    """

    parameters: dict[str, Tensor]
    usable: BoolArray
    losses: FloatArray
    rows: IntArray


def average_heads(
    head: Head,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    held_out: Sequence[SiteRows] = (),
    *,
    seed: int,
    round_number: int,
    repeated: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    min_batch: int = 1,
) -> tuple[AveragedHeads, Evaluation]:
    """Train one copy of `incoming` at each site and average them; evaluate `incoming` on other rows of the sites.

    The results equal those of `fedhead.client.training.train_heads` and `evaluate_head`, computed in the form that is
    faster for the given shapes.

    Args:
        head: see `fedhead.client.training.train_in_chunks`.
        incoming: as in `train_in_chunks`.
        data: as in `train_in_chunks`.
        sites: as in `train_in_chunks`.
        settings: as in `train_in_chunks`.
        held_out: the rows for evaluation, for the same number of sites.
        seed: as in `train_in_chunks`.
        round_number: as in `train_in_chunks`.
        repeated: whether the same sites are trained together in every round.
        chunk_bytes: as in `train_in_chunks`.
        min_batch: as in `train_in_chunks`.
    """
    data.grams.under(data.standardisation)
    everyone = np.arange(len(sites))
    if head.averages_in_coefficients and settings.optimizer == "sgd":
        table = _RowTable(incoming, data, [*sites, *held_out])
        evaluation = table.evaluate(incoming, data, held_out)
        mean = _Mean(incoming, len(sites), evaluation)
        stepped = _step_coefficients(
            table, incoming, data, sites, settings, mean, seed, round_number, repeated, min_batch
        )
        rest = np.concatenate([everyone[:0], *stepped])
        if not mean.finish(table):
            # One broken row spoils a product over all rows; trained alone, only its own site is excluded.
            mean, rest = _Mean(incoming, len(sites), evaluation), everyone
    else:
        evaluation = evaluate_head(head, incoming, data, held_out, chunk_bytes=chunk_bytes)
        mean, rest = _Mean(incoming, len(sites), evaluation), everyone
    sizes = np.array([len(sites[i].rows) for i in rest], dtype=np.int64)
    for chosen in chunks(sizes, settings, incoming, chunk_bytes):
        positions = rest[chosen]
        trained = train_chunk(
            head, incoming, data, [sites[i] for i in positions], settings, seed, round_number, min_batch
        )
        mean.add(positions, trained.parameters, trained.losses, trained.rows)
    return mean.result(), evaluation


class _Mean:
    """The sum of trained heads, weighted by rows, in float64."""

    def __init__(self, incoming: Mapping[str, Tensor], count: int, evaluation: Evaluation) -> None:
        self.incoming = incoming
        self.evaluated = np.isfinite(evaluation.losses) if len(evaluation.losses) else np.ones(count, dtype=np.bool_)
        self.total = {name: torch.zeros_like(value, dtype=_exact(value)) for name, value in incoming.items()}
        self.usable = np.ones(count, dtype=np.bool_)
        self.losses, self.rows = np.zeros(count), np.zeros(count, dtype=np.int64)

    def add(self, positions: IntArray, parameters: Mapping[str, Tensor], losses: FloatArray, rows: IntArray) -> None:
        """Add heads `[k, ...]`, excluding those that are not finite."""
        finite = torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in parameters.values()]).all(0)
        finite &= self._note(positions, finite, losses, rows)
        weights = torch.from_numpy(rows).to(finite.device) * finite
        for name, value in parameters.items():
            flat = value.reshape(len(value), -1)
            if not bool(finite.all()):
                flat = flat.where(finite[:, None], 0)
            exact = self.total[name]
            exact += (weights.to(exact) @ flat.to(exact)).view_as(exact)

    def add_coefficients(self, positions: IntArray, sites: "_Coefficients", table: "_RowTable") -> None:
        """Add heads in coefficient form; `finish` multiplies them with the features."""
        finite = sites.finite()
        finite &= self._note(positions, finite, sites.losses, sites.rows)
        weights = torch.from_numpy(sites.rows).to(finite.device) * finite
        table.add(sites, weights)
        weight, bias = self.total["weight"], self.total["bias"]
        weight += float(weights.to(weight) @ sites.anchor.to(weight)) * self.incoming["weight"].to(weight)
        bias += weights.to(bias) @ sites.bias.where(finite[:, None], 0).to(bias)

    def _note(self, positions: IntArray, finite: Tensor, losses: FloatArray, rows: IntArray) -> Tensor:
        """Record the results of sites; return `[k]`, whether each is usable."""
        self.losses[positions], self.rows[positions] = losses, rows
        usable = finite.cpu().numpy() & np.isfinite(losses) & self.evaluated[positions]
        self.usable[positions] = usable
        return torch.from_numpy(usable).to(finite.device)

    def finish(self, table: "_RowTable") -> bool:
        """Add the products of coefficients and features; return False if the result is not finite."""
        if table.pending:
            self.total["weight"] += table.products()
        return all(bool(value.isfinite().all()) for value in self.total.values())

    def result(self) -> AveragedHeads:
        """Return the mean and the sites' results."""
        examples = int(self.rows[self.usable].sum())
        parameters = {
            name: (value / examples).to(self.incoming[name]) if examples else self.incoming[name].clone()
            for name, value in self.total.items()
        }
        return AveragedHeads(parameters, self.usable, self.losses, self.rows)


class _RowTable:
    """Products with the features of all rows in a round, in one pass over the features each.

    Rows that are close together are multiplied in place, possibly in a memory map, without gathering them.
    Standardisation is applied to the other factor or to the products, not to the features.

    Args:
        incoming: the linear head for the first products with the features.
        data: the features.
        sites: the sites whose rows are needed.
    """

    def __init__(self, incoming: Mapping[str, Tensor], data: LabelledFeatures, sites: Sequence[SiteRows]) -> None:
        self.weight = incoming["weight"]
        self.data = data
        self.pending = False
        wanted = np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in sites)])
        self.first = int(wanted.min(initial=0)) if len(wanted) else 0
        self.size = int(wanted.max()) + 1 - self.first if len(wanted) else 0
        self.chosen: IntArray | None = None
        if _DENSE * len(wanted) < self.size:
            self.chosen = np.unique(wanted)
            self.size = len(self.chosen)
        self._mean, self._scale = (None, None)
        self._folded = False
        if data.standardisation is not None:
            mean, scale = (value.to(self.weight) for value in data.standardisation)
            self._mean, self._scale = mean, scale
            self._folded = bool((mean.abs() <= _FAR * scale).all())
        self._logits: Tensor | None = None
        self._coefficients: Tensor | None = None

    def places(self, rows: IntArray) -> Tensor:
        """Return the table positions of rows `[...]`."""
        found = rows - self.first if self.chosen is None else np.searchsorted(self.chosen, rows)
        return torch.from_numpy(found).to(self.weight.device)

    def logits(self) -> Tensor:
        """Return `[size, C]`, the products of the incoming weight with every row."""
        if self._logits is None:
            weight = self.weight
            self._logits = weight.new_empty(self.size, len(weight))
            shift = None
            if self._folded and self._mean is not None and self._scale is not None:
                weight = weight / self._scale
                shift = weight @ self._mean
            for part, features in self._blocks():
                self._logits[part] = _rows_times(features, weight)
            if shift is not None:
                self._logits -= shift
        return self._logits

    def add(self, sites: "_Coefficients", weights: Tensor) -> None:
        """Add coefficients times `weights` `[k]` to those of their rows."""
        if self._coefficients is None:
            self._coefficients = self.weight.new_zeros(len(self.weight), self.size)
        self.pending = True
        values = sites.values * weights.to(sites.values)[:, None, None]
        if not bool(weights.all()):
            values = values.where(weights[:, None, None] > 0, 0)
        # Shorter sites are padded with their first row and coefficients of 0.
        self._coefficients.index_add_(1, sites.places.reshape(-1), values.transpose(0, 1).reshape(len(self.weight), -1))

    def products(self) -> Tensor:
        """Return `[C, d]`, the products of all added coefficients with the features."""
        assert self._coefficients is not None
        total = torch.zeros_like(self.weight, dtype=_exact(self.weight))
        for part, features in self._blocks():
            total += _rows_times(self._coefficients[:, part], features.T)
        if self._folded and self._mean is not None and self._scale is not None:
            sums = self._coefficients.sum(1, dtype=total.dtype)
            total = (total - torch.outer(sums, self._mean.to(total))) / self._scale.to(total)
        return total

    def evaluate(self, incoming: Mapping[str, Tensor], data: LabelledFeatures, sites: Sequence[SiteRows]) -> Evaluation:
        """Evaluate a head at each site, as `evaluate_head` does."""
        sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
        rows = np.concatenate([np.empty(0, dtype=np.int64), *(site.rows for site in sites)])
        owner = np.repeat(np.arange(len(sites)), sizes)
        logits = self.logits()[self.places(rows)] + incoming["bias"]
        targets = data.targets(torch.from_numpy(rows), logits)
        losses = data.loss.values(logits, targets).cpu().numpy()
        scores = data.loss.score(logits, targets).cpu().numpy()
        return Evaluation(
            losses=np.bincount(owner, weights=losses, minlength=len(sites)).astype(np.float64),
            scores=np.bincount(owner, weights=scores, minlength=len(sites)).astype(np.float64),
            rows=sizes,
        )

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        width = self.data.width
        step = max(1, BLOCK_BYTES // (width * self.weight.element_size()))
        for start in range(0, self.size, step):
            part = slice(start, min(start + step, self.size))
            if self.chosen is None:
                features = self.data.features[self.first + part.start : self.first + part.stop]
            else:
                chosen = torch.from_numpy(self.chosen[part]).to(self.data.features.device)
                features = self.data.features.index_select(0, chosen)
            features = self.data.mapped(features.to(self.weight)).contiguous()
            if self._mean is not None and self._scale is not None and not self._folded:
                features = (features - self._mean).div_(self._scale)
            yield part, features


@dataclass(frozen=True)
class _Coefficients:
    """Heads of `k` sites as `anchor * W0 + values X`.

    Attributes:
        places: `[k, n]`, the table positions of their rows.
        values: `[k, C, n]`, 0 beyond a site's own rows.
        anchor: `[k]`, the factor `a` of the incoming weight.
        bias: `[k, C]`.
        losses: `[k]`, the mean loss in the last epoch.
        rows: `[k]`, the number of rows.
    """

    places: Tensor
    values: Tensor
    anchor: Tensor
    bias: Tensor
    losses: FloatArray
    rows: IntArray

    def finite(self) -> Tensor:
        """Return `[k]`, whether all values of a site are finite."""
        # Checking a sum takes a tenth of the time; it is finite only if all terms are, but it may also overflow.
        sums = self.values.sum((1, 2)) + self.bias.sum(1)
        if bool(sums.isfinite().all()):
            return torch.ones_like(sums, dtype=torch.bool)
        return self.values.reshape(len(self.values), -1).isfinite().all(1) & self.bias.isfinite().all(1)


def _step_coefficients(
    table: _RowTable,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    mean: _Mean,
    seed: int,
    round_number: int,
    repeated: bool,
    min_batch: int,
) -> Iterator[IntArray]:
    """Train in coefficient form if that is faster, and add the heads to `mean`; yield the positions of other sites."""
    sizes = np.array([len(site.rows) for site in sites], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    room, start = data.grams.max_bytes, 0
    make_gram = partial(_gram, data, like=incoming["weight"])
    itemsize = incoming["weight"].element_size()
    while start < len(order):
        largest = int(sizes[order[start]])
        if largest == 0:
            yield order[start:]
            return
        # K is padded to the largest site's rows: a chunk ends where padding would more than double it.
        alike = int(np.count_nonzero(2 * sizes[order] ** 2 >= largest**2))
        together = max(1, COEFFICIENT_BYTES // (largest**2 * itemsize))
        positions = order[start : min(start + together, alike)]
        start += len(positions)
        chunk = [sites[i] for i in positions.tolist()]
        needed = len(chunk) * largest**2 * itemsize
        if needed > room or not _pays(largest, incoming["weight"], settings, repeated=repeated):
            yield positions
            continue
        room -= needed
        rows = table_of(chunk)
        gram = data.grams.get(chunk, make_gram)
        mean.add_coefficients(
            positions,
            _train_coefficients(table, gram, rows, incoming, data, chunk, settings, seed, round_number, min_batch),
            table,
        )


def _pays(rows: int, weight: Tensor, settings: LocalConfig, *, repeated: bool) -> bool:
    """Return whether computing products `K` for sites of `rows` rows saves multiplications."""
    classes, width = weight.shape
    if rows >= width:
        return False
    direct = settings.epochs * 2 * rows * width * classes
    repeats = _REPEATS if repeated else 1
    coefficients = 2 * rows * width * classes + settings.epochs * rows**2 * classes + rows**2 * width / repeats
    # At equal counts, products over all sites' rows are faster than one product per site.
    return coefficients < (1.25 if repeated else 1.0) * direct


def _gram(data: LabelledFeatures, sites: Sequence[SiteRows], *, like: Tensor) -> Tensor:
    """Return `[k, n, n]`, the products of each site's rows with each other; 0 beyond a site's own rows."""
    rows = table_of(sites)
    count, width = rows.shape
    gram = like.new_empty(count, width, width)
    step = max(1, BLOCK_BYTES // (width * data.width * like.element_size()))
    for start in range(0, count, step):
        features, _ = data.gather(rows[start : start + step], like)
        gram[start : start + step] = features @ features.mT
    own = torch.from_numpy(np.arange(width) < np.array([len(site.rows) for site in sites])[:, None]).to(like.device)
    return gram.mul_(own[:, None, :]).mul_(own[:, :, None])


def _train_coefficients(
    table: _RowTable,
    gram: Tensor,
    rows: IntArray,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    seed: int,
    round_number: int,
    min_batch: int,
) -> _Coefficients:
    """Train at sites sorted by descending number of rows."""
    like, classes = incoming["weight"], len(incoming["weight"])
    count, width = rows.shape
    places = table.places(rows)
    parameters = {
        "values": like.new_zeros(count, classes, width),
        "anchor": like.new_ones(count, 1, 1),
        "bias": incoming["bias"].repeat(count, 1),
    }
    start = {"values": like.new_zeros(()), "anchor": like.new_ones(()), "bias": incoming["bias"]}
    optimizer = OPTIMIZERS[settings.optimizer](settings)
    plain = not (settings.momentum or settings.weight_decay or settings.proximal_mu)
    losses = like.new_zeros(count)
    logits_of = table.logits().index_select(0, places.reshape(-1))
    labels_of = data.targets(torch.from_numpy(rows.ravel()), like)
    flat_gram = gram.view(count * width, width)
    offsets = np.arange(count)[:, None] * width
    for batch in batches(sites, settings, seed, round_number, min_batch):
        active = len(batch.places)
        index = torch.from_numpy(batch.places).to(like.device)
        chosen = torch.from_numpy((batch.places + offsets[:active]).reshape(-1)).to(like.device)
        weights, share = (torch.from_numpy(value).to(like) for value in (batch.weights, batch.share))
        values, anchor, bias = (parameters[name][:active] for name in ("values", "anchor", "bias"))
        near = flat_gram.index_select(0, chosen).view(*index.shape, width)
        first = logits_of.index_select(0, chosen).view(*index.shape, classes)
        first = first if plain else first * anchor
        logits = torch.baddbmm((first + bias[:, None, :]).mT, values, near.mT)
        labels = labels_of.index_select(0, chosen).view(*index.shape, *labels_of.shape[1:])
        slope_values, slopes = data.loss.slopes(logits, labels)
        slopes *= weights.unsqueeze(-2)
        losses[:active] += share * (slope_values * weights).sum(-1)
        wide = index[:, None, :].expand(-1, classes, -1)
        if plain:
            bias -= settings.lr * slopes.sum(-1)
            values.scatter_add_(2, wide, slopes.mul_(-settings.lr))
            continue
        gradients = {
            "values": torch.zeros_like(values).scatter_add_(2, wide, slopes),
            "anchor": torch.zeros_like(anchor),
            "bias": slopes.sum(-1),
        }
        for name, value in (("values", values), ("anchor", anchor), ("bias", bias)):
            gradients[name] += settings.proximal_mu * (value - start[name])
        optimizer.step({"values": values, "anchor": anchor, "bias": bias}, gradients)
    return _Coefficients(
        places=places,
        values=parameters["values"],
        anchor=parameters["anchor"].view(-1),
        bias=parameters["bias"],
        losses=losses.cpu().double().numpy(),
        rows=np.array([len(site.rows) for site in sites], dtype=np.int64),
    )


def _rows_times(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right.T`, faster if one of them has few rows.

    oneDNN has kernels for such shapes; MKL, the default in torch, takes two to three times as long on an EPYC. They
    need contiguous rows or columns: for other strides oneDNN is hundreds of times slower.
    """
    if _ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return left @ right.T


def _exact(value: Tensor) -> torch.dtype:
    """Return float64 if the device supports it, else float32."""
    return torch.float32 if value.device.type == "mps" else torch.float64
