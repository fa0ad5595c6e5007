"""Real numbers and counts as elements of a ring of integers, where sums are exact and do not depend on their order.

Elements are uint64 arrays `[limbs, n]`, the least significant limb first: two limbs for integers modulo `2^128`, with
64 fraction bits for real numbers; one limb for integers modulo `2^64`, with 32 fraction bits. Negative numbers are in
two's complement. A sum of `terms` encoded numbers decodes to the true sum as long as each is below
`largest(limbs, terms)`, which encoding checks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.secure import SecureSumError, UnsummableError

Elements = npt.NDArray[np.uint64]
"""`[limbs, n]` elements of the ring."""

FloatArray = npt.NDArray[np.float64]

FRACTION_BITS = {1: 32, 2: 64}
"""Fraction bits of real numbers by the number of limbs."""

_HALF = np.uint64(2**63)


def largest(limbs: int, terms: int, *, integers: bool = False) -> float:
    """Return the bound that the magnitude of each of `terms` numbers must stay below.

    Args:
        limbs: 1 or 2.
        terms: the number of sites.
        integers: whether for counts, which have no fraction bits; else for real numbers.
    """
    return 2.0 ** (63 if integers or limbs == 2 else 63 - FRACTION_BITS[limbs]) / terms


def encode(values: npt.NDArray[Any], limbs: int, terms: int) -> Elements:
    """Encode real numbers `[n]`, rounded to the nearest multiple of `2^-64` or `2^-32`.

    Raises:
        UnsummableError: if a number is not finite, or so large that a sum of `terms` such numbers could overflow.
    """
    real = values.astype(np.float64, copy=False)
    size = np.abs(real)
    _check(size, largest(limbs, terms))
    if limbs == 1:
        scaled = np.rint(real * 2.0 ** FRACTION_BITS[1])
        # Among very many sites, rounding up can reach the bound.
        _check(np.abs(scaled) * 2.0 ** -FRACTION_BITS[1], largest(limbs, terms))
        return scaled.astype(np.int64).view(np.uint64)[None]
    whole = np.floor(size)
    elements = np.empty((2, len(real)), np.uint64)
    # The fraction has at most 53 significant bits, so it rounds to less than 2^64.
    elements[0] = np.rint((size - whole) * 2.0**64)
    elements[1] = whole
    _negate_where(real < 0, elements)
    return elements


def encode_integers(values: npt.NDArray[Any], limbs: int, terms: int) -> Elements:
    """Encode integers `[n]` exactly.

    Raises:
        UnsummableError: if a number is so large that a sum of `terms` such numbers could overflow.
    """
    if values.dtype.kind == "u" and (values > np.uint64(2**63 - 1)).any():
        raise _too_large(largest(limbs, terms, integers=True))
    integers = values.astype(np.int64, copy=False)
    # Comparing in int64: 2^63 / terms is not exact in float64 for large counts.
    most = (2**63 - 1) // terms
    if (integers > most).any() or (integers < -most).any():
        raise _too_large(largest(limbs, terms, integers=True))
    top = integers.view(np.uint64)
    return top[None].copy() if limbs == 1 else np.stack([np.zeros_like(top), top])


def decode(elements: Elements) -> FloatArray:
    """Decode elements `[limbs, n]` to real numbers `[n]`, rounded to float64."""
    if len(elements) == 1:
        scaled: FloatArray = elements[0].view(np.int64).astype(np.float64)
        return scaled * 2.0 ** -FRACTION_BITS[1]
    negative = elements[1] >= _HALF
    size = elements.copy()
    _negate_where(negative, size)
    real: FloatArray = size[1].astype(np.float64) + size[0].astype(np.float64) * 2.0**-64
    np.negative(real, where=negative, out=real)
    return real


def decode_integers(elements: Elements) -> npt.NDArray[np.int64]:
    """Decode elements `[limbs, n]` to integers `[n]`.

    Raises:
        SecureSumError: if an element is no integer, since a site encoded something else.
    """
    if len(elements) == 2 and elements[0].any():
        raise SecureSumError("A secure sum of counts is no integer: a site masked something else.")
    integers: npt.NDArray[np.int64] = elements[-1].copy().view(np.int64)
    return integers


def add(total: Elements, other: Elements) -> None:
    """Add elements to `total` in place."""
    np.add(total[0], other[0], out=total[0])
    if len(total) == 2:
        carry = total[0] < other[0]
        np.add(total[1], other[1], out=total[1])
        np.add(total[1], carry, out=total[1])


def subtract(total: Elements, other: Elements) -> None:
    """Subtract elements from `total` in place."""
    if len(total) == 2:
        borrow = total[0] < other[0]
        np.subtract(total[1], other[1], out=total[1])
        np.subtract(total[1], borrow, out=total[1])
    np.subtract(total[0], other[0], out=total[0])


def _negate_where(negative: npt.NDArray[np.bool_], elements: Elements) -> None:
    """Negate elements of two limbs in place: invert all bits and add one."""
    flip = np.where(negative, ~np.uint64(0), np.uint64(0))
    elements ^= flip
    elements[0] += negative
    elements[1] += negative & (elements[0] == 0)


def _check(size: FloatArray, bound: float) -> None:
    if not np.isfinite(size).all():
        raise UnsummableError("A value to sum is not finite.")
    if (size >= bound).any():
        raise _too_large(bound)


def _too_large(bound: float) -> UnsummableError:
    return UnsummableError(f"A value to sum is too large: secure summation takes magnitudes below {bound:.3g}.")
