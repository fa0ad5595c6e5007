"""How each site stands to the pool: whether its rows are like the others', which head serves it, who holds what.

Everything here is a pure function of feature statistics, of training rows, and of a few counts of right answers
on held-out rows. Sites that differ in their labels only, however much, are alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers import ABSENT_MARGIN, shrink_correlation, solve_head
from fedhead.statistics import FeatureStatistics

MIN_CLASS_ROWS = 5
"""A class is compared where both the site and the others have this many rows of it."""

MIN_DISTANCE = 0.3
"""A shift worth speaking of, as a share of the distance between two classes."""

MIN_CONTRAST = 0.5
"""A site's classes nearer to each other than this share of what they are elsewhere are hardly told apart."""

WORTHWHILE = 0.1
"""A difference in accuracy worth having: ten points."""

DOMINANCE = 0.9
"""A class of which one site holds more than this share of the rows rests on that site."""

HEADS = ("own", "pooled", "others")
"""The heads that are compared, in the order of the axes of joint counts."""

Recommendation = Literal["join", "join with a local head", "stay local", "not enough rows to tell"]
Finding = Literal["alike", "images look different", "classes look exchanged", "labels look wrong", "unknown"]

# Real features have heavier tails and less equal covariances than the tests on statistics assume.
_SHIFT_LEVEL = 1e-3
_ALIKE_LEVEL = 0.05
_HEAD_LEVEL = 0.05
_NEGLIGIBLE = 1e-9
_TINY = 1e-6


@dataclass(frozen=True)
class Shift:
    """How far a site's rows are from the other sites' rows of the same classes, as a head sees them.

    Distances are in the space that tells classes apart, without what chance gives, and in units of the (root
    mean square) distance of two classes: at 0 a site is like the others, at 1 its rows of a class are as far
    from the others' as another class is. What no head sees, such as an offset that all classes share and that is
    at right angles to what tells them apart, is no distance.

    Attributes:
        classes: the `K` classes that could be compared.
        rows: how many rows the comparison is worth: over these, the sum of `h_c = 1 / (1 / n_c + 1 / m_c)` for
            the site's `n_c` and the others' `m_c` rows, or somewhat less.
        distance: the root mean square over these classes, weighted by `h_c`.
        distances: `K`, of each class.
        z: the shift in standard deviations of what chance gives; about standard normal where there is none.
        p_value: how likely a shift of `MIN_DISTANCE` would look like this one, or a larger.
        contrast: how far the site's classes are from each other, as a share of how far the others' are. None
            where fewer than two can be compared.
        contrast_p_value: how likely a contrast of `MIN_CONTRAST` would look like this one, or a smaller.
        look_like: classes of the site whose rows look like the others' rows of another class, and which.
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
        """Whether rows of a class are farther from the others' than is harmless, beyond doubt."""
        return self.p_value < _SHIFT_LEVEL

    @property
    def alike(self) -> bool:
        """Whether they are nearer than that, and its classes as far apart, beyond reasonable doubt."""
        return self.p_value > 1 - _ALIKE_LEVEL and (self.contrast is None or self.contrast >= MIN_CONTRAST)

    @property
    def muddled(self) -> bool:
        """Whether the site's rows of different classes look alike, beyond doubt."""
        return self.contrast_p_value < _SHIFT_LEVEL


