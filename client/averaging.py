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

from fedhead.client.coefficients import Coefficients, RowTable, exact_type, gram_of, pays, train_coefficients
from fedhead.client.labelled_features import Cohort, LabelledFeatures, SiteRows
from fedhead.client.training import CHUNK_BYTES, Evaluation, FloatArray, IntArray, chunks, evaluate_head, train_chunk
from fedhead.config import LocalConfig
from fedhead.data import BoolArray
from fedhead.heads import Head

COEFFICIENT_BYTES = 16 * 2**20
"""Memory for the products `K` of the sites that are trained together."""


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
        training, evaluating = data.cohorts.of(sites), data.cohorts.of(held_out)
        table = RowTable(incoming, data, training.with_others(evaluating))
        evaluation = table.evaluate(data, evaluating)
        mean = _Mean(incoming, len(sites), evaluation)
        stepped = _step_coefficients(
            table, incoming, data, training, settings, mean, seed, round_number, repeated, min_batch
        )
        rest = np.concatenate([everyone[:0], *stepped])
        if not mean.finish(table):
            # One broken row spoils a product over all rows; trained alone, only its own site is excluded.
            mean, rest = _Mean(incoming, len(sites), evaluation), everyone
    else:
        evaluation = evaluate_head(head, incoming, data, held_out, chunk_bytes=chunk_bytes)
        mean, rest = _Mean(incoming, len(sites), evaluation), everyone
    sizes = np.array([len(sites[i].rows) for i in rest.tolist()], dtype=np.int64)
    for chosen in chunks(sizes, settings, incoming, chunk_bytes, head.together):
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
        self.total = {name: torch.zeros_like(value, dtype=exact_type(value)) for name, value in incoming.items()}
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

    def add_coefficients(self, positions: IntArray, sites: Coefficients, table: RowTable) -> None:
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

    def finish(self, table: RowTable) -> bool:
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


def _step_coefficients(
    table: RowTable,
    incoming: Mapping[str, Tensor],
    data: LabelledFeatures,
    sites: Cohort,
    settings: LocalConfig,
    mean: _Mean,
    seed: int,
    round_number: int,
    repeated: bool,
    min_batch: int,
) -> Iterator[IntArray]:
    """Train in coefficient form if that is faster, and add the heads to `mean`; yield the positions of other sites."""
    sizes, order = sites.sizes, sites.by_size
    room, start = data.grams.max_bytes, 0
    make_gram = partial(gram_of, data, like=incoming["weight"])
    itemsize = incoming["weight"].element_size()
    while start < len(order):
        largest = int(sizes[order[start]])
        if largest == 0:
            yield order[start:]
            return
        # K is padded to the largest site's rows: a chunk ends where padding would more than double it.
        alike = int(np.count_nonzero(2 * sizes[order] ** 2 >= largest**2))
        together = max(1, COEFFICIENT_BYTES // (largest**2 * itemsize))
        stop = min(start + together, alike)
        positions, part = order[start:stop], (start, stop)
        start = stop
        needed = len(positions) * largest**2 * itemsize
        if needed > room or not pays(largest, incoming["weight"], settings, repeated=repeated):
            yield positions
            continue
        room -= needed
        chunk = sites.part(*part)
        gram = data.grams.get(chunk, make_gram)
        trained = train_coefficients(table, gram, incoming, data, chunk, settings, seed, round_number, min_batch)
        mean.add_coefficients(positions, trained, table)
