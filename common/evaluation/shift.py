"""Test whether a site's rows resemble the other sites' rows of the same classes, from feature statistics alone.

Sites that differ only in their labels, however much, count as alike.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.solvers import shrink_correlation
from fedhead.sums.features import FeatureStatistics

MIN_CLASS_ROWS = 5
"""Fewest rows of a class, both at the site and elsewhere, for comparing that class."""

MIN_DISTANCE = 0.3
"""Smallest shift that matters, as a share of the distance between two classes."""

MIN_CONTRAST = 0.5
"""Share of the distance between classes elsewhere below which a site's classes are hardly separable."""

# Real features have heavier tails and less equal covariances than the tests on statistics assume.
_SHIFT_LEVEL = 1e-3
_ALIKE_LEVEL = 0.05
_NEGLIGIBLE = 1e-9
_TINY = 1e-6


@dataclass(frozen=True)
class Shift:
    """Distance of a site's rows from the other sites' rows of the same classes, as a head sees it.

    Distances are measured in the space that separates classes, corrected for chance, in units of the root mean
    square distance between two classes. At 0 the site equals the others; at 1 its rows of a class are as far from
    the others' rows of that class as another class is. A difference that no head sees counts as 0, such as an
    offset shared by all classes and orthogonal to the directions that separate them.

    Attributes:
        classes: the `K` classes that could be compared.
        rows: the effective sample size of the comparison: the sum over these classes of
            `h_c = 1 / (1 / n_c + 1 / m_c)`, with `n_c` rows at the site and `m_c` elsewhere, or somewhat less.
        distance: the root mean square over these classes, weighted by `h_c`.
        distances: `K`, the distance of each class.
        z: the shift in standard deviations under no shift; about standard normal if there is none.
        p_value: the probability of a shift at least this large if the true one is `MIN_DISTANCE`.
        contrast: the distance between the site's classes as a share of that elsewhere; None if fewer than two
            classes can be compared.
        contrast_p_value: the probability of a contrast at most this large if the true one is `MIN_CONTRAST`.
        look_like: the site's classes whose rows resemble another class elsewhere, mapped to that class.
    """

    classes: tuple[int, ...]
    rows: float
    distance: float
    distances: tuple[float, ...]
    z: float
    p_value: float
    contrast: float | None
    contrast_p_value: float
    look_like: Mapping[int, int]

    @property
    def shifted(self) -> bool:
        """Whether rows of a class are significantly farther from the others' than `MIN_DISTANCE`."""
        return self.p_value < _SHIFT_LEVEL

    @property
    def alike(self) -> bool:
        """Whether the distance is significantly below `MIN_DISTANCE` and the site's classes are separable."""
        return self.p_value > 1 - _ALIKE_LEVEL and (self.contrast is None or self.contrast >= MIN_CONTRAST)

    @property
    def inseparable(self) -> bool:
        """Whether the site's rows of different classes are significantly alike."""
        return self.contrast_p_value < _SHIFT_LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "look_like": {str(mine): theirs for mine, theirs in self.look_like.items()}}


def shifts(sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics) -> dict[str, Shift | None]:
    """Compare each site with the other sites that are alike.

    Several sites with inverted images would mask each other, because their shared difference would pass for variance
    within classes. Covariances are therefore of rows of one class at one site. A single such site would also make
    healthy sites look shifted if they share a class with few others. Outlying sites are therefore excluded, first
    those whose classes are inseparable, then the most shifted ones, one or a few at a time, and all sites are
    compared again with the rest. Subtracting their statistics makes this exact. Fewer than half of the sites are
    excluded: with two sites that differ, neither can be called the outlier.

    Args:
        sites: statistics by name; read several times but never kept, so that they may be loaded from disk on access.
        pool: the sum of all of them.

    Returns:
        The result of `shift` for each site.

    Raises:
        UserError: for multi-label statistics.
    """
    rest, scatter, aside = pool, torch.zeros_like(pool.upper), set[str]()
    for site in sites.values():
        scatter += site.within_scatter()
    while True:
        found: dict[str, Shift | None] = {}
        for name, site in sites.items():
            others = (rest, scatter) if name in aside else (rest - site, scatter - site.within_scatter())
            found[name] = shift(site, *others)
        going = _outliers({name: one for name, one in found.items() if one and name not in aside})
        if not going or 2 * (len(aside) + len(going)) >= len(sites):
            return found
        for site in map(sites.__getitem__, going):
            rest, scatter = rest - site, scatter - site.within_scatter()
        aside.update(going)


