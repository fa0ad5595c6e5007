"""What a site decides by itself: its kit's `site.toml`, with flags over it. Nothing a coordinator sends changes it."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedhead.addresses import is_loopback, split_address
from fedhead.errors import UserError
from fedhead.files import require_private, safe_name, write_atomically
from fedhead.messages import CALIBRATE, COMPARE, DESCRIBE, EVALUATE, INSTALL, REPORT, STANDARDISE, STATISTICS, TRAIN
from fedhead.registry import suggest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ACTIONS = (DESCRIBE, INSTALL, STATISTICS, STANDARDISE, COMPARE, TRAIN, EVALUATE, REPORT, CALIBRATE)
"""What a coordinator may ask a site for."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Table):
    """The site's own limits on what may be computed from few rows; see `fedhead.client.guard.Guard`."""

    min_class_count: int = Field(5, ge=0)
    min_rows: int = Field(20, ge=0)


class Permit(_Table):
    """What the site answers at all."""

    actions: tuple[str, ...] = ACTIONS

    @field_validator("actions")
    @classmethod
    def _are_known(cls, actions: tuple[str, ...]) -> tuple[str, ...]:
        for action in actions:
            if action not in ACTIONS:
                raise ValueError(f"there is no action {action!r}. {suggest(action, list(ACTIONS))}")
        return actions


class SiteSettings(_Table):
    """One site's settings.

    Attributes:
        name: by which runs know it.
        coordinator: `host:port`.
        data: a data spec.
        device: where its features are computed.
        strict_data: refuse to take part with unreadable rows, instead of skipping them.
        limits: of its guard.
        permit: what a coordinator may ask of it.
    """

    name: str
    coordinator: str
    data: str = ""
    device: str = "auto"
    strict_data: bool = False
    limits: Limits = Limits()
    permit: Permit = Permit()

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if safe_name(name) != name:
            raise ValueError(
                f"a site cannot be called {name!r}: names are up to 64 of a-z, 0-9, - and _, and begin with a "
                "letter or digit."
            )
        return name

    @field_validator("coordinator")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        if split_address(address)[1] == 0:
            raise UserError(f"{address!r} names no port.")
        return address

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate plain values.

        Raises:
            UserError: naming each wrong one, and `where` it stands.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(f"In {where}: {' '.join(_sentence(detail) for detail in error.errors())}") from None


class Kit:
    """The folder that a coordinator made for one site.

    Args:
        path: it holds `site.toml`, `ca.pem` and `key.pem`.

    Raises:
        UserError: if something is missing or damaged, or others can read the private key.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(
                f"There is no kit {path}. The coordinator's operator makes one with fedhead provision; copy it here."
            )
        self.path = path
        self.root_certificates = _read(path / "ca.pem")
        if b"BEGIN CERTIFICATE" not in self.root_certificates:
            raise UserError(f"{path / 'ca.pem'} is not a PEM certificate. Copy the kit again.")
        self.key = load_key(path / "key.pem")

    def settings(self, changes: Mapping[str, Any]) -> SiteSettings:
        """Read `site.toml`, with `changes` over it.

        Raises:
            UserError: if it does not describe a site.
        """
        path = self.path / "site.toml"
        try:
            values = tomllib.loads(_read(path).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid TOML: {error}.") from None
        limits = {**values.get("limits", {}), **changes.get("limits", {})}
        return SiteSettings.from_values({**values, **changes, "limits": limits}, str(path))


def load_key(path: Path) -> "EllipticCurvePrivateKey":
    """Read a private key that nobody else can.

    Raises:
        UserError: if others can, or it is not an elliptic-curve key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read(path)
    require_private(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} is not a private key that can be read ({error}). Copy the kit again.") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(f"{path} is not an elliptic-curve key, as sites need. Copy the kit again.")
    return key


def insecure_key(folder: Path) -> "EllipticCurvePrivateKey":
    """Return the key that a site without a kit is told apart by, made when it is first needed and kept in `folder`."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = folder / "insecure-key.pem"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomically(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return load_key(path)


def require_loopback(address: str) -> None:
    """Check that an address is of this machine, where traffic without TLS is read by nobody.

    Raises:
        UserError: if it is not.
    """
    if not is_loopback(split_address(address)[0]):
        raise UserError(
            f"--insecure goes to this machine alone (127.0.0.1, ::1 or localhost), not to {address}. Across a network "
            "use --kit: fedhead provision makes one."
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. A kit holds site.toml, ca.pem and key.pem."
        ) from None


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"limits": Limits, "permit": Permit}
        table = tables[detail["loc"][0]] if len(detail["loc"]) > 1 else SiteSettings
        return f"There is no setting {where!r}. {suggest(str(detail['loc'][-1]), list(table.model_fields))}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"Setting {where!r}: {message[0].lower()}{message[1:]}"
