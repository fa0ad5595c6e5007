"""Exact accounting for Gaussian mechanisms.

A Gaussian mechanism is described by one number, `mu`: its sensitivity over its standard deviation. Releases about the
same rows compose to `mu^2 = sum mu_k^2`, however later ones depend on the results of earlier ones (Dong, Roth and Su,
2022, "Gaussian differential privacy", corollary 2).
"""

import math
from collections.abc import Callable, Iterable

MOST_MU = 1e3
"""Upper limit of `mu_for`: such a release protects nothing."""

_TAIL = -30.0


def compose(mus: Iterable[float]) -> float:
    """Return the `mu` of all releases together."""
    return math.sqrt(math.fsum(mu * mu for mu in mus))


def delta_for(mu: float, epsilon: float) -> float:
    """Return the smallest `delta` for which `mu` satisfies `(epsilon, delta)`-differential privacy.

    `Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)` (Balle and Wang, 2018, theorem 8).

    Args:
        mu: 0 or more; 0 for no release.
        epsilon: 0 or more.

    Raises:
        ValueError: if one is negative or not a number.
    """
    if not (mu >= 0 and epsilon >= 0):
        raise ValueError(f"mu and epsilon must be 0 or more, not {mu} and {epsilon}.")
    if mu == 0:
        return 0.0
    near = _log_normal_cdf(mu / 2 - epsilon / mu)
    far = epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu)
    return -math.exp(near) * math.expm1(min(far - near, 0.0))


def epsilon_for(mu: float, delta: float) -> float:
    """Return the smallest `epsilon` for which `mu` satisfies `(epsilon, delta)`-differential privacy.

    Raises:
        ValueError: if `mu` is negative or `delta` is not between 0 and 1.
    """
    _require_delta(delta)
    if delta_for(mu, 0) <= delta:
        return 0.0
    high = 1.0
    while delta_for(mu, high) > delta:
        high *= 2
    return _boundary(lambda epsilon: delta_for(mu, epsilon) <= delta, high, 0.0)


def mu_for(epsilon: float, delta: float) -> float:
    """Return the largest `mu` that satisfies `(epsilon, delta)`-differential privacy, at most `MOST_MU`.

    Raises:
        ValueError: if `epsilon` is negative or `delta` is not between 0 and 1.
    """
    _require_delta(delta)
    if delta_for(MOST_MU, epsilon) <= delta:
        return MOST_MU
    return _boundary(lambda mu: delta_for(mu, epsilon) <= delta, 0.0, MOST_MU)


def _boundary(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the number nearest to `outside` for which a monotone condition still holds, to rounding."""
    while (middle := (inside + outside) / 2) not in (inside, outside):
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}.")


def _log_normal_cdf(x: float) -> float:
    if x > _TAIL:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # Mills' ratio as an asymptotic series: its first omitted term is below 1e-9.
    square = 1 / (x * x)
    series = 1 - square * (1 - 3 * square * (1 - 5 * square * (1 - 7 * square)))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)
