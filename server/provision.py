"""Keys, certificates and a kit per site: who may connect to a coordinator, and how each side knows the other.

A folder of kits is laid out as::

    kit/ca.pem, kit/ca.key          the private certificate authority; its key stays with who provisions
    kit/coordinator/                 server.pem, server.key, ca.pem, sites.toml, coordinator.toml
    kit/NAME/                        site.toml, ca.pem, key.pem, key.pub

`coordinator/` and each `NAME/` are complete in themselves, to be copied to the machine they are for.
"""

import ipaddress
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhead.addresses import split_address
from fedhead.certificates import expiry_warning, valid_until
from fedhead.errors import UserError
from fedhead.files import safe_name, write_atomically
from fedhead.messages import CALIBRATE, COMPARE, DESCRIBE, EVALUATE, INSTALL, REPORT, STANDARDISE, STATISTICS, TRAIN

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
_BEFORE = timedelta(hours=1)
"""Certificates are valid from a little before they are made, since clocks differ."""
_RESERVED = "coordinator"

ACTIONS: Mapping[str, str] = {
    DESCRIBE: "say whether it can take part, and with how many rows",
    INSTALL: "take in the backbone's weights",
    STATISTICS: "send sums over its rows: counts, class sums and the Gram matrix of features",
    STANDARDISE: "take in the pooled mean and scale",
    TRAIN: "train a head and send it",
    EVALUATE: "count how a head does on held-out rows",
    REPORT: "the same in detail, for the report",
    CALIBRATE: "sum how far a head's probabilities come true on held-out rows",
    COMPARE: "compare three heads on held-out rows, for the diagnosis",
}
"""What a coordinator may ask of a site; its `site.toml` lists what it permits."""


@dataclass(frozen=True)
class CoordinatorKit:
    """What a coordinator knows and shows.

    Attributes:
        folder: where it lies.
        address: `HOST:PORT` that sites connect to.
        listen: `HOST:PORT` that the coordinator listens on.
        sites: each registered site's public key, as PEM, by name.
        revoked: the names of those that are no longer, by public key.
    """

    folder: Path
    address: str
    listen: str
    sites: Mapping[str, bytes]
    revoked: Mapping[bytes, str]

    @property
    def certificate(self) -> Path:
        """The coordinator's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """Its private key."""
        return self.folder / "server.key"

    @property
    def registry(self) -> Path:
        """The file that lists the sites."""
        return self.folder / "sites.toml"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a coordinator's folder.

        Raises:
            UserError: if something is missing or is not what it should be.
        """
        for name in ("server.pem", "server.key", "ca.pem", "sites.toml", "coordinator.toml"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} is not a coordinator's kit: {name} is missing. fedhead provision makes one, in "
                    "kit/coordinator."
                )
        settings = _toml(folder / "coordinator.toml")
        registry = _toml(folder / "sites.toml")
        try:
            address, listen = str(settings["address"]), str(settings["listen"])
            sites = {str(name): _canonical(key) for name, key in registry.get("sites", {}).items()}
            revoked = {_canonical(entry["key"]): str(entry["site"]) for entry in registry.get("revoked", [])}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} is not a coordinator's kit as fedhead provision writes it ({error}).") from None
        for name in sites:
            check_site_name(name)
        if len(set(sites.values())) < len(sites):
            raise UserError(f"{folder / 'sites.toml'} registers one key for two sites; each needs its own.")
        split_address(address)
        split_address(listen)
        return cls(folder, address, listen, sites, revoked)

    def write_registry(self) -> None:
        """Write `sites.toml`."""
        content = {
            "sites": {name: key.decode() for name, key in sorted(self.sites.items())},
            "revoked": [{"site": name, "key": key.decode()} for key, name in self.revoked.items()],
        }
        text = "# The sites that may connect, by public key. A running coordinator reads changes within seconds.\n\n"
        write_atomically(self.registry, text + tomli_w.dumps(content, multiline_strings=True))


