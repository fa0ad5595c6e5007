"""The four exchanges of a secure sum as arrays of bytes, validated on receipt.

`Opening` and `Unmasking` go from a site to the coordinator, `Openings` and `Agreements` from the coordinator to a site;
masked vectors are checked by `Layout.check`, and sets of sites by `Survivors`. Sites are in the order of the context.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhead.secure import SecureSumError
from fedhead.secure.roster import SIGNATURE_BYTES, Roster
from fedhead.secure.sealing import SEALED_BYTES
from fedhead.secure.session import Context
from fedhead.secure.shamir import SHARE_BYTES
from fedhead.sums.sums import Arrays, check_form

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PublicKeys:
    """The public part of a site's opening, which the site signs.

    Attributes:
        ephemeral: X25519; the shares are sealed with it.
        mask: X25519; pairs of sites derive their masks from it.
        commitment: to the seed of the site's own mask; see `commit`.
        sealed: digest of everything that the site sealed; see `Opening`.
    """

    ephemeral: bytes
    mask: bytes
    commitment: bytes
    sealed: bytes

    def text(self, digest: bytes, site: str) -> bytes:
        """Return the message that the site signs, given `h` of the context."""
        parts = (self.ephemeral, self.mask, self.commitment, self.sealed)
        return b"fedhead secure opening\0" + digest + b"".join(parts) + site.encode()

    def to_array(self) -> Bytes:
        """Return the four parts as `[4, 32]`."""
        return np.stack([_array(part) for part in (self.ephemeral, self.mask, self.commitment, self.sealed)])

    @classmethod
    def from_array(cls, array: Bytes) -> Self:
        """Undo `to_array`."""
        return cls(*(row.tobytes() for row in array))


@dataclass(frozen=True)
class Opening:
    """A site's reply to `open`.

    Attributes:
        keys: the public keys.
        signature: of the site, over the keys and the context.
        sealed: for each site of the context, the shares sealed for it.
        commitments: for each site of the context, `commit` of its share of the seed and of its share of the mask key.
    """

    keys: PublicKeys
    signature: bytes
    sealed: tuple[bytes, ...]
    commitments: tuple[tuple[bytes, bytes], ...]

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire."""
        return {
            "keys": self.keys.to_array(),
            "signature": _array(self.signature),
            "sealed": np.stack([_array(sealed) for sealed in self.sealed]),
            "commitments": np.stack([_array(b"".join(pair)).reshape(2, 32) for pair in self.commitments]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, context: Context) -> Self:
        """Undo `to_arrays`, validating names, types and shapes.

        Raises:
            SecureSumError: if anything differs.
        """
        count = len(context.sites)
        _check(
            arrays,
            {
                "keys": (4, 32),
                "signature": (SIGNATURE_BYTES,),
                "sealed": (count, SEALED_BYTES),
                "commitments": (count, 2, 32),
            },
        )
        return cls(
            PublicKeys.from_array(arrays["keys"]),
            arrays["signature"].tobytes(),
            tuple(row.tobytes() for row in arrays["sealed"]),
            tuple((one.tobytes(), other.tobytes()) for one, other in arrays["commitments"]),
        )


def sealed_digest(sealed: tuple[bytes, ...], commitments: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Return the digest of everything that a site sealed, 32 bytes."""
    digest = hashlib.sha256(b"fedhead secure sealed\0")
    for shares, pair in zip(sealed, commitments, strict=True):
        digest.update(shares + b"".join(pair))
    return digest.digest()


def commit(secret: bytes, digest: bytes, purpose: str, *names: str) -> bytes:
    """Return a commitment to a secret of 256 random bits, which needs no salt.

    Args:
        secret: a seed or a share.
        digest: `h` of the context.
        purpose: `seed`, `seed share` or `mask key share`.
        names: the site whose secret it is; for a share, then its holder.
    """
    about = "\0".join((purpose, *names)).encode()
    return hashlib.sha256(b"fedhead secure commit\0" + digest + secret + about).digest()


@dataclass(frozen=True)
class Openings:
    """The public keys of all sites that opened, with their signatures.

    Attributes:
        keys: by site, in the order of the context.
        signatures: by site.
    """

    keys: Mapping[str, PublicKeys]
    signatures: Mapping[str, bytes]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of sites and keys, 32 bytes."""
        digest = hashlib.sha256(b"fedhead secure openings\0")
        for name, keys in self.keys.items():
            digest.update(name.encode() + b"\0" + keys.to_array().tobytes())
        return digest.digest()

    @property
    def masks(self) -> dict[str, bytes]:
        """The mask keys by site."""
        return {name: keys.mask for name, keys in self.keys.items()}

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays for the wire; the names of the sites go beside them."""
        return {
            "keys": np.stack([keys.to_array() for keys in self.keys.values()]),
            "signatures": np.stack([_array(signature) for signature in self.signatures.values()]),
        }

    @classmethod
    def from_arrays(cls, sites: tuple[str, ...], arrays: Arrays, context: Context) -> Self:
        """Undo `to_arrays`, validating sites, names, types and shapes.

        Raises:
            SecureSumError: if anything differs.
        """
        check_sites(sites, context)
        _check(arrays, {"keys": (len(sites), 4, 32), "signatures": (len(sites), SIGNATURE_BYTES)})
        keys = {name: PublicKeys.from_array(row) for name, row in zip(sites, arrays["keys"], strict=True)}
        return cls(keys, _signatures(sites, arrays["signatures"]))

    def check(self, context: Context, roster: Roster) -> None:
        """Check that enough sites opened, that each signed its keys, and that no key occurs twice.

        Raises:
            SecureSumError: if not.
        """
        require_threshold(len(self.keys), context, "opened")
        digest = context.digest
        for name, keys in self.keys.items():
            if not roster.sites[name].verify(self.signatures[name], keys.text(digest, name)):
                raise SecureSumError(f"The opening of {name} is not signed by it.")
        distinct = {key for keys in self.keys.values() for key in (keys.ephemeral, keys.mask, keys.commitment)}
        if len(distinct) < 3 * len(self.keys):
            raise SecureSumError("Two openings have the same key.")


@dataclass(frozen=True)
class Agreements:
    """Signatures of sites that agreed to a set of survivors.

    Attributes:
        signatures: by site, in the order of the context.
    """

    signatures: Mapping[str, bytes]

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the array for the wire; the names of the sites go beside it."""
        return {"signatures": np.stack([_array(signature) for signature in self.signatures.values()])}

    @classmethod
    def from_arrays(cls, sites: tuple[str, ...], arrays: Arrays, context: Context) -> Self:
        """Undo `to_arrays`, validating sites, names, types and shapes.

        Raises:
            SecureSumError: if anything differs.
        """
        check_sites(sites, context)
        _check(arrays, {"signatures": (len(sites), SIGNATURE_BYTES)})
        return cls(_signatures(sites, arrays["signatures"]))


def agreement_text(digest: bytes, openings: bytes, survivors: tuple[str, ...]) -> bytes:
    """Return the message by which a site agrees to survivors, given `h` and the digest of the openings it saw."""
    return b"fedhead secure agreement\0" + digest + openings + "\0".join(survivors).encode()


def signature_to_arrays(signature: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a reply to `agree`."""
    return {"signature": _array(signature)}


def signature_from_arrays(arrays: Arrays) -> bytes:
    """Undo `signature_to_arrays`, validating everything.

    Raises:
        SecureSumError: if a name, type or shape differs.
    """
    _check(arrays, {"signature": (SIGNATURE_BYTES,)})
    return arrays["signature"].tobytes()


def shares_to_arrays(shares: Mapping[str, bytes]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a reply to `unmask`: one share for each opened site, in the order of the context."""
    return {"shares": np.stack([_array(share) for share in shares.values()])}


def shares_from_arrays(sites: tuple[str, ...], arrays: Arrays) -> dict[str, bytes]:
    """Undo `shares_to_arrays`, validating names, types and shapes.

    Raises:
        SecureSumError: if anything differs.
    """
    _check(arrays, {"shares": (len(sites), SHARE_BYTES)})
    return {name: row.tobytes() for name, row in zip(sites, arrays["shares"], strict=True)}


def sealed_to_array(sealed: Mapping[str, bytes]) -> Bytes:
    """Return the shares sealed for one site, by sender, as `[m, SEALED_BYTES]`."""
    return np.stack([_array(one) for one in sealed.values()])


def sealed_from_array(sites: tuple[str, ...], array: npt.NDArray[Any]) -> dict[str, bytes]:
    """Undo `sealed_to_array`, validating type and shape.

    Raises:
        SecureSumError: if one differs.
    """
    _check({"sealed": array}, {"sealed": (len(sites), SEALED_BYTES)})
    return {name: row.tobytes() for name, row in zip(sites, array, strict=True)}


def check_sites(sites: tuple[str, ...], context: Context) -> None:
    """Check that sites are distinct sites of the context, in its order.

    Raises:
        SecureSumError: if not.
    """
    if list(sites) != sorted(set(sites) & set(context.sites)):
        raise SecureSumError(
            "A message of the secure sum lists sites that are repeated, unsorted or not in its context."
        )


def require_threshold(count: int, context: Context, what: str) -> None:
    """Check that enough sites did something.

    Raises:
        SecureSumError: if not.
    """
    if count < context.threshold:
        raise SecureSumError(
            f"The secure sum was given up: {count} of {len(context.sites)} sites {what}, and its threshold is "
            f"{context.threshold}. Nothing was revealed."
        )


def _array(content: bytes) -> Bytes:
    return np.frombuffer(content, np.uint8)


def _signatures(sites: tuple[str, ...], array: Bytes) -> dict[str, bytes]:
    return {name: row.tobytes() for name, row in zip(sites, array, strict=True)}


def _check(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        check_form(arrays, {name: np.empty(shape, np.uint8) for name, shape in shapes.items()})
    except ValueError as error:
        raise SecureSumError(f"A message of the secure sum is invalid: {error}.") from None