def shifts(sites: Mapping[str, FeatureStatistics], pool: FeatureStatistics) -> dict[str, Shift | None]:
    """Measure every site against those of the others that are alike.

    Several sites with inverted images would hide each other, as what they share would pass for what rows of a
    class have in common: so covariances are of rows of one class at one site. And one would make healthy sites
    look shifted, where those share a class with few others: so sites are set aside, first those that are
    muddled, then the most shifted, one or a few at a time, and all are measured again against the rest.
    Subtraction makes that exact. Never as many as half of the sites are set aside: of two sites that differ,
    none can say which is the odd one.

    Args:
        sites: by name; each is looked up a few times and none is kept, so they may be read from disk then.
        pool: the sum of all of them.

    Returns:
        For each site what `shift` does.

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
        going = _odd_ones({name: one for name, one in found.items() if one and name not in aside})
        if not going or 2 * (len(aside) + len(going)) >= len(sites):
            return found
        for site in map(sites.__getitem__, going):
            rest, scatter = rest - site, scatter - site.within_scatter()
        aside.update(going)


def _odd_ones(found: Mapping[str, Shift]) -> list[str]:
    """Return all sites that are muddled, which is not catching, or else a quarter of the shifted, at least one."""
    muddled = [name for name, one in found.items() if one.muddled]
    shifted = [name for name, one in found.items() if one.shifted]
    shifted.sort(key=lambda name: -found[name].rows * found[name].distance ** 2)
    return muddled or shifted[: math.ceil(len(shifted) / 4)]


@torch.no_grad()
def shift(site: FeatureStatistics, others: FeatureStatistics, scatter: Tensor | None = None) -> Shift | None:
    """Test whether a site's class means are the other sites', class by class: label skew does not show.

    With `delta_c` the difference of the means of class `c` and `P` a projection, `T = sum_c h_c |P^T delta_c|^2`
    has under no shift the mean `K tr(B)` and the variance `2 K tr(B^2)`, where `B = P^T S P` for the covariance
    `S` within classes and `h_c = 1 / (1 / n_c + 1 / m_c)` (Dempster, Annals of Mathematical Statistics, 1958).

    `P` is to where a discriminant head looks: the span of `V^-1 (mu_c - mu)`, with `V` the others' shrunk
    covariance, in coordinates in which `V` is the identity. Two heads are taken, and what is more surely shifted
    is returned. With the others' means for `mu_c` it is what their head makes of the site's rows. With the
    means of all rows it is what the site's rows would make of the shared head.

    Where there are few rows for many features, three things need care:

    - In the scatter that `P` inverts, `B` would be too small, several times. So `B` comes from the site's own
      scatter, which is independent of `P`. From `f` rows, it multiplies the variance by `1 + K / f`.
    - The means of all rows are independent of `delta_c`, but towards the noise of the others' means `P` turns.
      With `M` their products by `V^-1`, that adds `(tr(V^-1 S) / m_c)^2 (M^+)_cc` to what is left of it in `T`.
    - `tr(V^-1 S)` is that of rows which `V` does not know: `t / (1 - (1 - a) t / N)` for its value `t` over the
      `N` rows of `V`, shrunk by `a`.

    No two real sites are quite alike. So the question is not whether `delta` is 0, but whether the shift is
    larger than `MIN_DISTANCE` (a minimum-effect test: Murphy & Myors, Journal of Applied Psychology, 1999), the
    distance between classes taken for known. That also leaves room for heavy tails, unequal covariances, and
    rows that come in groups.

    Args:
        site: the site's statistics.
        others: those of all other sites, without this one.
        scatter: `[d, d]`, the sum of the others' scatters within classes, each site's by itself; by default
            that within classes of all of them, which hides what several of them share.

    Returns:
        None if no class has `MIN_CLASS_ROWS` rows both here and elsewhere, or features do not tell classes
        apart.

    Raises:
        UserError: for multi-label statistics.
        ValueError: for statistics about different origins.
    """
    if site.multi_label or others.multi_label:
        raise UserError("Sites whose rows have several classes each cannot be compared class by class.")
    compared = (site.counts >= MIN_CLASS_ROWS) & (others.counts >= MIN_CLASS_ROWS)
    if not bool(compared.any()) or int((others.counts > 0).sum()) < 2:
        return None
    scatter = others.within_scatter() if scatter is None else scatter
    found = [_shift_in(space, site, others, compared) for space in _spaces(site, others, scatter)]
    return min(found, key=lambda one: one.p_value, default=None)


class _Space(NamedTuple):
    """Where a head looks, in `r` dimensions.

    Attributes:
        projection: `P`, `[d, r]`.
        separation: the mean squared distance of two classes, above 0.
        turning: `[C]`, what is added to the noise of the others' means.
        noise: `B`, `[r, r]`.
        freedom: `f`, of how many independent rows `noise` is the covariance.
    """

    projection: Tensor
    separation: float
    turning: Tensor
    noise: Tensor
    freedom: int


def _spaces(site: FeatureStatistics, others: FeatureStatistics, scatter: Tensor) -> list[_Space]:
    """Return where the others' head and the shared one look, if that tells classes apart."""
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
        # Rows that are all equal have no noise, and a distribution without variance.
        noise.diagonal().add_(_TINY * separation / len(noise))
        turning = torch.zeros_like(others.counts, dtype=torch.float64)
        if stats is others:
            turning[held] = noise_of_means.square() * (vectors.square() / values).sum(1) / noise.trace()
        spaces.append(_Space(projection, separation, turning, noise, freedom))
    return spaces


