"""Test whether a site's features relate to its targets as at the other sites, from feature statistics alone.

Sites that differ only in their targets' distribution count as alike: the test looks at predictions given the target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fedhead.evaluation.shift import MIN_CONTRAST, MIN_DISTANCE
from fedhead.evaluation.worth import ridge_at, ridge_penalty
from fedhead.sums.features import FeatureStatistics

MIN_ROWS = 10
"""Fewest training rows of a site whose targets are compared."""

MIN_SITES = 3
"""Fewest such sites: of two that differ, neither is the outlier."""

ALL_LABELS = "all labels"
"""Name of the one comparison of multi-label rows."""

FAR_LARGER = 4.0
"""Multiple of the median size of targets, about the median site's mean, above which a site is left out of the others'
heads."""

_SHIFT_LEVEL = 1e-3
_ALIKE_LEVEL = 0.05
_STRONG = 0.7


@dataclass(frozen=True)
class TargetDistribution:
    """Distribution of a target at a site and elsewhere.

    Attributes:
        name: the name of the target.
        mean: its mean at the site.
        deviation: its standard deviation there.
        mean_elsewhere: its mean over the rows of all other sites.
        deviation_elsewhere: its standard deviation there.
    """

    name: str
    mean: float
    deviation: float
    mean_elsewhere: float
    deviation_elsewhere: float

    @property
    def distance(self) -> float:
        """Difference of the means in standard deviations elsewhere; 0 if the target is constant there."""
        difference = self.mean - self.mean_elsewhere
        return difference / self.deviation_elsewhere if self.deviation_elsewhere > 0 else 0.0


@dataclass(frozen=True)
class TargetShift:
    """Relation of a site's features to its targets, as the other sites' ridge head sees it.

    Let `p` be this head's predictions, and `p = a + g y` their regression on the target `y`. Selection of rows by `y`
    changes neither `a` nor `g`, so sites may hold any range of targets. The values of the site are compared with the
    medians over all sites, each seen by the head of its others; the most conspicuous target decides.

    Attributes:
        target: the name of this target, or `ALL_LABELS`.
        rows: the site's training rows.
        distance: the shift of predictions given the target, in standard deviations of the target, corrected for chance.
        offset: the same with its sign, uncorrected: above 0, rows look like rows of higher targets elsewhere.
        contrast: the site's `g` as a share of the median.
        correlation: between predictions and targets at the site, as a share of the median.
        shifted: whether the shift is significantly larger than `MIN_DISTANCE`.
        alike: whether it is significantly smaller, and the contrast between `MIN_CONTRAST` and its inverse.
        weak: whether the contrast is significantly below `MIN_CONTRAST`.
        steep: whether the contrast is significantly above the inverse of `MIN_CONTRAST`.
        distributions: of each target.
    """

    target: str
    rows: int
    distance: float
    offset: float
    contrast: float
    correlation: float
    shifted: bool
    alike: bool
    weak: bool
    steep: bool
    distributions: tuple[TargetDistribution, ...]

    @property
    def unlike(self) -> bool:
        """Whether the site differs significantly in any way."""
        return self.shifted or self.weak or self.steep

    @property
    def conspicuous(self) -> float:
        """Size of the difference: the distance, or the logarithm of the contrast if that is larger."""
        return max(self.distance, abs(math.log(max(abs(self.contrast), 1e-9))))

    @property
    def rescaled(self) -> bool:
        """Whether targets relate to the features as strongly as elsewhere, but on another scale."""
        return (self.steep or self.weak) and abs(self.correlation) >= _STRONG

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        own = {name: value for name, value in vars(self).items() if name != "distributions"}
        return {**own, "distributions": [vars(one) for one in self.distributions]}


class _Lines(NamedTuple):
    """Regressions of predictions on targets at one site, one for each of `K` targets.

    Attributes:
        rows: the number of rows.
        mean: `[K]`, of the targets.
        predicted: `[K]`, the mean prediction.
        slope: `[K]`.
        noise: `[K]`, the residual variance.
        spread: `[K]`, the variance of the targets.
        correlation: `[K]`.
    """

    rows: int
    mean: Tensor
    predicted: Tensor
    slope: Tensor
    noise: Tensor
    spread: Tensor
    correlation: Tensor

    @classmethod
    def of(cls, site: FeatureStatistics, others: FeatureStatistics, penalty: float) -> Self | None:
        """Return the lines of a site under the ridge head of the others; None if it cannot have any.

        Labels share one line: the residual variance is its upper bound under any dependence between labels.
        """
        if site.rows < MIN_ROWS or others.rows < MIN_ROWS:
            return None
        weight, bias = ridge_at(others, penalty)
        spread = site.target_scatter() / site.rows
        cross = site.sums - torch.outer(site.target_totals / site.rows, site.total)
        shared = (weight * cross).sum(1) / site.rows
        varied = ((weight @ (site.scatter() / site.rows)) * weight).sum(1)
        noise = (varied - shared.square() / spread.clamp(min=1e-300)).clamp(min=0) * site.rows / (site.rows - 2)
        mean, predicted = site.target_mean(), weight @ site.mean() + bias
        if not site.kind.real:
            noise = ((spread * noise).sqrt().sum().square() / spread.sum().clamp(min=1e-300))[None]
            mean, predicted = mean.mean()[None], predicted.mean()[None]
            shared, spread, varied = shared.sum()[None], spread.sum()[None], varied.sum()[None]
        if not bool((spread > 0).all() and (varied > 0).all()):
            return None
        return cls(site.rows, mean, predicted, shared / spread, noise, spread, shared / (spread * varied).sqrt())

    @property
    def slope_error(self) -> Tensor:
        """`[K]`, the variance of the slopes."""
        return self.noise / (self.rows * self.spread)


class _Usual(NamedTuple):
    """Medians over sites: `[K]` each.

    Attributes:
        slope: the slope.
        slope_error: its variance.
        intercept: the intercept at this slope.
        intercept_error: its variance.
        correlation: the correlation.
    """

    slope: Tensor
    slope_error: Tensor
    intercept: Tensor
    intercept_error: Tensor
    correlation: Tensor

    @classmethod
    def of(cls, lines: Sequence[_Lines]) -> Self:
        precision = torch.stack([1 / (one.slope_error + _floor(one.slope)) for one in lines])
        slope = _weighted_median(torch.stack([one.slope for one in lines]), precision)
        weights = torch.stack([one.rows / (one.noise + _floor(one.noise)) for one in lines])
        intercepts = torch.stack([one.predicted - slope * one.mean for one in lines])
        correlation = _weighted_median(torch.stack([one.correlation for one in lines]), precision)
        # A median's variance is pi / 2 times that of the mean.
        errors = (math.pi / 2 / part.sum(0) for part in (precision, weights))
        return cls(slope, next(errors), _weighted_median(intercepts, weights), next(errors), correlation)


def target_shifts(
    sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics, columns: Sequence[str]
) -> dict[str, TargetShift | None]:
    """Compare each site with the other sites that are alike.

    Sites that differ spoil the others' heads. Sites with far larger targets are therefore left out first, then the most
    conspicuous quarter of those that differ, and all sites are compared again with the rest, as long as fewer than half
    are left out.

    Args:
        sites: statistics by name; read several times but never kept, so that they may be loaded from disk on access.
        pool: the sum of all of them.
        columns: the names of the targets or labels.

    Returns:
        The shift of each site; None if it has too few rows, or there are too few sites to compare it with.
    """
    aside = _far_larger(sites) if pool.kind.real else set()
    rest = pool
    for name in aside:
        rest = rest - sites[name]
    while True:
        if rest.rows == 0 or not bool((rest.target_scatter() > 0).all()):
            return dict.fromkeys(sites)
        penalty, scale = ridge_penalty(rest), rest.target_scale()
        lines = {name: _Lines.of(site, rest if name in aside else rest - site, penalty) for name, site in sites.items()}
        usual = [line for name, line in lines.items() if line is not None and name not in aside]
        if len(usual) < MIN_SITES:
            return dict.fromkeys(sites)
        middle = _Usual.of(usual)
        found: dict[str, TargetShift | None] = {}
        for name, site in sites.items():
            line = lines[name]
            found[name] = None if line is None else _compare(line, middle, scale, site, pool - site, columns)
        going = _outliers({name: one for name, one in found.items() if one and name not in aside})
        if not going or 2 * (len(aside) + len(going)) >= len(sites):
            return found
        for name in going:
            rest = rest - sites[name]
        aside.update(going)


def _far_larger(sites: Mapping[str, FeatureStatistics]) -> set[str]:
    """Return the sites with a target that is far larger than elsewhere, if they are fewer than half."""
    moments = {
        name: (site.target_mean(), site.target_scatter() / site.rows) for name, site in sites.items() if site.rows
    }
    if not moments:
        return set()
    centre = torch.stack([mean for mean, _ in moments.values()]).median(0).values
    sizes = {name: (variance + (mean - centre).square()).sqrt() for name, (mean, variance) in moments.items()}
    usual = torch.stack(list(sizes.values())).median(0).values
    larger = {name for name, size in sizes.items() if bool((size > FAR_LARGER * usual).any())}
    return larger if 2 * len(larger) < len(sites) else set()


def _outliers(found: Mapping[str, TargetShift]) -> list[str]:
    """Return the most conspicuous quarter of the sites that differ, at least one."""
    unlike = [name for name, one in found.items() if one.unlike]
    unlike.sort(key=lambda name: -found[name].rows * found[name].conspicuous ** 2)
    return unlike[: math.ceil(len(unlike) / 4)]


def distributions(
    site: FeatureStatistics, others: FeatureStatistics, columns: Sequence[str]
) -> tuple[TargetDistribution, ...]:
    """Return the distribution of each target at a site and elsewhere; labels have none, but their coverage."""
    if not site.kind.real or not site.rows or not others.rows:
        return ()
    moments = [
        (one.target_mean().tolist(), (one.target_scatter() / one.rows).sqrt().tolist()) for one in (site, others)
    ]
    return tuple(
        TargetDistribution(name, *(values[place] for half in moments for values in half))
        for place, name in enumerate(columns)
    )


def _compare(
    line: _Lines,
    usual: _Usual,
    scale: Tensor,
    site: FeatureStatistics,
    others: FeatureStatistics,
    columns: Sequence[str],
) -> TargetShift | None:
    """Return the shift of a site whose lines are `line`; None if the other sites' features do not predict a target."""
    usable = usual.slope > 3 * usual.slope_error.sqrt()
    if not bool(usable.any()):
        return None
    real, number = site.kind.real, int(usable.sum())
    strict, loose = NormalDist().inv_cdf(1 - _SHIFT_LEVEL / number), NormalDist().inv_cdf(1 - _ALIKE_LEVEL)
    unit = usual.slope * (scale if real else 1.0)
    centre = others.target_mean() if real else torch.zeros(1, dtype=torch.float64)
    offset = (line.predicted - usual.intercept - usual.slope * line.mean) / unit
    error = line.noise / line.rows + usual.intercept_error + (line.mean - centre).square() * usual.slope_error
    error = error.sqrt() / unit
    contrast, contrast_error = line.slope / usual.slope, line.slope_error.sqrt() / usual.slope
    if not real:
        # Labels occur together, so predictions of one shift with the shares of the others.
        offset, error = torch.zeros_like(offset), torch.zeros_like(error)
    shift_z = (offset.abs() - MIN_DISTANCE) / error.clamp(min=1e-12)
    weak_z = (MIN_CONTRAST - contrast) / contrast_error.clamp(min=1e-12)
    steep_z = (contrast - 1 / MIN_CONTRAST) / contrast_error.clamp(min=1e-12)
    z = torch.stack([shift_z, weak_z, steep_z]).where(usable, -torch.inf)
    worst = int(z.amax(0).argmax())
    shifted, weak, steep = (z[:, worst] > strict).tolist()
    return TargetShift(
        target=columns[worst] if real else ALL_LABELS,
        rows=line.rows,
        distance=math.sqrt(max(float(offset[worst].square() - error[worst].square()), 0.0)),
        offset=float(offset[worst]),
        contrast=float(contrast[worst]),
        correlation=float(line.correlation[worst] / usual.correlation[worst]),
        shifted=shifted,
        alike=bool((z < -loose).all()),
        weak=weak,
        steep=steep,
        distributions=distributions(site, others, columns),
    )


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Return `[K]`, the weighted medians of `[n, K]`."""
    ordered, order = values.sort(dim=0)
    shares = weights.gather(0, order).cumsum(0) / weights.sum(0)
    return ordered.gather(0, (shares < 0.5).sum(0, keepdim=True).clamp(max=len(values) - 1))[0]


def _floor(values: Tensor) -> Tensor:
    """Return a positive number far below `values`, against division by 0."""
    return 1e-6 * values.square() + 1e-300
