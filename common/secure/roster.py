"""Roster: the sites that may take part in secure sums, with their public keys, signed by the consortium's authority.

The author of the roster decides with which sites a site shares its masks, so this must not be the coordinator: the
authority signs `roster.toml`, and every site pins its digest. People compare the digest by telephone, as eight words of
five letters (`fingerprint`)::

    authority = "..."                  # P-256, the compressed point in base64
    signature = "..."                  # ECDSA over the digest, by the authority; missing before it signs

    [sites.hospital-a]
    signing = "..."                    # P-256, the compressed point in base64
    sealing = "..."                    # X25519, 32 bytes in base64
"""

import base64
import hashlib
import json
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

import tomli_w
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedhead.errors import UserError
from fedhead.files import write_atomically
from fedhead.protocol.fields import wrong_fields
from fedhead.secure import SecureSumError

MOST_SITES = 1000
MAX_ROSTER_BYTES = 1_048_576

SIGNATURE_BYTES = 64
"""Length of an ECDSA signature over P-256: `r` and `s`, 32 bytes each."""

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"
_FINGERPRINT_BYTES = 16


def _decode(text: str, size: int) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("it is not base64") from None
    if len(key) != size or encode(key) != text:
        raise ValueError(f"it is not {size} bytes in base64")
    return key


def encode(key: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(key).decode()


def _is_signing_key(text: str) -> str:
    _point(text)
    return text


def _is_sealing_key(text: str) -> str:
    _decode(text, 32)
    return text


@lru_cache(maxsize=4 * MOST_SITES)
def _point(text: str) -> ec.EllipticCurvePublicKey:
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), _decode(text, 33))


SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
SigningKey = Annotated[str, Field(max_length=44), AfterValidator(_is_signing_key)]
SealingKey = Annotated[str, Field(max_length=44), AfterValidator(_is_sealing_key)]


class Member(BaseModel):
    """A site's public keys in base64.

    Attributes:
        signing: P-256, a compressed point; verifies the site's openings and agreements.
        sealing: X25519; encrypts shares for the site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    signing: SigningKey
    sealing: SealingKey

    @property
    def sealing_bytes(self) -> bytes:
        """The sealing key, 32 bytes."""
        return _decode(self.sealing, 32)

    @property
    def signing_pem(self) -> bytes:
        """The signing key as PEM, as kits and requests have it."""
        return _point(self.signing).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Return whether the site signed a message."""
        return verify(self.signing, signature, message)


class Roster(BaseModel):
    """The sites of a consortium, signed or to be signed.

    Attributes:
        authority: the key of the consortium's authority.
        sites: the sites by name; no key occurs twice.
        signature: of the authority, in base64; empty before it signs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    authority: SigningKey
    sites: Annotated[dict[SiteName, Member], Field(min_length=1, max_length=MOST_SITES)]
    signature: Annotated[str, Field(max_length=88)] = ""

    @model_validator(mode="after")
    def _keys_are_distinct(self) -> Self:
        keys = [key for member in self.sites.values() for key in (member.signing, member.sealing)]
        if len(set(keys)) < len(keys):
            raise ValueError("two sites have the same key")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the authority and the sites, in hexadecimal; the signature is not part of it."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The digest in words, to compare by telephone; see `fingerprint`."""
        return fingerprint(self.digest)

    @property
    def _content(self) -> bytes:
        sites = {name: [member.signing, member.sealing] for name, member in self.sites.items()}
        content = {"fedhead roster": 1, "authority": self.authority, "sites": sites}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    def signed(self, key: ec.EllipticCurvePrivateKey) -> Self:
        """Return the roster with the signature of its authority.

        Raises:
            UserError: if this is not the authority's key.
        """
        if signing_text(key.public_key()) != self.authority:
            raise UserError("This key is not the key of the roster's authority.")
        return self.model_copy(update={"signature": encode(sign(key, self._content))})

    def verify(self) -> None:
        """Check the authority's signature.

        Raises:
            SecureSumError: if there is none, or another key made it, or the roster was changed afterwards.
        """
        if not self.signature:
            raise SecureSumError("The roster is not signed: its authority signs it with fedhead roster sign.")
        try:
            signature = base64.b64decode(self.signature, validate=True)
        except ValueError:
            signature = b""
        if not verify(self.authority, signature, self._content):
            raise SecureSumError("The roster was changed after its authority signed it, or another key signed it.")

    def to_toml(self) -> str:
        """Return the content of `roster.toml`."""
        head = {"authority": self.authority} | ({"signature": self.signature} if self.signature else {})
        return tomli_w.dumps({**head, "sites": {name: member.model_dump() for name, member in self.sites.items()}})

    def save(self, path: Path) -> None:
        """Write `roster.toml` atomically.

        Raises:
            UserError: if it may not be written.
            FedheadError: if the disk is full.
        """
        write_atomically(path, self.to_toml())

    @classmethod
    def parse(cls, content: bytes, where: str) -> Self:
        """Read the content of a `roster.toml`; its signature is not checked.

        Args:
            content: the file.
            where: how to name it in an error.

        Raises:
            UserError: if it is no roster.
        """
        try:
            if len(content) > MAX_ROSTER_BYTES:
                raise ValueError(f"it is longer than {MAX_ROSTER_BYTES} bytes")
            return cls(**tomllib.loads(content.decode()))
        except ValidationError as error:
            wrong = wrong_fields(error) or "its keys, of which one is repeated"
            raise UserError(f"{where} is no roster: missing or wrong are {wrong}.") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is no roster: {error}.") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `roster.toml`; its signature is not checked.

        Raises:
            UserError: if the file cannot be read, or is no roster.
        """
        try:
            with path.open("rb") as file:
                content = file.read(MAX_ROSTER_BYTES + 1)
        except OSError as error:
            raise UserError(f"The roster {path} cannot be read: {error.strerror}.") from None
        return cls.parse(content, str(path))


def fingerprint(digest: str) -> str:
    """Return the first 128 bits of a hexadecimal digest as eight words of five letters, such as `lusab-babad`.

    Each word is 16 bits: consonants have 4 bits, vowels 2 (Wilkerson, 2009, "A Proposal for Proquints"). Making two
    rosters with the same fingerprint takes 2^64 attempts, and one with the fingerprint of another 2^128.
    """
    words = []
    content = bytes.fromhex(digest)[:_FINGERPRINT_BYTES]
    for at in range(0, len(content), 2):
        bits = int.from_bytes(content[at : at + 2], "big")
        letters = (
            _CONSONANTS[bits >> 12],
            _VOWELS[bits >> 10 & 3],
            _CONSONANTS[bits >> 6 & 15],
            _VOWELS[bits >> 4 & 3],
        )
        words.append("".join(letters) + _CONSONANTS[bits & 15])
    return "-".join(words)


def signing_text(key: ec.EllipticCurvePublicKey) -> str:
    """Return a P-256 public key as a roster has it."""
    return encode(key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint))


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return the ECDSA signature of a message: `r` and `s`, 64 bytes."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def verify(public: str, signature: bytes, message: bytes) -> bool:
    """Return whether the owner of a roster's P-256 key signed a message."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        _point(public).verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True