def _outliers(found: Mapping[str, Shift]) -> list[str]:
    """Return all sites with inseparable classes, or else a quarter of the shifted sites, at least one."""
    inseparable = [name for name, one in found.items() if one.inseparable]
    shifted = [name for name, one in found.items() if one.shifted]
    shifted.sort(key=lambda name: -found[name].rows * found[name].distance ** 2)
    return inseparable or shifted[: math.ceil(len(shifted) / 4)]


@torch.no_grad()
def shift(site: FeatureStatistics, others: FeatureStatistics, scatter: Tensor | None = None) -> Shift | None:
    """Test whether a site's class means equal the other sites', class by class, so that label skew has no effect.

    Let `delta_c` be the difference of the means of class `c` and `P` a projection. Without a shift,
    `T = sum_c h_c |P^T delta_c|^2` has mean `K tr(B)` and variance `2 K tr(B^2)`, where `B = P^T S P` for the
    covariance `S` within classes and `h_c = 1 / (1 / n_c + 1 / m_c)` (Dempster, Annals of Mathematical Statistics,
    1958).

    `P` projects on the directions that a discriminant head uses: the span of `V^-1 (mu_c - mu)`, with `V` the
    others' shrunk covariance, in coordinates in which `V` is the identity. The test runs for two heads and returns
    the more significant result. With the others' means as `mu_c`, it measures the site's rows under the others'
    head. With the means of all rows, it measures the effect of the site's rows on the shared head.

    With few rows for many features, three corrections matter:

    - Computed from the scatter that `P` inverts, `B` would be several times too small. It is therefore computed from
      the site's own scatter, which is independent of `P`. Its `f` rows multiply the variance by `1 + K / f`.
    - The means of all rows are independent of `delta_c`, but `P` turns towards the noise of the others' means. With
      `M` the matrix of products of the means under `V^-1`, this adds `(tr(V^-1 S) / m_c)^2 (M^+)_cc` to the noise of
      class `c` in `T`.
    - `tr(V^-1 S)` is needed for rows outside `V`: `t / (1 - (1 - a) t / N)`, with `t` its value on the `N` rows of
      `V` and `a` the shrinkage.

    No two real sites are exactly alike. The test therefore asks not whether `delta` is 0, but whether the shift
    exceeds `MIN_DISTANCE` (a minimum-effect test: Murphy & Myors, Journal of Applied Psychology, 1999), treating the
    distance between classes as known. This also allows for heavy tails, unequal covariances and grouped rows.

    Args:
        site: the site's statistics.
        others: the statistics of all other sites, without this one.
        scatter: `[d, d]`, the sum of the other sites' scatters within classes, each about the site's own means; by
            default the scatter about pooled class means, which hides differences that several sites share.

    Returns:
        None if no class has `MIN_CLASS_ROWS` rows both here and elsewhere, or if the features do not separate
        classes.

    Raises:
        UserError: for multi-label statistics.
        ValueError: for statistics about different origins.
    """
    if not (site.kind.exclusive and others.kind.exclusive):
        raise UserError("Multi-label sites cannot be compared class by class.")
    compared = (site.counts >= MIN_CLASS_ROWS) & (others.counts >= MIN_CLASS_ROWS)
    if not bool(compared.any()) or int((others.counts > 0).sum()) < 2:
        return None
    scatter = others.within_scatter() if scatter is None else scatter
    found = [_shift_in(space, site, others, compared) for space in _spaces(site, others, scatter)]
    return min(found, key=lambda one: one.p_value, default=None)