def _centred_means(stats: FeatureStatistics, chosen: Tensor) -> Tensor:
    """Return `[k, d]`, the means of the classes `chosen` `[C]` about the mean of these."""
    means = stats.sums[chosen] / stats.counts[chosen, None]
    return means - means.mean(0)


class _Means(NamedTuple):
    """Class means in a space.

    Attributes:
        classes: `[k]`, their numbers.
        means: `[k, r]`.
        noise: `[k]`, the variance of each, as a share of that of one row.
    """

    classes: Tensor
    means: Tensor
    noise: Tensor

    @classmethod
    def of(cls, stats: FeatureStatistics, chosen: Tensor, space: _Space) -> Self:
        """Return those of the classes `chosen` `[C]`, about the statistics' origin."""
        share = stats.counts[chosen].to(torch.float64).reciprocal()
        return cls(chosen.nonzero()[:, 0], (stats.sums[chosen] * share[:, None]) @ space.projection, share)

    @classmethod
    def elsewhere(cls, others: FeatureStatistics, chosen: Tensor, space: _Space) -> Self:
        """Return those of the other sites, with the noise towards which the space has turned."""
        means = cls.of(others, chosen, space)
        return means._replace(noise=means.noise + space.turning[chosen])


def _shift_in(space: _Space, site: FeatureStatistics, others: FeatureStatistics, compared: Tensor) -> Shift:
    """Return the shift of the classes `compared` `[C]` that is seen in a space."""
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
    """The law of a sum of squares of Gaussians, as a multiple of chi-squared (Satterthwaite, Biometrics, 1946).

    Attributes:
        mean: its mean.
        variance: its variance.
        scale: the variance of what is squared.
    """

    mean: float
    variance: float
    scale: float

    @classmethod
    def of_noise(cls, covariance: Tensor, terms: float, squares: float) -> Self:
        """Return the law of `sum_ij A_ij x_i^T x_j` of independent `x` with this covariance.

        Args:
            covariance: `[r, r]`.
            terms: `tr(A)`.
            squares: `tr(A^2)`.
        """
        first, second = float(covariance.trace()), float(covariance.square().sum())
        return cls(terms * first, 2 * squares * second, squares / terms * second / first)

    def raised(self, signal: float) -> Self:
        """Return the law with a mean that is larger by a signal's square (Patnaik, Biometrika, 1949)."""
        return self._replace(mean=self.mean + signal, variance=self.variance + 4 * signal * self.scale)

    def chance_above(self, value: float) -> float:
        return float(torch.special.gammaincc(*self._gamma(value)))

    def chance_below(self, value: float) -> float:
        return float(torch.special.gammainc(*self._gamma(value)))

    def _gamma(self, value: float) -> Tensor:
        return torch.tensor([self.mean, max(value, 0.0)], dtype=torch.float64) * (self.mean / self.variance)


def _contrast(here: _Means, there: _Means, weights: Tensor, space: _Space) -> tuple[float | None, float]:
    """Return the ratio of distances between classes here and there, and how likely `MIN_CONTRAST` gives less."""
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
    """Return for each class whose nearest class elsewhere is another one, not `MIN_DISTANCE` away, that one."""
    squares = torch.cdist(here.means, there.means).square()
    squares -= space.noise.trace() * (here.noise[:, None] + there.noise)
    nearest = squares.min(1)
    near = nearest.values < MIN_DISTANCE**2 * space.separation
    pairs = zip(here.classes[near].tolist(), there.classes[nearest.indices[near]].tolist(), strict=True)
    return {mine: theirs for mine, theirs in pairs if mine != theirs}


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


@torch.no_grad()
def heads_to_compare(site: FeatureStatistics, others: FeatureStatistics) -> dict[str, LinearHead]:
    """Solve the heads between which a site has to choose, each for the site's own shares of the classes.

    With the classes' shares in the pool, a head that knows the site's skew would seem better by that alone. The
    shares are those of the site's rows and of one row more, which is of every class by its share in the pool.

    `own` comes from the site's rows, `pooled` from all and `others` from all but the site's: its accuracy is
    what the pool offers a site that keeps its rows. A head never predicts a class of which it had no rows; with
    rows of one class it always predicts that one, and with none at all the site's commonest.

    Args:
        site: the site's statistics.
        others: those of all other sites that are to take part, without this one.

    Returns:
        The `HEADS` by name, float64, for features as they are.

    Raises:
        UserError: for multi-label statistics, or if there are no rows at all.
    """
    pooled = site + others
    if pooled.rows == 0:
        raise UserError("There are no rows to make heads from: every site was empty, or withheld what it has.")
    priors = site.counts + pooled.counts.to(torch.float64) / pooled.rows
    parts = {"own": site, "pooled": pooled, "others": others}
    return {name: _head_under(parts[name], priors) for name in HEADS}


