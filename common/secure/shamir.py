"""Secret sharing over a prime field (Shamir, 1979, "How to share a secret").

A secret of 32 bytes is the value at 0 of a random polynomial of degree `threshold - 1` modulo `PRIME`; the share of the
site at position `x` (from 1) is its value at `x`. Fewer than `threshold` shares tell nothing about the secret.
"""

import secrets
from collections.abc import Mapping, Sequence

from fedhead.secure import SecureSumError

PRIME = 2**256 + 297
"""The smallest prime above all secrets of 32 bytes."""

SECRET_BYTES, SHARE_BYTES = 32, 33


def share(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a secret into `count` shares of 33 bytes, for the positions 1 to `count`, any `threshold` of which give it.

    Raises:
        ValueError: if the secret has not 32 bytes, or the threshold is not from 1 to `count`.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes cannot be shared {threshold} of {count}.")
    # From the highest coefficient to the secret itself, as Horner's rule takes them.
    polynomial = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    return [_value(polynomial, position).to_bytes(SHARE_BYTES, "big") for position in range(1, count + 1)]


def coefficients(positions: Sequence[int]) -> dict[int, int]:
    """Return Lagrange's coefficients at 0 by position; compute them once for all secrets of the same survivors."""
    result = {}
    for own in positions:
        numerator = denominator = 1
        for other in positions:
            if other != own:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - own) % PRIME
        result[own] = numerator * pow(denominator, -1, PRIME) % PRIME
    return result


def combine(shares: Mapping[int, bytes], at_zero: Mapping[int, int]) -> bytes | None:
    """Return the secret of 32 bytes, or None if the shares belong to no such secret.

    Args:
        shares: by position; as many as the threshold.
        at_zero: `coefficients` of exactly these positions.

    Raises:
        SecureSumError: if a share is no element of the field.
    """
    total = sum(number(shares[position]) * factor for position, factor in at_zero.items()) % PRIME
    return total.to_bytes(SECRET_BYTES, "big") if total.bit_length() <= 8 * SECRET_BYTES else None


def number(share: bytes) -> int:
    """Return a share as an element of the field.

    Raises:
        SecureSumError: if it is none.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise SecureSumError("A share of a secret is no element of the field.")
    return value


def _value(polynomial: Sequence[int], position: int) -> int:
    result = 0
    for coefficient in polynomial:
        result = (result * position + coefficient) % PRIME
    return result
