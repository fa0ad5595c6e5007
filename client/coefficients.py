"""Heads in coefficient form: products of the features with each other, and of coefficients with all rows at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhead.client.labelled_features import LabelledFeatures, SiteRows, sizes_of
from fedhead.client.minibatches import batches, table_of
from fedhead.client.optimizers import OPTIMIZERS
from fedhead.client.training import Evaluation, FloatArray, IntArray
from fedhead.config import LocalConfig

BLOCK_BYTES = 8 * 2**20
"""Size of the blocks of features in a product."""

_DENSE = 3
"""Largest ratio of all rows to needed rows for which all rows are multiplied in place instead of copying some."""

_REPEATS = 20
"""Expected number of rounds that reuse the products `K` if the same sites take part in every round."""

_FAR = 32.0
"""Ratio of mean to deviation above which features are centred before multiplication instead of correcting products."""

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class RowTable:
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

    def add(self, sites: "Coefficients", weights: Tensor) -> None:
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
        total = torch.zeros_like(self.weight, dtype=exact_type(self.weight))
        for part, features in self._blocks():
            total += _rows_times(self._coefficients[:, part], features.T)
        if self._folded and self._mean is not None and self._scale is not None:
            sums = self._coefficients.sum(1, dtype=total.dtype)
            total = (total - torch.outer(sums, self._mean.to(total))) / self._scale.to(total)
        return total

    def evaluate(self, incoming: Mapping[str, Tensor], data: LabelledFeatures, sites: Sequence[SiteRows]) -> Evaluation:
        """Evaluate a head at each site, as `evaluate_head` does."""
        sizes = sizes_of(sites)
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
            curves=np.zeros((len(sites), 0)),
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
class Coefficients:
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


def pays(rows: int, weight: Tensor, settings: LocalConfig, *, repeated: bool) -> bool:
    """Return whether computing products `K` for sites of `rows` rows saves multiplications."""
    classes, width = weight.shape
    if rows >= width:
        return False
    direct = settings.epochs * 2 * rows * width * classes
    repeats = _REPEATS if repeated else 1
    coefficients = 2 * rows * width * classes + settings.epochs * rows**2 * classes + rows**2 * width / repeats
    # At equal counts, products over all sites' rows are faster than one product per site.
    return coefficients < (1.25 if repeated else 1.0) * direct


def gram_of(data: LabelledFeatures, sites: Sequence[SiteRows], *, like: Tensor) -> Tensor:
    """Return `[k, n, n]`, the products of each site's rows with each other; 0 beyond a site's own rows."""
    rows = table_of(sites)
    count, width = rows.shape
    gram = like.new_empty(count, width, width)
    step = max(1, BLOCK_BYTES // (width * data.width * like.element_size()))
    for start in range(0, count, step):
        features, _ = data.gather(rows[start : start + step], like)
        gram[start : start + step] = features @ features.mT
    own = torch.from_numpy(np.arange(width) < sizes_of(sites)[:, None]).to(like.device)
    return gram.mul_(own[:, None, :]).mul_(own[:, :, None])


def train_coefficients(
    table: RowTable,
    gram: Tensor,
    rows: IntArray,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Sequence[SiteRows],
    settings: LocalConfig,
    seed: int,
    round_number: int,
    min_batch: int,
) -> Coefficients:
    """Train at sites sorted by descending number of rows."""
    like, classes = incoming["weight"], len(incoming["weight"])
    count, width = rows.shape
    places = table.places(rows)
    parameters = {
        "values": like.new_zeros(count, classes, width),
        "anchor": like.new_ones(count, 1, 1),
        "bias": incoming["bias"].repeat(count, 1),
    }
    step = _Step(incoming, settings)
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
        own = {name: value[:active] for name, value in parameters.items()}
        near = flat_gram.index_select(0, chosen).view(*index.shape, width)
        first = logits_of.index_select(0, chosen).view(*index.shape, classes)
        first = first if step.plain else first * own["anchor"]
        logits = torch.baddbmm((first + own["bias"][:, None, :]).mT, own["values"], near.mT)
        labels = labels_of.index_select(0, chosen).view(*index.shape, *labels_of.shape[1:])
        slope_values, slopes = data.loss.slopes(logits, labels)
        slopes *= weights.unsqueeze(-2)
        losses[:active] += share * (slope_values * weights).sum(-1)
        step(own, slopes, index[:, None, :].expand(-1, classes, -1))
    return Coefficients(
        places=places,
        values=parameters["values"],
        anchor=parameters["anchor"].view(-1),
        bias=parameters["bias"],
        losses=losses.cpu().double().numpy(),
        rows=sizes_of(sites),
    )


class _Step:
    """A step of gradient descent on coefficients, in place.

    Attributes:
        plain: whether only the gradient counts, so that the anchor stays 1.
    """

    def __init__(self, incoming: Mapping[str, Tensor], settings: LocalConfig) -> None:
        like = incoming["weight"]
        self.plain = not (settings.momentum or settings.weight_decay or settings.proximal_mu)
        self._settings = settings
        self._start = {"values": like.new_zeros(()), "anchor": like.new_ones(()), "bias": incoming["bias"]}
        self._optimizer = OPTIMIZERS[settings.optimizer](settings)

    def __call__(self, parameters: Mapping[str, Tensor], slopes: Tensor, index: Tensor) -> None:
        """Update the parameters of `k` sites.

        Args:
            parameters: `values` `[k, C, n]`, `anchor` and `bias`.
            slopes: `[k, C, b]`, the derivatives of the loss by the logits of a batch; overwritten.
            index: `[k, C, b]`, the rows of the batch.
        """
        settings = self._settings
        if self.plain:
            bias = parameters["bias"]
            bias -= settings.lr * slopes.sum(-1)
            parameters["values"].scatter_add_(2, index, slopes.mul_(-settings.lr))
            return
        gradients = {
            "values": torch.zeros_like(parameters["values"]).scatter_add_(2, index, slopes),
            "anchor": torch.zeros_like(parameters["anchor"]),
            "bias": slopes.sum(-1),
        }
        for name, value in parameters.items():
            gradients[name] += settings.proximal_mu * (value - self._start[name])
        self._optimizer.step(parameters, gradients)


def _rows_times(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right.T`, faster if one of them has few rows.

    oneDNN has kernels for such shapes; MKL, the default in torch, takes two to three times as long on an EPYC. They
    need contiguous rows or columns: for other strides oneDNN is hundreds of times slower.
    """
    if _ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return left @ right.T


def exact_type(value: Tensor) -> torch.dtype:
    """Return float64 if the device supports it, else float32."""
    return torch.float32 if value.device.type == "mps" else torch.float64
