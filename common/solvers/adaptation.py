"""Adaptation of a solved head to rows without labels: to their class shares, to their moments, and by soft labels.

It needs the sums of others' labelled rows, and takes place where the rows are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedhead.heads import LinearHead
from fedhead.solvers.starting import PooledSolutions
from fedhead.sums.features import FeatureStatistics

PLAIN = "plain"
METHODS = (
    *(PLAIN, "shares", "mean", "mean+shares", "moments", "soft labels", "mean+soft labels"),
    *("bbse", "mean+bbse"),
)
"""Names of the adaptations; the first one is none."""

SolverName = Literal["lda", "lda-gcv", "ridge", "nearest-mean"]

_SOFT_ROUNDS = 3
_SHARE_ROUNDS = 100
_UNMIXING_ROUNDS = 1000
_LEAST_SHARE = 1e-6
_CONFUSED_ROWS = 50_000
"""Drawn rows of all classes together, of which a confusion matrix is computed."""


@dataclass(frozen=True)
class Solver:
    """How a linear head is solved from sums.

    Attributes:
        name: the solver.
        flags: the positions of each feature that may be missing and of its flag; see `fedhead.solvers.filling`.
    """

    name: SolverName = "lda"
    flags: Sequence[tuple[int, int]] = ()

    def __call__(self, stats: FeatureStatistics) -> LinearHead:
        """Return the float64 head.

        Raises:
            UserError: if the sums do not determine it.
        """
        return LinearHead.from_weights(*PooledSolutions(stats, flags=self.flags).affine(self.name))


@torch.no_grad()
def adapted_heads(
    pooled: FeatureStatistics, features: Tensor, solve: Solver, temperature: float = 1.0
) -> dict[str, LinearHead]:
    """Return the head of each of `METHODS`, float64.

    Args:
        pooled: sums over labelled rows of other sites.
        features: `[n, d]`, the rows without labels, at least one.
        solve: solves a head from sums.
        temperature: the divisor of the plain head's logits at which its probabilities are calibrated.

    Raises:
        UserError: if the sums do not determine a head.
        ValueError: if the shapes do not fit, or there are no rows.
    """
    if features.ndim != 2 or features.shape[1] != pooled.num_features or not len(features):
        raise ValueError(f"Features must be [n, {pooled.num_features}], not {list(features.shape)}.")
    rows = features.double()
    plain, shares = solve(pooled), class_shares(pooled)
    offset = rows.mean(0) - pooled.mean()
    centred = moved(plain, offset)

    def under_own_shares(head: LinearHead) -> LinearHead:
        return with_shares(head, temperature, shares, estimated_shares(head(rows) / temperature, shares))

    confused = confusion(plain, pooled, temperature)

    def under_unmixed_shares(head: LinearHead) -> LinearHead:
        found = unmixed_shares((head(rows) / temperature).softmax(1).mean(0), confused, shares)
        return with_shares(head, temperature, shares, found)

    heads = (
        plain,
        under_own_shares(plain),
        centred,
        under_own_shares(centred),
        aligned(plain, pooled, rows),
        soft_labelled(plain, pooled, rows, solve, temperature),
        moved(soft_labelled(plain, pooled, rows - offset, solve, temperature), offset),
        under_unmixed_shares(plain),
        under_unmixed_shares(centred),
    )
    return dict(zip(METHODS, heads, strict=True))


def class_shares(stats: FeatureStatistics) -> Tensor:
    """Return `[C]`, the share of each class among the labelled rows."""
    return stats.target_totals / max(stats.rows, 1)


def estimated_shares(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the class shares `[C]` of rows without labels, by expectation-maximisation.

    Each row's probabilities are those under the labelled rows' shares; they are reweighted by the ratio of the shares
    until these agree with the mean of the probabilities (Saerens, Latinne & Decaestecker, Neural Computation 2002).

    Args:
        logits: `[n, C]`, calibrated, of at least one row.
        shares: `[C]`, of the labelled rows. A class without any keeps the share 0.
    """
    given = logits.double().softmax(1) * (shares > 0)
    given = given / given.sum(1, keepdim=True).clamp(min=1e-300)
    found = shares
    for _ in range(_SHARE_ROUNDS):
        weighted = given * (found / shares.clamp(min=1e-300))
        found = (weighted / weighted.sum(1, keepdim=True).clamp(min=1e-300)).mean(0)
    return found


