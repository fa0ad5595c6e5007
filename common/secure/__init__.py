"""Secure summation: a coordinator learns the sum of the sites' vectors, and no site's own.

Double masking (Bonawitz et al., 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning") among the
sites of a signed roster. The modules are pure functions and states over tensors and bytes:

- `fixed_point`, `layout`: named arrays as one vector over the ring of integers modulo `2^128` or `2^64`, and back.
- `masks`: key agreement, and pseudorandom vectors that cancel in the sum.
- `shamir`, `sealing`: shares of the secrets behind the masks, each encrypted for one site.
- `roster`: who may take part, signed by the consortium's authority.
- `session`: the context of one summation, which every key and signature depends on.
"""

from fedhead.errors import FedheadError


class SecureSumError(FedheadError):
    """A secure summation that cannot continue, with the reason; it contains no values of any site."""


class UnsummableError(SecureSumError):
    """Values that cannot be summed. Whether there are any depends on a site's rows, so it is not told apart by site."""
