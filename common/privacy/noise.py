"""Discrete Gaussian noise on a lattice, sampled exactly from the operating system's random generator.

Floating-point noise added to floating-point sums gives the sums away in its last digits (Mironov, 2012). Here sums are
rounded to multiples of a power of two, and noise is an integer multiple of it with exactly the probabilities of the
discrete Gaussian: only integers are drawn and compared, as Canonne, Kamath and Steinke (2020, algorithms 1 to 3) do.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

FINENESS = 22
"""A lattice has between `2^FINENESS` and `2^(FINENESS + 1)` units to a standard deviation."""

LARGEST_DEVIATION = 2**23
"""In lattice units: up to it the sampler's products of integers fit 63 bits."""

_EXACT = 2.0**53
_BATCH = 2**17

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Entropy = Callable[[int], bytes]
"""Returns so many bytes that nobody can predict."""


@dataclass(frozen=True)
class Lattice:
    """Noise of one standard deviation, and the lattice on which sums and noise are integers.

    Attributes:
        unit: a power of two.
        deviation: of the noise, in units.
    """

    unit: float
    deviation: int

    @classmethod
    def of(cls, sigma: float) -> Self:
        """Return the lattice for noise of standard deviation `sigma`, or more by at most a unit.

        Raises:
            ValueError: if `sigma` is not positive and finite.
        """
        if not 0 < sigma < math.inf:
            raise ValueError(f"The standard deviation of noise must be positive, not {sigma}.")
        unit = 2.0 ** (math.frexp(sigma)[1] - 1 - FINENESS)
        return cls(unit, math.ceil(sigma / unit))

    @property
    def sigma(self) -> float:
        """The standard deviation."""
        return self.unit * self.deviation

    def sensitivity(self, exact: float, size: int) -> float:
        """Return the sensitivity of `size` rounded sums whose exact values have sensitivity `exact`.

        Rounding moves each sum by half a unit, in both neighbouring data sets, and float64 summation by far less than
        another half.
        """
        return exact + 2 * math.sqrt(size) * self.unit

    def add(self, sums: FloatArray, parties: float = 1.0, copies: int = 1, entropy: Entropy = os.urandom) -> FloatArray:
        """Round sums to the lattice, and add one party's noise, so that `parties` of them add up to `sigma`.

        Args:
            sums: any shape, float64.
            parties: whose noises add up to the variance `sigma^2`; each adds its share of it.
            copies: the number of parties that these sums already speak for; their noises are added at once.
            entropy: of the noise.

        Returns:
            Multiples of the unit, exact in float64, and so is the sum of as many as 2^53 units hold.

        Raises:
            ValueError: if a sum is not finite or too large for the lattice.
        """
        if copies > parties:
            # Noise beyond sigma has a coarser lattice of its own.
            return Lattice.of(self.sigma * math.sqrt(copies / parties)).add(sums, entropy=entropy)
        rounded = np.rint(sums / self.unit)
        if not (np.abs(rounded) < _EXACT / 2).all():
            raise ValueError("A sum is not finite or too large for noise of this size.")
        share = math.ceil(self.deviation * math.sqrt(copies / parties))
        drawn = rounded.astype(np.int64) + sample(share, sums.size, entropy).reshape(sums.shape)
        return drawn.astype(np.float64) * self.unit


def sample(deviation: int, size: int, entropy: Entropy = os.urandom) -> IntArray:
    """Return `[size]` integers with probabilities proportional to `exp(-y^2 / (2 deviation^2))`.

    Raises:
        ValueError: if `deviation` is below 1 or above `LARGEST_DEVIATION`.
    """
    if not 1 <= deviation <= LARGEST_DEVIATION:
        raise ValueError(f"The standard deviation must be from 1 to {LARGEST_DEVIATION} units, not {deviation}.")
    drawn = np.empty(size, np.int64)
    done = 0
    while done < size:
        # A little less than half of the proposals are taken.
        proposed = _laplace(deviation, min(_BATCH, 2 * (size - done) + 64), entropy)
        numerator, denominator = (np.abs(proposed) - deviation) ** 2, 2 * deviation**2
        taken = _bernoulli_exp(numerator % denominator, denominator, entropy)
        whole = numerator // denominator
        taken[taken] = _count_ones(whole[taken], entropy) == whole[taken]
        left = proposed[taken][: size - done]
        drawn[done : done + len(left)] = left
        done += len(left)
    return drawn


def _laplace(scale: int, proposals: int, entropy: Entropy) -> IntArray:
    """Return integers with probabilities proportional to `exp(-|y| / scale)`, fewer than `proposals`."""
    rest = _below(np.full(proposals, scale, np.int64), entropy)
    rest = rest[_bernoulli_exp(rest, scale, entropy)]
    values = rest + scale * _count_ones(np.full(len(rest), 2**31 // scale), entropy)
    negative = np.frombuffer(entropy(len(values)), np.uint8) < 128
    # Otherwise 0 would come with both signs.
    values, negative = values[kept := ~(negative & (values == 0))], negative[kept]
    signed: IntArray = np.where(negative, -values, values)
    return signed


def _count_ones(most: IntArray, entropy: Entropy) -> IntArray:
    """Return how many times in a row, at most `most`, an event of probability `1/e` happens."""
    counts = np.zeros(len(most), np.int64)
    running = np.flatnonzero(most > 0)
    while len(running):
        running = running[_bernoulli_exp(np.ones(len(running), np.int64), 1, entropy)]
        counts[running] += 1
        running = running[counts[running] < most[running]]
    return counts


def _bernoulli_exp(numerator: IntArray, denominator: int, entropy: Entropy) -> npt.NDArray[np.bool_]:
    """Return events of probability `exp(-numerator / denominator)`, for ratios from 0 to 1.

    The number of successes before the first failure of events of probabilities `ratio / k`, `k = 1, 2, ...`, is even
    with that probability (von Neumann, 1951).
    """
    even = np.ones(len(numerator), np.bool_)
    running, step = np.arange(len(numerator)), 1
    while len(running):
        bounds = np.full(len(running), denominator * step, np.int64)
        running = running[_below(bounds, entropy) < numerator[running]]
        even[running] ^= True
        step += 1
    return even


def _below(bounds: IntArray, entropy: Entropy) -> IntArray:
    """Return uniform integers from 0 to below each of equal positive `bounds`."""
    if not len(bounds):
        return bounds
    bound = int(bounds[0])
    mask = (1 << (bound - 1).bit_length()) - 1
    drawn = np.empty(len(bounds), np.int64)
    missing = np.arange(len(bounds))
    while len(missing):
        words = np.frombuffer(entropy(8 * len(missing)), "<u8") & np.uint64(mask)
        drawn[missing] = words.astype(np.int64)
        missing = missing[drawn[missing] >= bound]
    return drawn
