"""A release with noise: named arrays, each with its share of one `mu`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

import numpy as np
import numpy.typing as npt

from fedhead.errors import UserError
from fedhead.privacy.accountant import compose
from fedhead.privacy.noise import FINENESS, Entropy, FloatArray, Lattice


@dataclass(frozen=True)
class Noised:
    """One array of a release.

    Attributes:
        shape: of the array.
        sensitivity: the most that one row, or one group, moves it, in Euclidean norm.
        lattice: its noise.
    """

    shape: tuple[int, ...]
    sensitivity: float
    lattice: Lattice

    @property
    def mu(self) -> float:
        """The sensitivity of the rounded array over the standard deviation."""
        size = int(np.prod(self.shape))
        return self.lattice.sensitivity(self.sensitivity, size) / self.lattice.sigma

    @classmethod
    def within(cls, mu: float, shape: tuple[int, ...], sensitivity: float = 1.0) -> Self:
        """Return the array with the least noise whose `mu` is no larger than given.

        Raises:
            UserError: if no noise of this fineness does.
        """
        # A unit is at most sigma / 2^FINENESS.
        rounding = 2 * sqrt(int(np.prod(shape))) / 2**FINENESS
        if not mu > rounding:
            raise UserError(
                f"A privacy budget of mu {mu:.2g} is too small for {int(np.prod(shape))} sums: raise epsilon."
            )
        return cls(shape, sensitivity, Lattice.of(sensitivity / (mu - rounding)))


@dataclass(frozen=True)
class Mechanism:
    """Arrays by name that are released together, with independent noise."""

    arrays: Mapping[str, Noised]

    @classmethod
    def split(cls, mu: float, shares: Mapping[str, tuple[float, tuple[int, ...], float]]) -> Self:
        """Divide `mu^2` among arrays.

        Args:
            mu: of all together.
            shares: by name, an array's share of `mu^2`, its shape and its sensitivity; shares sum to at most 1.

        Raises:
            ValueError: if the shares are more than all.
        """
        if sum(share for share, _, _ in shares.values()) > 1 + 1e-12:
            raise ValueError("The shares of a budget sum to more than 1.")
        return cls(
            {
                name: Noised.within(mu * sqrt(share), shape, sensitivity)
                for name, (share, shape, sensitivity) in shares.items()
            }
        )

    @property
    def mu(self) -> float:
        """Of all arrays together."""
        return compose(array.mu for array in self.arrays.values())

    def sigma(self, name: str) -> float:
        """Return the standard deviation of one array's noise."""
        return self.arrays[name].lattice.sigma

    def add_noise(
        self,
        sums: Mapping[str, npt.NDArray[np.float64]],
        parties: float = 1.0,
        copies: int = 1,
        entropy: Entropy = os.urandom,
    ) -> dict[str, FloatArray]:
        """Return one party's noised sums; see `Lattice.add`.

        Raises:
            ValueError: if names or shapes differ from the mechanism's, or a sum is too large.
        """
        if sums.keys() != self.arrays.keys():
            raise ValueError(f"The sums are {sorted(sums)} instead of {sorted(self.arrays)}.")
        noised = {}
        for name, array in self.arrays.items():
            if sums[name].shape != array.shape:
                raise ValueError(f"{name!r} is {list(sums[name].shape)} instead of {list(array.shape)}.")
            noised[name] = array.lattice.add(sums[name], parties, copies, entropy)
        return noised