def _head_under(stats: FeatureStatistics, priors: Tensor) -> LinearHead:
    if not stats.multi_label and int((stats.counts > 0).sum()) < 2:
        bias = ABSENT_MARGIN * (stats.counts > 0) + priors / priors.sum()
        return LinearHead.from_weights(torch.zeros_like(stats.sums), bias)
    return solve_head(stats, "lda", priors=priors)


@torch.no_grad()
def count_jointly(heads: Mapping[str, LinearHead], features: Tensor, labels: Tensor) -> Tensor:
    """Count on how many rows which heads are right: all that a site tells of its held-out rows.

    Args:
        heads: the `HEADS` by name.
        features: `[n, d]`.
        labels: `[n]`.

    Returns:
        `[2, 2, 2]`, int64, of right (1) or wrong (0) along an axis for each of the `HEADS`.
    """
    right = [heads[name](features.to(heads[name].weight.dtype)).argmax(1) == labels for name in HEADS]
    cells = sum((one.to(torch.int64) << axis for axis, one in enumerate(reversed(right))), torch.zeros_like(labels))
    return torch.bincount(cells, minlength=2 ** len(HEADS)).view([2] * len(HEADS))


@dataclass(frozen=True)
class Comparison:
    """How a site's own head, the pooled head and the other sites' head do on the site's held-out rows.

    Attributes:
        rows: how many there are, at least 1.
        right: how many of them each of the `HEADS` has right.
        p_value: of an exact McNemar test of the own against the pooled head.
        gain: of the own head over the pooled one, in accuracy, from and to with 95 % confidence.
        gain_over_others: the same over the others' head.
    """

    rows: int
    right: Mapping[str, int]
    p_value: float
    gain: tuple[float, float]
    gain_over_others: tuple[float, float]

    @property
    def accuracies(self) -> dict[str, float]:
        """The share of rows that each of the `HEADS` has right; that of `others` is leave-one-site-out."""
        return {name: right / self.rows for name, right in self.right.items()}


def compare(joint: Tensor | Sequence[Sequence[Sequence[int]]]) -> Comparison | None:
    """Compare heads by joint counts of right answers.

    Args:
        joint: `[2, 2, 2]`, as `count_jointly` returns it.

    Returns:
        None if there are no rows.

    Raises:
        ValueError: if the counts have another shape, or one is negative.
    """
    counts = torch.as_tensor(joint)
    if counts.shape != (2, 2, 2) or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(f"Joint counts of {len(HEADS)} heads must be [2, 2, 2] numbers of rows, not {joint}.")
    rows = int(counts.sum())
    if rows == 0:
        return None
    own_pooled, own_others = counts.sum(2), counts.sum(1)
    better, worse = int(own_pooled[1, 0]), int(own_pooled[0, 1])
    return Comparison(
        rows=rows,
        right={name: int(counts.select(axis, 1).sum()) for axis, name in enumerate(HEADS)},
        p_value=_sign_test(better, worse),
        gain=_paired_interval(better, worse, rows),
        gain_over_others=_paired_interval(int(own_others[1, 0]), int(own_others[0, 1]), rows),
    )


def _sign_test(better: int, worse: int) -> float:
    """Return how likely heads of equal merit differ so much or more, in either direction."""
    n = torch.tensor(better + worse, dtype=torch.float64)
    k = torch.arange(max(better, worse), better + worse + 1, dtype=torch.float64)
    chances = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(1.0, 2 * float(chances.exp().sum()))