class _Space(NamedTuple):
    """The `r`-dimensional space that a head uses.

    Attributes:
        projection: `P`, `[d, r]`.
        separation: the mean squared distance between two classes, above 0.
        turning: `[C]`, the extra noise of the others' means along directions chosen from those means.
        noise: `B`, `[r, r]`.
        freedom: `f`, the degrees of freedom of `noise`.
    """

    projection: Tensor
    separation: float
    turning: Tensor
    noise: Tensor
    freedom: int


def _spaces(site: FeatureStatistics, others: FeatureStatistics, scatter: Tensor) -> list[_Space]:
    """Return the spaces of the others' head and of the shared head, omitting those that do not separate classes."""
    held = others.counts > 0
    sources = (others, site + others)
    deviations = torch.cat([_centred_means(stats, held) for stats in sources])
    shrunk = shrink_correlation(scatter.clone(), others)
    solved, whitened = torch.split(shrunk.solve(torch.cat([deviations, scatter])), [len(deviations), len(scatter)])
    known = float(whitened.trace()) / others.rows
    spread = known / (1 - (1 - shrunk.shrinkage) * known / others.rows)
    freedom = site.rows - int((site.counts > 0).sum())
    covariance = site.within_scatter() / freedom

    spaces = []
    for stats, means, directions in zip(sources, deviations.chunk(2), solved.chunk(2), strict=True):
        noise_of_means = spread / stats.counts[held].to(torch.float64)
        values, vectors = torch.linalg.eigh(directions @ means.T)
        separation = 2 * float(values.sum() / (len(means) - 1) - noise_of_means.mean())
        if not separation > 0:
            continue
        kept = values > _NEGLIGIBLE * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        projection = directions.T @ (vectors / values.sqrt())
        noise = projection.T @ covariance @ projection
        # Identical rows have no noise, and the test statistic would have no variance.
        noise.diagonal().add_(_TINY * separation / len(noise))
        turning = torch.zeros_like(others.counts, dtype=torch.float64)
        if stats is others:
            turning[held] = noise_of_means.square() * (vectors.square() / values).sum(1) / noise.trace()
        spaces.append(_Space(projection, separation, turning, noise, freedom))
    return spaces


def _centred_means(stats: FeatureStatistics, chosen: Tensor) -> Tensor:
    """Return `[k, d]`, the means of the classes `chosen` `[C]` about their common mean."""
    means = stats.sums[chosen] / stats.counts[chosen, None]
    return means - means.mean(0)


class _Means(NamedTuple):
    """Class means in a space.

    Attributes:
        classes: `[k]`, class numbers.
        means: `[k, r]`.
        noise: `[k]`, the variance of each mean relative to that of one row.
    """

    classes: Tensor
    means: Tensor
    noise: Tensor

    @classmethod
    def of(cls, stats: FeatureStatistics, chosen: Tensor, space: _Space) -> Self:
        """Return the site's own means of the classes `chosen` `[C]`, about the statistics' origin."""
        share = stats.counts[chosen].to(torch.float64).reciprocal()
        return cls(chosen.nonzero()[:, 0], (stats.sums[chosen] * share[:, None]) @ space.projection, share)

    @classmethod
    def elsewhere(cls, others: FeatureStatistics, chosen: Tensor, space: _Space) -> Self:
        """Return the other sites' means, with the noise that the space was chosen from included."""
        means = cls.of(others, chosen, space)
        return means._replace(noise=means.noise + space.turning[chosen])


