"""Signatures by which a request proves which key's owner sent it, and that nobody changed or repeats it.

Flower's own node authentication signs a timestamp alone. It lets an interceptor add headers to a request, so a site
of ours also signs the request itself: its path, the digest of its body, a nonce, and every header of ours. A stock
SuperLink ignores these headers; our coordinator demands them.
"""

import base64
import binascii
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    sign_message,
    verify_signature,
)

SIGNED_PREFIX = "x-fedhead-"
"""Every header whose name begins so is signed."""
DIGEST_HEADER, NONCE_HEADER = "x-fedhead-digest", "x-fedhead-nonce"
SIGNATURE_HEADER = "x-fedhead-signature"
MOST_NONCES = 4096
MOST_KEY_BYTES = 1024
"""Limit on a public key as PEM, which may have any text around the key; keys are cached before they prove anything."""


class IdentityError(Exception):
    """A request does not prove its sender; `reason` says why in a word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Proof:
    """Proof of a request's sender.

    Attributes:
        key: the public key, as PEM, whose owner signed it.
        nonce: of this request alone.
        signed: when it was signed, in seconds since 1970, by the sender's clock.
        digest: SHA-256 of its body, in hexadecimal.
    """

    key: bytes
    nonce: bytes
    signed: float
    digest: str

    def covers(self, body: bytes) -> bool:
        """Return whether this is the body that was signed."""
        return hashlib.sha256(body).hexdigest() == self.digest


def signed_headers(
    key: EllipticCurvePrivateKey, path: str, body: bytes, headers: Mapping[str, str], timestamp: str = ""
) -> dict[str, str]:
    """Return the headers by which a POST request proves to come from a key's owner.

    Args:
        key: the sender's.
        path: of the request.
        body: of the request.
        headers: the others that it will have; those with `SIGNED_PREFIX` are signed, with names in lower case.
        timestamp: by which the request says when it was signed; by default now.
    """
    timestamp = timestamp or flower_now().isoformat()
    ours = {name: value for name, value in headers.items() if name.startswith(SIGNED_PREFIX)}
    ours |= {DIGEST_HEADER: hashlib.sha256(body).hexdigest(), NONCE_HEADER: secrets.token_hex(16)}
    text = _signed_text(path, timestamp, {name.encode(): value.encode() for name, value in ours.items()})
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: timestamp,
        **ours,
        SIGNATURE_HEADER: base64.b64encode(sign_message(key, text)).decode(),
    }


def proof(path: str, headers: Mapping[bytes, bytes], now: datetime | None = None) -> Proof:
    """Return the proof of the signer of a recent POST request; the caller compares its body.

    Args:
        path: of the request.
        headers: with names in lower case.
        now: the time; by default of the clock.

    Raises:
        IdentityError: if nobody did: `unsigned`, `partly` (a timestamp alone is signed), `clock` (signed long ago, or
            in the future) or `forged`.
    """
    try:
        public = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        if len(public) > MOST_KEY_BYTES:
            raise IdentityError("unsigned")
        timestamp = headers[TIMESTAMP_HEADER.encode()].decode("ascii")
        signed = datetime.fromisoformat(timestamp)
        age = ((now or flower_now()) - signed).total_seconds()
    except (KeyError, ValueError, TypeError, binascii.Error):
        raise IdentityError("unsigned") from None
    try:
        signature = base64.b64decode(headers[SIGNATURE_HEADER.encode()], validate=True)
        nonce, digest = headers[NONCE_HEADER.encode()], headers[DIGEST_HEADER.encode()].decode("ascii")
    except (KeyError, ValueError, binascii.Error):
        raise IdentityError("partly") from None
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        raise IdentityError("clock")
    ours = {
        name: value
        for name, value in headers.items()
        if name.startswith(SIGNED_PREFIX.encode()) and name != SIGNATURE_HEADER.encode()
    }
    try:
        genuine = verify_signature(_public_key(public), _signed_text(path, timestamp, ours), signature)
    except (ValueError, TypeError, AttributeError, InvalidSignature):
        genuine = False
    if not genuine or len(nonce) != 32:
        raise IdentityError("forged")
    return Proof(public, nonce, signed.timestamp(), digest)


class Nonces:
    """The nonces of one key's recent requests, by which a repeated request is known.

    Memory is bounded: when there are too many, the oldest is forgotten, and requests that were signed no later than it
    are refused.

    Args:
        most: that are remembered.
    """

    def __init__(self, most: int = MOST_NONCES) -> None:
        self._most = most
        self._seen: dict[bytes, float] = {}
        self._forgotten_until = float("-inf")

    def is_new(self, sent: Proof, now: float) -> bool:
        """Return whether a request is new, and remember it.

        Args:
            sent: proof of the request, which is recent.
            now: the time, in seconds since 1970.
        """
        if sent.signed <= self._forgotten_until or sent.nonce in self._seen:
            return False
        self._seen[sent.nonce] = sent.signed
        while self._seen:
            oldest = next(iter(self._seen))
            if len(self._seen) > self._most:
                self._forgotten_until = max(self._forgotten_until, self._seen[oldest])
            elif self._seen[oldest] > now - TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE:
                break
            del self._seen[oldest]
        return True


def _signed_text(path: str, timestamp: str, ours: Mapping[bytes, bytes]) -> bytes:
    lines = [b"%s: %s" % (name, ours[name]) for name in sorted(ours)]
    return b"\n".join([b"POST " + path.encode(), timestamp.encode(), *lines])


@lru_cache(maxsize=4096)
def _public_key(pem: bytes) -> EllipticCurvePublicKey:
    return bytes_to_public_key(pem)