def _paired_interval(better: int, worse: int, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired shares (Bonett & Price, JEBS, 2012)."""
    up, down, total = (better + 1) / (rows + 2), (worse + 1) / (rows + 2), rows + 2
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / total)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


@dataclass(frozen=True)
class SiteDiagnosis:
    """How a site stands to the pool, and what it might do about it.

    Attributes:
        site: its name.
        recommendation: what to do.
        finding: what its rows look like beside the other sites'.
        reason: why, in words.
        rows: the training rows it has.
        classes: how many classes they are of.
        shift: how its rows differ; None if nothing could be compared.
        comparison: how the heads do on its held-out rows; None if there are none.
    """

    site: str
    recommendation: Recommendation
    finding: Finding
    reason: str
    rows: int
    classes: int
    shift: Shift | None
    comparison: Comparison | None

    @property
    def sentence(self) -> str:
        """Recommendation and reason, for the site's engineer."""
        return f"{self.site}: {self.recommendation}. {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        values = asdict(self)
        if self.shift:
            values["shift"]["look_like"] = {str(mine): theirs for mine, theirs in self.shift.look_like.items()}
        if self.comparison:
            values["comparison"]["accuracies"] = self.comparison.accuracies
        return {**values, "sentence": self.sentence}


def diagnose(
    site: str, shift: Shift | None, comparison: Comparison | None, counts: Tensor, classes: Sequence[str]
) -> SiteDiagnosis:
    """Say how a site stands to the pool, and recommend what to do.

    Rows that are unlike the others' are a reason to stay local, unless the pooled head serves the site
    better than its own all the same (McNemar's test at 5 %), or the others' head does not serve it worse. If
    they are not, a head of its own must be better, by the same test, to be recommended beside the shared
    one. Where neither is better, the site can tell only if it has rows enough to rule out a difference that is
    `WORTHWHILE`.

    Args:
        site: its name.
        shift: what `shift` or `shifts` found.
        comparison: what `compare` found.
        counts: `[C]`, the site's training rows of each class.
        classes: `C` names.
    """
    finding = _finding(shift, comparison, counts)
    recommendation = _recommendation(finding, comparison, counts)
    on_heads = _on_heads(finding, recommendation, comparison, counts)
    return SiteDiagnosis(
        site=site,
        recommendation=recommendation,
        finding=finding,
        reason=f"{_on_rows(finding, shift, classes)} {on_heads}",
        rows=int(counts.sum()),
        classes=int((counts > 0).sum()),
        shift=shift,
        comparison=comparison,
    )


def _finding(shift: Shift | None, comparison: Comparison | None, counts: Tensor) -> Finding:
    if shift is None:
        return "unknown"
    if not shift.shifted and not shift.muddled:
        return "alike" if shift.alike else "unknown"
    skilled = any(_has_skill(comparison, name, counts) for name in ("own", "others"))
    if shift.contrast is not None and shift.contrast < MIN_CONTRAST and not skilled:
        return "labels look wrong"
    far = sum(distance >= MIN_DISTANCE for distance in shift.distances)
    taken = len(set(shift.look_like.values()))
    exchanged = 2 * taken > far and taken >= min(2, len(shift.classes))
    return "classes look exchanged" if exchanged else "images look different"


def _has_skill(comparison: Comparison | None, head: str, counts: Tensor) -> bool:
    """Tell whether a head has half of the rows right that guessing the site's commonest class has wrong."""
    if comparison is None:
        return False
    guessed = float(counts.max() / counts.sum().clamp(min=1))
    return comparison.accuracies[head] > (1 + guessed) / 2


def _recommendation(finding: Finding, comparison: Comparison | None, counts: Tensor) -> Recommendation:
    unlike = finding not in ("alike", "unknown")
    if comparison is None or finding == "labels look wrong":
        return "stay local" if unlike else "not enough rows to tell"
    differ = comparison.p_value < _HEAD_LEVEL
    worse = differ and comparison.right["own"] < comparison.right["pooled"]
    harmless = comparison.gain_over_others[1] < WORTHWHILE and _has_skill(comparison, "others", counts)
    if unlike:
        return "join" if harmless or (worse and _has_skill(comparison, "pooled", counts)) else "stay local"
    if differ and not worse and int((counts > 0).sum()) > 1:
        return "join with a local head"
    return "join" if worse or comparison.gain[1] < WORTHWHILE else "not enough rows to tell"


def _on_rows(finding: Finding, shift: Shift | None, classes: Sequence[str]) -> str:
    """Say what a site's rows look like beside the others'."""
    if shift is None:
        return (
            "Its rows cannot be compared: either there is no class of which both this site and the others have "
            f"{MIN_CLASS_ROWS} rows, or the features do not tell classes apart."
        )
    distance = f"by {shift.distance:.2f} of the distance between two classes, where {MIN_DISTANCE} is much"
    if finding == "alike":
        return f"Its rows look like the other sites' rows of the same classes (they differ {distance})."
    if finding == "unknown":
        return f"Its rows differ from the other sites' rows of the same classes {distance}, but that may be chance."
    if finding == "classes look exchanged":
        pairs = (f"those labelled {classes[mine]!r} like {classes[its]!r}" for mine, its in shift.look_like.items())
        return f"Its rows look like the other sites' rows of other classes: {', '.join(pairs)}. Check its class names."
    if finding == "labels look wrong":
        return (
            f"Its labels look wrong: rows with different labels look alike (they differ by {shift.contrast:.2f} of "
            "what they do elsewhere). Check that images and labels belong together."
        )
    most = max(zip(shift.distances, shift.classes, strict=True))[1]
    return (
        f"Its rows look unlike the other sites' rows of the same classes (they differ {distance}; the most for "
        f"{classes[most]!r}). Check for other equipment, inverted or otherwise prepared images, or labels that "
        "mean something else."
    )


def _on_heads(finding: Finding, recommendation: Recommendation, comparison: Comparison | None, counts: Tensor) -> str:
    """Say how the heads do on a site's held-out rows, and what follows."""
    if comparison is None:
        return "It has no held-out rows to try a head on."
    rows, right = comparison.rows, comparison.right
    tally = (
        f"Of its {rows} held-out row{'s' * (rows > 1)} the shared head has {right['pooled']} right, a head of its "
        f"own {right['own']} and the other sites' head {right['others']}"
    )
    return tally + _conclusion(finding, recommendation, comparison, counts)


def _conclusion(finding: Finding, recommendation: Recommendation, comparison: Comparison, counts: Tensor) -> str:
    most = f"{max(comparison.gain[1], 0.0):.0%}"
    if recommendation == "stay local":
        return "."
    if recommendation == "not enough rows to tell":
        return f"; a head of its own might still be {most} better."
    if recommendation == "join with a local head":
        return f": beside the shared head it needs one of its own (p = {comparison.p_value:.2g})."
    if comparison.p_value < _HEAD_LEVEL and comparison.right["own"] < comparison.right["pooled"]:
        return f": it gains from the others (p = {comparison.p_value:.2g})."
    if finding not in ("alike", "unknown"):
        return ": the difference does no harm."
    if int((counts > 0).sum()) < 2:
        return "; with rows of one class its own can only say that one."
    return f"; a head of its own is at most {most} better."


@dataclass(frozen=True)
class ClassCoverage:
    """Who holds a class.

    Attributes:
        name: of the class.
        rows: how many of its rows there are, at all sites.
        sites: how many sites hold some.
        largest_site: the site that holds the most; empty if there are none.
        share: that site's share of the rows.
    """

    name: str
    rows: int
    sites: int
    largest_site: str
    share: float

    @property
    def rests_on_one_site(self) -> bool:
        """Whether one site holds more than `DOMINANCE` of the rows: if it leaves, so does the class."""
        return self.rows > 0 and self.share > DOMINANCE

    @property
    def sentence(self) -> str:
        """Who holds it, in words."""
        if not self.rows:
            return f"No site has rows of class {self.name!r}: no head can learn it."
        held = f"Class {self.name!r} has {self.rows} rows at {self.sites} site{'s' * (self.sites > 1)}"
        if not self.rests_on_one_site:
            return f"{held}."
        part = "all of them" if self.sites == 1 else f"{self.share:.0%} of them"
        return f"{held}, {part} at {self.largest_site}: the class rests on that site."

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        return {**asdict(self), "rests_on_one_site": self.rests_on_one_site, "sentence": self.sentence}


def coverage(counts_by_site: Mapping[str, Tensor], classes: Sequence[str]) -> list[ClassCoverage]:
    """Say of each class who holds it.

    Args:
        counts_by_site: each site's rows of each class, `[C]`.
        classes: `C` names.
    """
    names = sorted(counts_by_site)
    counts = torch.stack([counts_by_site[name] for name in names]) if names else torch.zeros(1, len(classes))
    covered = []
    for column, name in zip(counts.T.tolist(), classes, strict=True):
        rows, most = int(sum(column)), max(column)
        covered.append(
            ClassCoverage(
                name=name,
                rows=rows,
                sites=sum(count > 0 for count in column),
                largest_site=names[column.index(most)] if rows else "",
                share=most / rows if rows else 0.0,
            )
        )
    return covered
