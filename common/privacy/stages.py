"""The releases of a private run: the sums of each, their shares of its `mu^2`, and their sensitivities.

Site and coordinator both derive a release's noise from here, so that a request names no noise: only its `mu`.
"""

import math
from typing import Literal

from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.noise import FloatArray

Stage = Literal["centre", "lda", "nearest-mean", "gradient", "calibration", "evaluation"]
"""`centre`: the mean of the rows. `lda`: counts, class sums and Gram matrix. `nearest-mean`: counts and class sums.
`gradient`: of the cross entropy of a head, each row's limited to a norm of `CLIP`.
`calibration`: how much surer than right a head is, at several temperatures. `evaluation`: of a head, on held-out
rows."""

LOSS_LIMIT = 8.0
"""Losses of rows count as at most this many nats."""

CENTRE_SHARE = 0.05
"""Share of the training rows' `mu^2` that their centre spends; the sums about it spend the rest."""

CALIBRATION_NOISE = 0.02
"""Standard deviation of the noise on a mean confidence for which a calibration spends, but at most
`MOST_CALIBRATION`."""

MOST_CALIBRATION = 0.05
"""Largest share of the training rows' `mu^2` that the calibration of the head spends."""

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Temperatures at which a head's confidence is compared with its accuracy."""

CLIP = 0.5
"""Largest norm of a row's gradient by weight and bias; without a limit it is at most 1.5."""

BIAS_FEATURE = 0.3
"""Feature of every row that the bias weighs in a gradient, beside those of norm 1: 1 would take up half of `CLIP`."""

LARGEST_WEIGHT = 1e6
"""Bar on the weights of a head for unit-norm rows; larger ones saturate every loss."""

LEAST_ROUNDS = 10
"""Least number of rounds that are worth their share: fewer do not come near the minimum of the cross entropy."""

ROUNDS_NOISE = 0.005
"""Least `noise_level` for which rounds are worth their share."""

NAMES_SHARE = 0.2
"""Share of the `mu^2` of sums and rounds together for class sums, which test whether names of classes are near."""

LDA_NOISE = 0.12
"""Largest `noise_level` for which the Gram matrix is worth its share."""

LARGEST_NOISE = 0.1
"""Largest standard deviation of the noise on a mean confidence for which a calibration is made."""

BINS = 10
"""Bins of equal width of the predicted class's probability."""

Form = tuple[float, tuple[int, ...], float]
"""A share of `mu^2`, a shape and a sensitivity."""


def forms(stage: Stage, classes: int, features: int) -> dict[str, Form]:
    """Return the arrays of a release.

    Rows have norm at most 1, and each row, or all rows of a group together, weigh 1. A row adds to one class, one
    cell and one bin.

    Args:
        stage: the release.
        classes: `C`.
        features: `d`.
    """
    if stage == "centre":
        return {"count": (0.1, (1,), 1.0), "total": (0.9, (features,), 1.0)}
    if stage == "evaluation":
        return {
            "outcomes": (0.6, (2,), 1.0),
            "loss": (0.1, (1,), LOSS_LIMIT),
            "confusion": (0.2, (classes, classes), 1.0),
            "reliability": (0.1, (2, BINS), 1.0),
        }
    if stage == "gradient":
        return {"gradient": (1.0, (classes, features + 1), CLIP)}
    if stage == "calibration":
        return {"excess": (1.0, (len(TEMPERATURES),), math.sqrt(len(TEMPERATURES)))}
    if stage == "nearest-mean":
        return {"counts": (0.02, (classes,), 1.0), "sums": (0.98, (classes, features), 1.0)}
    return {
        "counts": (0.02, (classes,), 1.0),
        "sums": (0.63, (classes, features), 1.0),
        "gram": (0.35, (features * (features + 1) // 2,), 1.0),
    }


def mechanism(stage: Stage, mu: float, classes: int, features: int) -> Mechanism:
    """Return the mechanism that spends `mu` on a release.

    Raises:
        ValueError: if `mu` is too small for noise of the lattice's fineness.
    """
    return Mechanism.split(mu, forms(stage, classes, features))


def noise_level(rows: float, classes: int, features: int, mu: float) -> float:
    """Return the noise on the mean of a class: its norm if one release of all class sums spent the whole budget.

    Args:
        rows: about how many rows there are, as far as it is public.
        classes: `C`.
        features: `d`.
        mu: that all sums may spend.
    """
    return classes * math.sqrt(features + 1) / (mu * max(rows, 1.0))


def better_solver(level: float) -> Literal["lda", "nearest-mean"]:
    """Return which sums to ask for, given the `noise_level`, from public figures alone.

    Where class means are noisy, the noise on the Gram matrix hides all but the largest eigenvalues of the covariance,
    and all of the budget goes to class sums.
    """
    return "lda" if level < LDA_NOISE else "nearest-mean"


def descends(level: float, rounds: int) -> bool:
    """Return whether rounds of noisy gradients are better than a head solved from sums, given the `noise_level`.

    The limited gradient of a row carries more about the boundary between classes than the row's part of the class sums,
    in as few numbers. Only where there is little noise does discriminant analysis come as near in one release.
    """
    return rounds >= LEAST_ROUNDS and level >= ROUNDS_NOISE


def calibration_share(rows: float, mu: float) -> float:
    """Return the share of `mu^2` that a calibration spends, from public figures alone; 0 where none is worth it.

    Args:
        rows: about how many rows there are, as far as it is public.
        mu: of the training rows' account.
    """
    unit = forms("calibration", 1, 1)["excess"][2] / (mu * max(rows, 1.0))
    if unit / math.sqrt(MOST_CALIBRATION) >= LARGEST_NOISE:
        return 0.0
    return min((unit / CALIBRATION_NOISE) ** 2, MOST_CALIBRATION)


def temperature_from(excess: FloatArray, sigma: float) -> float:
    """Return the largest temperature at which a head is not less sure than right by more than the noise.

    Too high a temperature costs little, too low a one much.

    Args:
        excess: for each of `TEMPERATURES`, the sum over rows of the confidence less 1 for a right prediction.
        sigma: the standard deviation of the noise.
    """
    kept = [one for one, sure in zip(TEMPERATURES, excess.tolist(), strict=True) if sure >= -sigma]
    return max(kept, default=TEMPERATURES[0])


def centre_of(count: float, total: FloatArray, sigma: float) -> FloatArray:
    """Return the mean `[d]` of rows from a noisy count and sum, shrunk by the share of its length that is noise.

    Args:
        count: of rows.
        total: `[d]`, their sum.
        sigma: the standard deviation of the noise on each entry of `total`.
    """
    length = float(total @ total)
    kept = max(0.0, 1 - len(total) * sigma**2 / length) if length else 0.0
    mean: FloatArray = total * (kept / max(count, 1.0))
    # A mean of rows of norm 1 is no longer than 1.
    return mean / max(1.0, math.sqrt(float(mean @ mean)))