def provision(
    out: Path,
    coordinator: str,
    sites: Sequence[str],
    also: Sequence[str] = (),
    days: int = SERVER_DAYS,
) -> CoordinatorKit:
    """Make a certificate authority, the coordinator's kit and one for each site.

    Args:
        out: a new or empty folder.
        coordinator: `HOST:PORT` that sites connect to.
        sites: their names.
        also: further names or addresses of the coordinator, for its certificate.
        days: for how long that certificate is valid.

    Raises:
        UserError: if the folder holds something, or a name or address cannot be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder. To change a kit: --add-site, --revoke or --renew.")
    host, port = split_address(coordinator)
    if port == 0:
        raise UserError(f"{coordinator!r} names no port; expected HOST:PORT, as in coord.example.org:9092.")
    _check_new_names(sites, ())
    for name in (host, *also):
        _alternative(name)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = _authority_certificate(authority_key)
    _write_private(out / "ca.key", authority_key)
    _write_public(out / "ca.pem", _pem(authority))
    folder = out / _RESERVED
    _write_public(folder / "ca.pem", _pem(authority))
    _write_server(folder, host, also, days, authority, authority_key)
    listen = f"[::]:{port}" if ":" in host else f"0.0.0.0:{port}"
    _write_public(
        folder / "coordinator.toml", _COORDINATOR.format(address=_quoted(coordinator), listen=listen).encode()
    )
    kit = CoordinatorKit(folder, coordinator, listen, {}, {})
    kit.write_registry()
    return add_sites(out, sites)


def add_sites(out: Path, names: Sequence[str]) -> CoordinatorKit:
    """Make a kit for each further site, and register its key.

    Raises:
        UserError: if `out` is no folder of kits, or a name is taken or cannot be used.
    """
    kit = CoordinatorKit.read(out / _RESERVED)
    _check_new_names(names, kit.sites)
    for name in names:
        if (out / name).exists():
            raise UserError(f"{out / name} exists already; move the old kit of {name} away first.")
    keys = {}
    for name in names:
        folder = out / name
        # Each request is signed: with P-384 that would take most of the coordinator's time.
        private = ec.generate_private_key(ec.SECP256R1())
        keys[name] = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        _write_private(folder / "key.pem", private)
        _write_public(folder / "key.pub", keys[name])
        _write_public(folder / "ca.pem", (out / _RESERVED / "ca.pem").read_bytes())
        _write_public(folder / "site.toml", site_settings(name, kit.address).encode())
    kit = replace(kit, sites={**kit.sites, **keys})
    kit.write_registry()
    return kit


def revoke(out: Path, names: Sequence[str]) -> CoordinatorKit:
    """Strike sites from the register; their keys are refused from now on.

    Raises:
        UserError: if a site is not registered.
    """
    kit = CoordinatorKit.read(out / _RESERVED)
    for name in names:
        if name not in kit.sites:
            raise UserError(f"{name!r} is not registered in {kit.registry}; it has {', '.join(sorted(kit.sites))}.")
    gone = {kit.sites[name]: name for name in names}
    kit = replace(
        kit,
        sites={name: key for name, key in kit.sites.items() if name not in names},
        revoked={**kit.revoked, **gone},
    )
    kit.write_registry()
    return kit


def renew(out: Path, also: Sequence[str] = (), days: int = SERVER_DAYS) -> CoordinatorKit:
    """Make the coordinator a new certificate; the sites' kits stay as they are.

    Raises:
        UserError: if the certificate authority's key is not in `out`.
    """
    kit = CoordinatorKit.read(out / _RESERVED)
    try:
        key = serialization.load_pem_private_key((out / "ca.key").read_bytes(), None)
        authority = x509.load_pem_x509_certificate((out / "ca.pem").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{out} lacks the certificate authority's ca.key or ca.pem, or they cannot be read ({error})."
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    known = x509.load_pem_x509_certificate(kit.certificate.read_bytes())
    names = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    before = [str(name.value) for name in names]
    _write_server(kit.folder, split_address(kit.address)[0], [*before, *also], days, authority, key)
    return kit


def validity(kit: CoordinatorKit) -> dict[str, datetime]:
    """Return until when each certificate of a coordinator's kit is valid."""
    return {
        "Authority": valid_until(kit.folder / "ca.pem"),
        "Certificate": valid_until(kit.certificate),
    }


