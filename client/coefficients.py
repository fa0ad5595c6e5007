"""Heads in coefficient form: products of the features with each other, and of coefficients with all rows at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhead.client.labelled_features import Cohort, LabelledFeatures, SiteRows
from fedhead.client.minibatches import columns_of, orders
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

    def __init__(self, incoming: Mapping[str, Tensor], data: LabelledFeatures, sites: Cohort) -> None:
        self.weight, self.bias = incoming["weight"], incoming["bias"]
        self.data = data
        self.pending = False
        self.first, end = sites.span
        self.size = end - self.first
        self.chosen: IntArray | None = None
        if _DENSE * len(sites.rows) < self.size:
            self.chosen = sites.distinct
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
        """Return `[size, C]`, the outputs of the incoming head for every row."""
        if self._logits is None:
            weight = self.weight
            self._logits = weight.new_empty(self.size, len(weight))
            shift = self.bias
            if self._folded and self._mean is not None and self._scale is not None:
                weight = weight / self._scale
                shift = shift - weight @ self._mean
            for part, features in self._blocks():
                torch.add(_rows_times(features, weight), shift, out=self._logits[part])
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

    def evaluate(self, data: LabelledFeatures, sites: Cohort) -> Evaluation:
        """Evaluate the incoming head at each site, as `evaluate_head` does."""
        rows, owner = sites.rows, sites.owners
        if not len(rows):
            nothing = np.zeros(len(sites))
            return Evaluation(nothing, nothing.copy(), sites.sizes, np.zeros((len(sites), 0)))
        logits = self.logits().index_select(0, self.places(rows))
        targets = data.targets(torch.from_numpy(rows), logits)
        losses = data.loss.values(logits, targets).cpu().numpy()
        scores = data.loss.score(logits, targets).cpu().numpy()
        return Evaluation(
            losses=np.bincount(owner, weights=losses, minlength=len(sites)).astype(np.float64),
            scores=np.bincount(owner, weights=scores, minlength=len(sites)).astype(np.float64),
            rows=sites.sizes,
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
    """Heads of `k` sites as `anchor * W0 + values X`, with the bias as the weight of one more feature, which is 1.

    Attributes:
        places: `[k, n]`, the table positions of their rows.
        values: `[k, C, n]`, 0 beyond a site's own rows.
        anchor: `[k]`, the factor `a` of the incoming head.
        bias: `[k, C]`, the heads' bias.
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
        # The bias is the sum of all values: it is finite only if they all are, but it may also overflow.
        finite = self.bias.isfinite().all(1)
        if bool(finite.all()):
            return finite
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
    """Return `[k, n, n]`, the products of each site's rows with each other; 0 beyond a site's own rows.

    Rows have one more feature, which is 1.
    """
    cohort = data.cohorts.of(sites)
    rows = cohort.table
    count, width = rows.shape
    gram = like.new_empty(count, width, width)
    step = max(1, BLOCK_BYTES // (width * data.width * like.element_size()))
    for start in range(0, count, step):
        features, _ = data.gather(rows[start : start + step], like)
        torch.matmul(features, features.mT, out=gram[start : start + step])
    gram += 1
    if cohort.sizes.min(initial=width) < width:
        own = torch.from_numpy(np.arange(width) < cohort.sizes[:, None]).to(like.device)
        gram.mul_(own[:, None, :]).mul_(own[:, :, None])
    return gram


def train_coefficients(
    table: RowTable,
    gram: Tensor,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Cohort,
    settings: LocalConfig,
    seed: int,
    round_number: int,
    min_batch: int,
) -> Coefficients:
    """Train at sites sorted by descending number of rows."""
    like, classes = incoming["weight"], len(incoming["weight"])
    count, width = sites.table.shape
    places = table.places(sites.table)
    parameters = {"values": like.new_zeros(count, classes, width), "anchor": like.new_ones(count, 1, 1)}
    step = _Step(incoming, settings)
    labels_of = data.targets(torch.from_numpy(sites.table.ravel()), like)
    flat_gram = gram.view(count * width, width)
    offsets = torch.arange(0, count * width, width, device=like.device)[:, None]
    batches = [
        (batch, torch.from_numpy(batch.weights * step.factor).to(like))
        for batch in columns_of(sites.sizes, settings.batch_size, min_batch)
    ]
    losses = like.new_zeros(count, width)
    for epoch in range(settings.epochs):
        order = torch.from_numpy(orders(seed, sites, round_number, np.array([epoch]))).to(like.device)
        drawn = (order + offsets).view(-1)
        near = flat_gram.index_select(0, drawn).view(count, width, width)
        first = table.logits().index_select(0, places.view(-1).index_select(0, drawn)).view(count, width, classes)
        labels = labels_of.index_select(0, drawn).view(count, width, *labels_of.shape[1:])
        for batch, weights in batches:
            active, columns = slice(batch.count), slice(batch.start, batch.stop)
            own = {name: value[active] for name, value in parameters.items()}
            incoming_logits = first[active, columns].mT
            if not step.plain:
                incoming_logits = incoming_logits * own["anchor"]
            logits = incoming_logits
            # The first minibatch meets the incoming head.
            if epoch or batch.start:
                logits = torch.baddbmm(incoming_logits, own["values"], near[active, columns].mT)
            losses[active, columns], slopes = data.loss.slopes(logits, labels[active, columns])
            step(own, slopes.mul_(weights), order[active, None, columns].expand(-1, classes, -1))
    valid = torch.from_numpy(np.arange(width) < sites.sizes[:, None]).to(like.device)
    sizes = torch.from_numpy(sites.sizes).to(like.device)
    return Coefficients(
        places=places,
        values=parameters["values"],
        anchor=parameters["anchor"].view(-1),
        bias=parameters["anchor"].view(-1, 1) * incoming["bias"] + parameters["values"].sum(2),
        losses=(losses.where(valid, 0).sum(1) / sizes).cpu().double().numpy(),
        rows=sites.sizes,
    )


class _Step:
    """A step of gradient descent on coefficients, in place.

    Attributes:
        plain: whether only the gradient counts, so that the anchor stays 1.
        factor: by which the derivatives are multiplied before a step.
    """

    def __init__(self, incoming: Mapping[str, Tensor], settings: LocalConfig) -> None:
        like = incoming["weight"]
        self.plain = not (settings.momentum or settings.weight_decay or settings.proximal_mu)
        self.factor = -settings.lr if self.plain else 1.0
        self._settings = settings
        self._start = {"values": like.new_zeros(()), "anchor": like.new_ones(())}
        self._optimizer = OPTIMIZERS[settings.optimizer](settings)

    def __call__(self, parameters: Mapping[str, Tensor], slopes: Tensor, index: Tensor) -> None:
        """Update the parameters of `k` sites.

        Args:
            parameters: `values` `[k, C, n]` and `anchor`.
            slopes: `[k, C, b]`, the derivatives of the loss by the logits of a batch, times `factor`.
            index: `[k, C, b]`, the rows of the batch.
        """
        settings = self._settings
        if self.plain:
            parameters["values"].scatter_add_(2, index, slopes)
            return
        gradients = {
            "values": torch.zeros_like(parameters["values"]).scatter_add_(2, index, slopes),
            "anchor": torch.zeros_like(parameters["anchor"]),
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
