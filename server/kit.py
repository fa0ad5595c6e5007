"""The coordinator's kit: its addresses, certificate and register of sites."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from fedhead.addresses import split_address
from fedhead.certificates import expiry_warning, valid_until
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.files import safe_name, write_atomically
from fedhead.protocol.fields import wrong_fields
from fedhead.secure.roster import Roster
from fedhead.server.network.limits import ConnectionLimits

COORDINATOR, ROSTER = "coordinator", "roster.toml"


@dataclass(frozen=True)
class CoordinatorKit:
    """What a coordinator knows and shows.

    Attributes:
        folder: that holds it.
        address: `HOST:PORT` that sites connect to.
        listen: `HOST:PORT` that the coordinator listens on.
        sites: each registered site's public key, as PEM, by name.
        revoked: the names of those that are no longer, by public key.
        connections: limits on their number.
    """

    folder: Path
    address: str
    listen: str
    sites: Mapping[str, bytes]
    revoked: Mapping[bytes, str]
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)

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

    @property
    def members(self) -> Roster | None:
        """The sites' keys for secure summation; None without `roster.toml`.

        Raises:
            UserError: if the file cannot be read.
        """
        path = self.folder / ROSTER
        return Roster.read(path) if path.is_file() else None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a coordinator's folder.

        Raises:
            UserError: if something is missing or invalid.
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
            connections = ConnectionLimits(**settings.get("connections", {}))
        except ValidationError as error:
            where = f"[connections] in {folder / 'coordinator.toml'}"
            raise UserError(f"{where} has settings that do not exist or do not fit: {wrong_fields(error)}.") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} is not a coordinator's kit as fedhead provision writes it ({error}).") from None
        for name in sites:
            check_site_name(name)
        if len(set(sites.values())) < len(sites):
            raise UserError(f"{folder / 'sites.toml'} registers one key for two sites; each needs its own.")
        split_address(address)
        split_address(listen)
        return cls(folder, address, listen, sites, revoked, connections)

    def completed(self, config: RunConfig) -> RunConfig:
        """Return a configuration that needs every registered site, unless it sets how many it needs."""
        if not self.sites or "min_sites" in config.model_fields_set:
            return config
        return config.changed({"min_sites": len(self.sites)})

    def write_registry(self) -> None:
        """Write `sites.toml`."""
        content = {
            "sites": {name: key.decode() for name, key in sorted(self.sites.items())},
            "revoked": [{"site": name, "key": key.decode()} for key, name in self.revoked.items()],
        }
        text = "# The sites that may connect, by public key. A running coordinator reads changes within seconds.\n\n"
        write_atomically(self.registry, text + tomli_w.dumps(content, multiline_strings=True))


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


def check_site_name(name: str) -> None:
    """Check that a site can be called `name`.

    Raises:
        UserError: if not.
    """
    if safe_name(name) != name or name == COORDINATOR:
        raise UserError(
            f"A site cannot be called {name!r}: names are up to 64 of a-z, 0-9, - and _, begin with a letter or digit, "
            f"and {COORDINATOR!r} is taken."
        )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _canonical(key: object) -> bytes:
    """Return a public key in the one PEM form that requests are compared with."""
    loaded = serialization.load_pem_public_key(str(key).encode())
    if not isinstance(loaded, ec.EllipticCurvePublicKey):
        raise ValueError("a key is not of an elliptic curve")
    return loaded.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