def _shift_in(space: _Space, site: FeatureStatistics, others: FeatureStatistics, compared: Tensor) -> Shift:
    """Return the shift of the classes `compared` `[C]` within a space."""
    here, there = _Means.of(site, compared, space), _Means.elsewhere(others, compared, space)
    weights = 1 / (here.noise + there.noise)
    rows, number, noise = float(weights.sum()), len(weights), float(space.noise.trace())

    squares = (here.means - there.means).square().sum(1) - noise / weights
    excess = float(weights @ squares)
    chance = _Quadratic.of_noise(space.noise, number, number * (1 + number / space.freedom))
    least = chance.raised(MIN_DISTANCE**2 * space.separation * rows)
    contrast, contrast_p_value = _contrast(here, there, weights / rows, space)
    return Shift(
        classes=tuple(here.classes.tolist()),
        rows=rows,
        distance=_root(excess / (rows * space.separation)),
        distances=tuple(map(_root, (squares / space.separation).tolist())),
        z=excess / math.sqrt(chance.variance),
        p_value=least.chance_above(excess + chance.mean),
        contrast=contrast,
        contrast_p_value=contrast_p_value,
        look_like=_look_like(here, _Means.elsewhere(others, others.counts >= MIN_CLASS_ROWS, space), space),
    )


class _Quadratic(NamedTuple):
    """Distribution of a sum of squared Gaussians, as scaled chi-squared (Satterthwaite, Biometrics, 1946).

    Attributes:
        mean: its mean.
        variance: its variance.
        scale: the variance of the squared Gaussians.
    """

    mean: float
    variance: float
    scale: float

    @classmethod
    def of_noise(cls, covariance: Tensor, terms: float, squares: float) -> Self:
        """Return the distribution of `sum_ij A_ij x_i^T x_j` for independent `x` with this covariance.

        Args:
            covariance: `[r, r]`.
            terms: `tr(A)`.
            squares: `tr(A^2)`.
        """
        first, second = float(covariance.trace()), float(covariance.square().sum())
        return cls(terms * first, 2 * squares * second, squares / terms * second / first)

    def raised(self, signal: float) -> Self:
        """Return the distribution with its mean raised by a signal's square (Patnaik, Biometrika, 1949)."""
        return self._replace(mean=self.mean + signal, variance=self.variance + 4 * signal * self.scale)

    def chance_above(self, value: float) -> float:
        return float(torch.special.gammaincc(*self._gamma(value)))

    def chance_below(self, value: float) -> float:
        return float(torch.special.gammainc(*self._gamma(value)))

    def _gamma(self, value: float) -> Tensor:
        return torch.tensor([self.mean, max(value, 0.0)], dtype=torch.float64) * (self.mean / self.variance)


def _contrast(here: _Means, there: _Means, weights: Tensor, space: _Space) -> tuple[float | None, float]:
    """Return the ratio of distances between classes here and elsewhere, and its p-value under `MIN_CONTRAST`."""
    centring = weights.diag() - torch.outer(weights, weights)
    apart_here, apart_there = (float(((centring @ means) * means).sum()) for means in (here.means, there.means))
    noise = centring * here.noise
    expected = apart_there - float(space.noise.trace()) * float(centring.diagonal() @ there.noise)
    if len(weights) < 2 or not expected > 0:
        return None, 1.0
    chance = _Quadratic.of_noise(space.noise, float(noise.trace()), float((noise * noise.T).sum()))
    ratio = _root((apart_here - chance.mean) / expected)
    return ratio, chance.raised(MIN_CONTRAST**2 * expected).chance_below(apart_here)


def _look_like(here: _Means, there: _Means, space: _Space) -> dict[int, int]:
    """Return the nearest class elsewhere, within `MIN_DISTANCE`, for each class nearest to a different class."""
    squares = torch.cdist(here.means, there.means).square()
    squares -= space.noise.trace() * (here.noise[:, None] + there.noise)
    nearest = squares.min(1)
    near = nearest.values < MIN_DISTANCE**2 * space.separation
    pairs = zip(here.classes[near].tolist(), there.classes[nearest.indices[near]].tolist(), strict=True)
    return {mine: theirs for mine, theirs in pairs if mine != theirs}


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))
