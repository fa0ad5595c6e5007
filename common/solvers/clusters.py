"""Clusters from sums: principal axes, spherical k-means and the likelihood of mixtures of directions.

Rows are projected on the principal axes of all sites' rows, scaled by the fourth root of the inverse variances (half
of whitening), and divided by their length. Spherical k-means (Dhillon & Modha, 2001) needs the number and the sum of
each cluster's rows only, so its steps on sums equal those on all rows pooled. The clusters are compared as mixtures of
von Mises-Fisher distributions with one concentration (Banerjee et al., 2005).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.sums.clusters import ClusterSums, FloatArray, IntArray, LikelihoodSums
from fedhead.sums.features import FeatureStatistics

WIDTH = 32
"""Number of principal axes."""

RESTARTS = 4
"""Number of random starts for each number of clusters."""

_SAME = 1e-9
"""Relative difference of lengths below which clusterings count as equally good."""

_LEAST_VARIANCE = 1e-9
"""Share of the largest variance below which an axis is left out."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The map from features to directions.

    Attributes:
        mean: `[D]` float64, of all rows.
        axes: `[D, r]` float64, principal axes divided by the fourth root of their variances.
    """

    mean: Tensor
    axes: Tensor

    @property
    def width(self) -> int:
        """The number of axes `r`."""
        return self.axes.shape[1]

    def of(self, features: Tensor) -> Tensor:
        """Return the directions `[n, r]` of features `[n, D]`, float64; 0 for a row at the mean."""
        projected = (features.double() - self.mean) @ self.axes
        length = projected.norm(dim=1, keepdim=True)
        return torch.where(length > 0, projected / length.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def directions_of(stats: FeatureStatistics, width: int = WIDTH) -> tuple[Directions, Tensor]:
    """Return the map of features to directions, and the variance `[r]` of the rows along each of its axes.

    Args:
        stats: sums over the rows, whatever their classes.
        width: the largest number of axes.

    Raises:
        UserError: if the rows vary in fewer than two directions.
    """
    scatter: Tensor = stats.scatter()
    values, vectors = torch.linalg.eigh(scatter / stats.rows)
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    kept = values > _LEAST_VARIANCE * values[0]
    if int(kept.sum()) < 2 or not float(values[0]) > 0:
        raise UserError("The rows differ in fewer than two directions of their features, so they have no clusters.")
    values, vectors = values[kept], vectors[:, kept]
    # The sign of an eigenvector is arbitrary, and random starts are along the axes.
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    axes = vectors * peaks.sign() / values**0.25
    return Directions(stats.mean(), axes), values.sqrt()


@dataclass(frozen=True, eq=False)
class Clusterings:
    """Several clusterings: unit vectors, the centres of their clusters.

    Attributes:
        sizes: the number of clusters of each of the `Q` clusterings; `M` in all.
        centres: `[M, r]` float64, of length 1.
    """

    sizes: tuple[int, ...]
    centres: FloatArray

    @classmethod
    def random(cls, sizes: Sequence[int], variances: Tensor, seed: int) -> "Clusterings":
        """Draw centres from the normal distribution of the rows, `variances` `[r]` along the axes."""
        generator = np.random.default_rng([seed, len(variances)])
        drawn = generator.normal(size=(sum(sizes), len(variances))) * variances.sqrt().numpy()
        return cls(tuple(sizes), drawn / np.linalg.norm(drawn, axis=1, keepdims=True))

    def moved(self, sums: ClusterSums) -> "Clusterings":
        """Return the clusterings with each centre at the direction of its rows; a centre without rows stays."""
        length = np.linalg.norm(sums.sums, axis=1, keepdims=True)
        moved = np.where(length > 0, sums.sums / np.maximum(length, np.finfo(float).tiny), self.centres)
        return Clusterings(self.sizes, moved)

    def chosen(self, numbers: Sequence[int]) -> "Clusterings":
        """Return some of the clusterings, by number."""
        ends = np.cumsum((0, *self.sizes))
        parts = [self.centres[ends[one] : ends[one + 1]] for one in numbers]
        return Clusterings(tuple(self.sizes[one] for one in numbers), np.concatenate(parts))


def best_starts(sums: ClusterSums) -> list[int]:
    """Return the number of the best clustering of each size, by size: that with the longest sums.

    Of starts that led to the same clusters, the first is taken: rounding must not decide their order.
    """
    best: dict[int, tuple[float, int]] = {}
    for number, (size, (_, parts)) in enumerate(zip(sums.sizes, sums.parts(), strict=True)):
        length = float(np.linalg.norm(parts, axis=1).sum())
        if size not in best or length > best[size][0] * (1 + _SAME):
            best[size] = (length, number)
    return [best[size][1] for size in sorted(best)]


def assign(scores: Tensor, sizes: Sequence[int], banned: Tensor) -> Tensor:
    """Return the cluster `[n, Q]` of each row in each clustering, numbered in 0..M-1.

    Args:
        scores: `[n, M]`, the products of rows and centres.
        sizes: the number of clusters of each clustering.
        banned: `[M]` bool, clusters that take no rows.
    """
    allowed = scores.masked_fill(banned, -math.inf)
    starts = np.cumsum((0, *sizes))[:-1].tolist()
    parts = zip(torch.split(allowed, list(sizes), dim=1), starts, strict=True)
    return torch.stack([part.argmax(1) + start for part, start in parts], dim=1)


@dataclass(frozen=True, eq=False)
class Mixtures:
    """Mixtures of von Mises-Fisher distributions about the centres of clusterings.

    Attributes:
        clusterings: the centres.
        log_shares: `[M]` float64, the logarithm of each cluster's share of the rows.
        concentrations: `[Q]` float64, one for each mixture, above 0.
    """

    clusterings: Clusterings
    log_shares: FloatArray
    concentrations: FloatArray

    @classmethod
    def of(cls, clusterings: Clusterings, sums: ClusterSums) -> "Mixtures":
        """Estimate the mixtures from sums over rows, with half a row in clusters without rows."""
        width, rows = sums.sums.shape[1], max(sums.rows, 1)
        shares, concentrations = [], []
        for counts, parts in sums.parts():
            resultant = min(float(np.linalg.norm(parts, axis=1).sum()) / rows, 1 - 1e-6)
            concentrations.append(max(resultant * (width - resultant**2) / (1 - resultant**2), 1e-3))
            shares.append(np.log(np.maximum(counts, 0.5) / rows))
        return cls(clusterings, np.concatenate(shares), np.array(concentrations))

    def likelihoods(self, directions: Tensor) -> LikelihoodSums:
        """Sum the log-likelihoods of directions `[n, r]`."""
        scores = directions @ torch.from_numpy(self.clusterings.centres).T
        shares = torch.split(torch.from_numpy(self.log_shares), list(self.clusterings.sizes))
        parts = torch.split(scores, list(self.clusterings.sizes), dim=1)
        found = LikelihoodSums.empty(len(parts))
        found.count[0] = len(directions)
        for number, (part, share, kappa) in enumerate(zip(parts, shares, self.concentrations.tolist(), strict=True)):
            values = (share + kappa * part).logsumexp(1) + log_normaliser(directions.shape[1], kappa)
            found.totals[number], found.squares[number] = float(values.sum()), float(values.square().sum())
        return found


def log_normaliser(width: int, concentration: float) -> float:
    """Return the logarithm of the density of a von Mises-Fisher distribution where row and centre are orthogonal.

    The Bessel function is taken from its uniform expansion for large orders (Abramowitz & Stegun, 9.7.7); the relative
    error is below 1e-3 from 8 axes on, and the same for all mixtures to first order.

    Args:
        width: the number of axes.
        concentration: above 0.
    """
    order = max(width / 2 - 1, 0.5)
    ratio = concentration / order
    root = math.sqrt(1 + ratio**2)
    eta = root + math.log(ratio / (1 + root))
    first = (3 / root - 5 / root**3) / 24
    bessel = order * eta - 0.5 * math.log(2 * math.pi * order) - 0.5 * math.log(root) + math.log1p(first / order)
    return order * math.log(concentration) - width / 2 * math.log(2 * math.pi) - bessel


def sizes_to_try(most: int) -> list[int]:
    """Return the numbers of clusters to compare, from 2 to `most`: all up to 10, then every second."""
    return [size for size in range(2, most + 1) if size <= 10 or size % 2 == 0 or size == most]


def knee(sizes: Sequence[int], values: Sequence[float]) -> int:
    """Return the size at which a rising curve levels off: where it is highest above the line between its ends.

    A mixture of round clusters gains likelihood with each cluster as long as clusters are not round, so that the
    maximum says little (Satopaa et al., 2011).

    Args:
        sizes: ascending.
        values: the held-out log-likelihood for each.
    """
    best = int(np.argmax(values))
    if best < 2:
        return sizes[best]
    x: npt.NDArray[np.float64] = np.array(sizes[: best + 1], dtype=np.float64)
    y = np.array(values[: best + 1])
    above = (y - y[0]) / max(y[-1] - y[0], 1e-300) - (x - x[0]) / (x[-1] - x[0])
    return sizes[int(np.argmax(above))]


def by_size(counts: IntArray) -> IntArray:
    """Return the numbers of clusters with rows, the largest first."""
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] > 0]
