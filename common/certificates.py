"""Certificates' validity, and requests by which a site has its own key registered."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from fedhead.errors import UserError
from fedhead.files import safe_name
from fedhead.wording import one_line

WARN_DAYS = 30
"""Days before its expiry from which a certificate's users are warned."""


MAX_REQUEST_BYTES = 16_384

SEALING_KEY = x509.ObjectIdentifier("2.25.131560430018834613126174066018373514271")
"""Attribute of a request with the site's X25519 key for secure sums, in hexadecimal; the OID is a random UUID."""


def site_request(name: str, key: ec.EllipticCurvePrivateKey, sealing: bytes = b"") -> bytes:
    """Return a PEM request (PKCS #10) to register a site's keys, signed with the first.

    Args:
        name: of the site, the request's common name.
        key: on the curve P-256.
        sealing: the site's X25519 public key for secure sums, 32 bytes; empty for none.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if sealing:
        builder = builder.add_attribute(SEALING_KEY, sealing.hex().encode())
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_request(path: Path) -> tuple[str, bytes]:
    """Return the name and the public key, as PEM, of a request that its key has signed.

    Raises:
        UserError: if the file cannot be read, or holds no such request.
    """
    name, key, _ = _parsed(path)
    return name, key


def read_sealing_key(path: Path) -> bytes | None:
    """Return the X25519 public key for secure sums in a request; None if it has none.

    Raises:
        UserError: if the file cannot be read, or holds no request with a valid key.
    """
    return _parsed(path)[2]


def _parsed(path: Path) -> tuple[str, bytes, bytes | None]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_REQUEST_BYTES + 1)
    except OSError as error:
        raise UserError(f"The request {path} cannot be read: {error.strerror}.") from None
    try:
        if len(content) > MAX_REQUEST_BYTES:
            raise ValueError(f"it is longer than {MAX_REQUEST_BYTES} bytes")
        request, key = _loaded(content)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("its key is not on the curve P-256")
        if not request.is_signature_valid:
            raise ValueError("it is not signed with its own key")
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if len(names) == 1 else ""
        if safe_name(name) != name:
            raise ValueError("its common name is no site's name: up to 64 of a-z, 0-9, - and _")
        sealing = _sealing_key(request)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise UserError(
            f"{path} is no request by fedhead site init: {one_line(str(error), 200)}. Ask the site for a new one."
        ) from None
    return name, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), sealing


def _loaded(content: bytes) -> tuple[x509.CertificateSigningRequest, Any]:
    """Return a request and its key.

    Raises:
        ValueError: if it is malformed; the parser's message is for programmers.
    """
    try:
        request = x509.load_pem_x509_csr(content)
        return request, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ValueError("it cannot be parsed") from None


def _sealing_key(request: x509.CertificateSigningRequest) -> bytes | None:
    try:
        value = request.attributes.get_attribute_for_oid(SEALING_KEY).value
    except x509.AttributeNotFound:
        return None
    sealing = bytes.fromhex(value.decode())
    if len(sealing) != 32:
        raise ValueError("its key for secure sums is not 32 bytes")
    return sealing


def fingerprint(key: bytes) -> str:
    """Return a short digest of a public key, to compare by eye."""
    digest = Hash(SHA256())
    digest.update(key)
    return digest.finalize().hex()[:16]


def valid_until(path: Path) -> datetime:
    """Return until when the certificate in a PEM file is valid.

    Raises:
        UserError: if the file cannot be read, or holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{path} holds no certificate in PEM form.") from None


def expiry_warning(path: Path, remedy: str, now: datetime | None = None) -> str:
    """Return a sentence if a certificate has expired or soon will, with what to do about it; else nothing.

    Args:
        path: a PEM file.
        remedy: a sentence.
        now: the time, by default this machine's.
    """
    until = valid_until(path)
    left = until - (now or datetime.now(UTC))
    if left.days >= WARN_DAYS:
        return ""
    day = f"{until:%Y-%m-%d}"
    said = f"expired on {day}" if left.total_seconds() < 0 else f"expires on {day}, in {left.days} days"
    return f"The certificate {path} {said}. {remedy}"