def expiry_warnings(kit: CoordinatorKit) -> list[str]:
    """Return a sentence for each certificate of a coordinator's kit that has expired, or soon will."""
    remedies = {
        kit.certificate: "Make a new one with fedhead provision --renew, and copy it to the coordinator.",
        kit.folder / "ca.pem": "Make new kits for everyone with fedhead provision --coordinator.",
    }
    return [said for path, remedy in remedies.items() if (said := expiry_warning(path, remedy))]


def fingerprint(key: bytes) -> str:
    """Return a short digest of a public key, to compare by eye."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key)
    return digest.finalize().hex()[:16]


def check_site_name(name: str) -> None:
    """Check that a site can be called `name`.

    Raises:
        UserError: if not.
    """
    if safe_name(name) != name or name == _RESERVED:
        raise UserError(
            f"A site cannot be called {name!r}: names are up to 64 of a-z, 0-9, - and _, begin with a letter or digit, "
            f"and {_RESERVED!r} is taken."
        )


def site_settings(name: str, address: str) -> str:
    """Return the text of a new site's `site.toml`."""
    actions = "".join(f"    {_quoted(action) + ',':24} # {meaning}\n" for action, meaning in ACTIONS.items())
    return _SITE.format(name=_quoted(name), address=_quoted(address), actions=actions)


def _check_new_names(names: Sequence[str], known: Iterable[str]) -> None:
    if not names:
        raise UserError("No site is named: --site NAME for each.")
    for name in names:
        check_site_name(name)
        if name in known or list(names).count(name) > 1:
            raise UserError(f"There is a site {name!r} already; each needs a name of its own.")


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _canonical(key: object) -> bytes:
    """Return a public key in the one PEM form that requests are compared with."""
    loaded = serialization.load_pem_public_key(str(key).encode())
    if not isinstance(loaded, ec.EllipticCurvePublicKey):
        raise ValueError("a key is not of an elliptic curve")
    return loaded.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedhead certificate authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return (
        _certificate(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def _write_server(
    folder: Path,
    host: str,
    also: Sequence[str],
    days: int,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = dict.fromkeys([host, *also, "localhost", "127.0.0.1", "::1"])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    certificate = (
        _certificate(subject, authority.subject, key.public_key(), authority_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    _write_private(folder / "server.key", key)
    _write_public(folder / "server.pem", _pem(certificate))


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


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise UserError(f"{name!r} is neither a host's name nor an address.") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key that its owner alone can read, as files written atomically are."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomically(path, pem)


def _write_public(path: Path, content: bytes) -> None:
    write_atomically(path, content)
    path.chmod(0o644)


def _quoted(text: str) -> str:
    return tomli_w.dumps({"v": text}).removeprefix("v = ").strip()


_COORDINATOR = """\
# The coordinator's kit, for fedhead server --kit THIS-FOLDER.

# What sites connect to; it is in the certificate, and in every site's kit.
address = {address}
# What the coordinator listens on, on its own machine.
listen = "{listen}"
"""

_SITE = """\
# The kit of one site, for fedhead client --kit THIS-FOLDER. This site alone decides what stands here: nothing that the
# coordinator sends can change it.

name = {name}
# The coordinator, which shows a certificate signed by ca.pem. This site shows key.pem, which must stay secret.
coordinator = {address}

# The rows: folder:PATH, python:MODULE:FUNCTION or another data spec; fedhead client --data lies over it.
data = ""
# auto, cpu, cuda or mps.
device = "auto"
# Whether an unreadable row stops the site instead of being skipped.
strict_data = false

[limits]
# Classes with fewer training rows, and the site as a whole with fewer rows, are withheld from everything.
min_class_count = 5
min_rows = 20

[permit]
# What the coordinator may ask of this site. Without a line, the site refuses that and says so.
actions = [
{actions}]
"""
