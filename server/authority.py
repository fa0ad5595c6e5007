"""The private certificate authority of a kit, and the coordinator's certificate."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhead.errors import UserError
from fedhead.files import write_atomically

AUTHORITY_DAYS = 3650
_BEFORE = timedelta(hours=1)
"""Certificates are valid from a little before they are made, since clocks differ."""


def authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return the certificate of a new authority, signed by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedhead certificate authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return (
        _certificate(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def write_server(
    folder: Path,
    host: str,
    also: Sequence[str],
    days: int,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> None:
    """Write a new key and certificate of a coordinator: `server.key` and `server.pem`.

    Args:
        folder: takes them.
        host: that sites connect to.
        also: its further names or addresses.
        days: for how long the certificate is valid.
        authority: the authority's certificate.
        authority_key: its key.

    Raises:
        UserError: if a name is neither a host's name nor an address.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = dict.fromkeys([host, *also, "localhost", "127.0.0.1", "::1"])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    certificate = (
        _certificate(subject, authority.subject, key.public_key(), authority_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative_name(name) for name in names]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    write_private(folder / "server.key", key)
    write_public(folder / "server.pem", pem(certificate))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(days=days)) - _BEFORE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def alternative_name(name: str) -> x509.GeneralName:
    """Return a host's name or address as certificates hold it.

    Raises:
        UserError: if it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise UserError(f"{name!r} is neither a host's name nor an address.") from None


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key that its owner alone can read, as files written atomically are."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomically(path, pem)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that everybody may read."""
    write_atomically(path, content)
    path.chmod(0o644)