def confusion(head: LinearHead, pooled: FeatureStatistics, temperature: float) -> Tensor:
    """Return `[C, C]`, the mean probabilities of each class (rows) over rows of each true class (columns).

    No labelled rows are here, so they are drawn: the logits of a class's rows are normal with the mean and the pooled
    covariance within classes that the sums determine. The draws are the same at every site.

    Args:
        head: a head of logits.
        pooled: sums over labelled rows.
        temperature: the divisor at which the logits are calibrated.
    """
    classes = pooled.num_classes
    counts = pooled.target_totals.clamp(min=1)
    means = head(pooled.origin + pooled.sums / counts[:, None]) / temperature
    within = head.weight @ (pooled.within_scatter() / max(pooled.rows, 1)) @ head.weight.T / temperature**2
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    drawn = max(2, min(1000, _CONFUSED_ROWS // classes))
    deviates = torch.randn(drawn, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (deviates * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.stack([(mean + noise).softmax(1).mean(0) for mean in means], 1)


def unmixed_shares(predicted: Tensor, confused: Tensor, shares: Tensor) -> Tensor:
    """Return the class shares `[C]` of rows without labels whose mean probabilities are a mixture of known ones.

    Black-box shift estimation with soft predictions (Lipton, Wang & Smola, ICML 2018). The inverse of the confusion
    matrix can give shares below 0, so the mixture is the one of least Kullback-Leibler divergence.

    Args:
        predicted: `[C]`, the mean probabilities of the rows.
        confused: `[C, C]`, see `confusion`.
        shares: `[C]`, of the labelled rows. A class without any keeps the share 0.
    """
    found = shares
    for _ in range(_UNMIXING_ROUNDS):
        ratio = predicted / (confused @ found).clamp(min=1e-300)
        found = found * (confused.T @ ratio)
        found = found / found.sum().clamp(min=1e-300)
    return found


def with_shares(head: LinearHead, temperature: float, before: Tensor, after: Tensor) -> LinearHead:
    """Return the head for other class shares, calibrated at the same temperature.

    Args:
        head: a head of logits.
        temperature: the divisor at which they are calibrated.
        before: `[C]`, the shares that the head was solved under.
        after: `[C]`, those to take instead.
    """
    ratio = (after.clamp(min=_LEAST_SHARE) / before.clamp(min=_LEAST_SHARE)).log()
    return LinearHead.from_weights(head.weight, head.bias + temperature * torch.where(before > 0, ratio, 0.0))


def moved(head: LinearHead, offset: Tensor) -> LinearHead:
    """Return the head that has the outputs at `x + offset` `[d]` that `head` has at `x`."""
    return LinearHead.from_weights(head.weight, head.bias - head.weight @ offset)


def aligned(head: LinearHead, pooled: FeatureStatistics, rows: Tensor) -> LinearHead:
    """Return the head behind a map that gives rows without labels the mean and covariance of the labelled ones.

    The covariances are aligned in the space in which that of the labelled rows is the identity (Sun, Feng & Saenko,
    "Return of frustratingly easy domain adaptation", AAAI 2016). There, the other one is shrunk towards a multiple of
    the identity by OAS, because few rows determine it badly.

    Args:
        head: solved from `pooled`.
        pooled: sums over labelled rows.
        rows: `[n, d]` float64, the rows without labels.
    """
    scale, centre = pooled.scale(), rows.mean(0)
    source = pooled.scatter() / (scale.outer(scale) * pooled.rows)
    values, vectors = torch.linalg.eigh(shrunk(source, pooled.rows))
    spread = values.clamp(min=1e-12).sqrt()
    whitened = ((rows - centre) / scale) @ (vectors / spread)
    own, directions = torch.linalg.eigh(shrunk(whitened.T @ whitened / len(rows), len(rows)))
    inverse_root = (directions * own.clamp(min=1e-12).rsqrt()) @ directions.T
    weight = (head.weight * scale) @ (vectors * spread) @ inverse_root @ (vectors / spread).T / scale
    return LinearHead.from_weights(weight, head.bias + head.weight @ pooled.mean() - weight @ centre)


def shrunk(covariance: Tensor, rows: int) -> Tensor:
    """Return a covariance `[d, d]` of some rows shrunk by OAS (Chen, Wiesel, Eldar & Hero, IEEE TSP 2010)."""
    width = len(covariance)
    middle, alpha = covariance.diagonal().mean(), covariance.square().mean()
    above, below = alpha + middle.square(), (rows + 1) * (alpha - middle.square() / width)
    share = 1.0 if float(below) <= 0 else min(float(above / below), 1.0)
    return (1 - share) * covariance + share * middle * torch.eye(width, dtype=covariance.dtype)


def soft_labelled(
    head: LinearHead, pooled: FeatureStatistics, rows: Tensor, solve: Solver, temperature: float
) -> LinearHead:
    """Return the head of labelled rows and of rows whose labels are its own probabilities.

    Labels and head are computed in turn, three times (Nigam, McCallum, Thrun & Mitchell, Machine Learning 2000).
    """
    for _ in range(_SOFT_ROUNDS):
        head = solve(with_soft_labels(pooled, rows, (head(rows) / temperature).softmax(1)))
    return head


def with_soft_labels(pooled: FeatureStatistics, rows: Tensor, weights: Tensor) -> FeatureStatistics:
    """Return sums over labelled rows and rows that belong to every class with a weight; its counts are float64.

    Args:
        pooled: sums over labelled rows.
        rows: `[n, d]` float64.
        weights: `[n, C]`, summing to 1 in each row.
    """
    centred = rows - pooled.origin
    return replace(
        pooled,
        rows=pooled.rows + len(rows),
        counts=pooled.target_totals + weights.sum(0),
        sums=pooled.sums + weights.T @ centred,
        total=pooled.total + centred.sum(0),
        upper=pooled.upper + centred.T @ centred,
    )
