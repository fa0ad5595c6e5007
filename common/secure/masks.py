"""Masks of a secure sum: pseudorandom vectors that cancel pairwise, and each site's own.

Two sites agree on a key by X25519 (RFC 7748) and HKDF-SHA256 (RFC 5869), salted with the digest `h` of the session's
context; the first of the two in the order of names adds the mask, the other subtracts it. Limb `k` of a mask is the
ChaCha20 key stream (RFC 8439) under nonce `k`, read as little-endian uint64. Masks are expanded and added block by
block, so memory does not grow with the vector.
"""

import sys
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedhead.secure import SecureSumError
from fedhead.secure.fixed_point import Elements, add, subtract

KEY_BYTES = 32
BLOCK = 8192
"""Elements of a limb that are expanded at a time: few enough to stay in a processor's cache."""

_ZEROS = bytes(8 * BLOCK)


def new_private_key() -> bytes:
    """Return a new X25519 private key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key, 32 bytes, of a private key of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, digest: bytes, purpose: str, names: tuple[str, str]) -> bytes:
    """Return the key that two sites share for one purpose.

    Args:
        private: the X25519 private key of one site.
        public: the X25519 public key of the other.
        digest: `h` of the context, the salt.
        purpose: separates keys of different uses.
        names: the two sites, in an order that both know.

    Raises:
        SecureSumError: if the public key is one of the few that give every site the same secret.
    """
    try:
        secret = _loaded(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("A key of the secure sum is no valid X25519 key.") from None
    return derive(secret, digest, purpose, *names)


def derive(secret: bytes, digest: bytes, purpose: str, *names: str) -> bytes:
    """Return a key of 32 bytes derived from a secret, for one purpose of one session."""
    info = b"fedhead " + purpose.encode() + b"".join(b"\0" + name.encode() for name in names)
    return HKDF(SHA256(), KEY_BYTES, digest, info).derive(secret)


def own_mask_key(seed: bytes, digest: bytes, name: str) -> bytes:
    """Return the key of the mask that a site adds by itself, from its seed `b`."""
    return derive(seed, digest, "own mask", name)


def pair_mask_key(private: bytes, public: bytes, digest: bytes, own: str, other: str) -> bytes:
    """Return the key of the mask between two sites, the same at both.

    Raises:
        SecureSumError: as `agree` does.
    """
    return agree(private, public, digest, "pair mask", (min(own, other), max(own, other)))


def add_mask(vector: Elements, key: bytes, *, negative: bool = False) -> None:
    """Add a mask to a vector `[limbs, n]` in place, or subtract it."""
    streams = [_stream(key, limb) for limb in range(len(vector))]
    block = np.empty((len(vector), BLOCK), np.uint64)
    fold = subtract if negative else add
    for start in range(0, vector.shape[1], BLOCK):
        part = vector[:, start : start + BLOCK]
        for stream, limb in zip(streams, block, strict=True):
            stream.update_into(_ZEROS, limb.view(np.uint8).data)
        if sys.byteorder == "big":
            block.byteswap(inplace=True)
        fold(part, block[:, : part.shape[1]])


def mask(
    vector: Elements, seed: bytes, private: bytes, publics: Mapping[str, bytes], digest: bytes, name: str
) -> Elements:
    """Return a site's vector with its own mask and those between it and every other site.

    Args:
        vector: `[limbs, n]`, the site's part of the sum; not modified.
        seed: of the site's own mask, 32 bytes.
        private: the site's mask key.
        publics: the mask keys of the other sites by name; the site's own is skipped.
        digest: `h` of the context.
        name: of the site.

    Raises:
        SecureSumError: if a key is invalid.
    """
    masked = vector.copy()
    add_mask(masked, own_mask_key(seed, digest, name))
    for other, public in publics.items():
        if other != name:
            add_mask(masked, pair_mask_key(private, public, digest, name, other), negative=name > other)
    return masked


def remove_own_mask(total: Elements, seed: bytes, digest: bytes, name: str) -> None:
    """Remove the own mask of a site whose vector is in `total`, in place."""
    add_mask(total, own_mask_key(seed, digest, name), negative=True)


def remove_pair_masks(total: Elements, name: str, private: bytes, publics: Mapping[str, bytes], digest: bytes) -> None:
    """Remove the masks that the sites in `total` share with a site that is not in it, in place.

    Args:
        total: the sum of the masked vectors.
        name: of the site that is missing.
        private: its mask key, recovered from shares.
        publics: the mask keys of the sites in `total`, by name.
        digest: `h` of the context.
    """
    for other, public in publics.items():
        key = pair_mask_key(private, public, digest, name, other)
        # The other site added this mask if its name comes first; undo this.
        add_mask(total, key, negative=other < name)


@lru_cache(maxsize=4)
def _loaded(private: bytes) -> X25519PrivateKey:
    """Load a key; this derives its public key, which takes as long as an agreement does."""
    return X25519PrivateKey.from_private_bytes(private)


def _stream(key: bytes, limb: int) -> CipherContext:
    nonce = bytes(4) + limb.to_bytes(12, "little")
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor()
