"""Shares sealed for one site: ChaCha20-Poly1305 (RFC 8439) under a key that the sender makes for this session.

The key is HKDF(X25519(sender's ephemeral key, receiver's roster key)) with the digest `h` of the context as salt and
both names as info. It encrypts one message only, so the nonce is constant.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedhead.secure import SecureSumError
from fedhead.secure.masks import agree
from fedhead.secure.shamir import SHARE_BYTES

_NONCE = bytes(12)
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Length of two shares sealed for a site."""


def seal(shares: tuple[bytes, bytes], ephemeral: bytes, public: bytes, digest: bytes, names: tuple[str, str]) -> bytes:
    """Encrypt a share of a site's seed and one of its mask key for another site.

    Args:
        shares: of the seed and of the mask key, 33 bytes each.
        ephemeral: the sender's private key of this session.
        public: the receiver's sealing key in the roster.
        digest: `h` of the context.
        names: the sender and the receiver.

    Raises:
        SecureSumError: if the receiver's key is invalid.
    """
    key = agree(ephemeral, public, digest, "share", names)
    return ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(shares), digest)


def unseal(
    sealed: bytes, private: bytes, ephemeral: bytes, digest: bytes, names: tuple[str, str]
) -> tuple[bytes, bytes]:
    """Decrypt the shares of a site's seed and of its mask key.

    Args:
        sealed: `SEALED_BYTES` bytes.
        private: the receiver's sealing key, which belongs to its key in the roster.
        ephemeral: the sender's public key of this session.
        digest: `h` of the context.
        names: the sender and the receiver.

    Raises:
        SecureSumError: if the sender did not seal this for this receiver and session.
    """
    key = agree(private, ephemeral, digest, "share", names)
    try:
        shares = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, digest)
    except InvalidTag:
        shares = b""
    if len(shares) != 2 * SHARE_BYTES:
        raise SecureSumError(f"The shares that {names[0]} sealed for {names[1]} were changed on the way.")
    return shares[:SHARE_BYTES], shares[SHARE_BYTES:]
