"""What a site decides by itself: its kit's `site.toml`, with flags over it. Nothing a coordinator sends changes it."""

import base64
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedhead.addresses import is_loopback, split_address
from fedhead.client.release.training_limits import (
    MAX_EPOCHS,
    MAX_FEATURE,
    MAX_LR,
    MAX_PENALTY,
    MAX_SHARE,
    MAX_TRAINABLE,
    TrainingLimits,
)
from fedhead.config import Epsilon, NonNegative, Positive
from fedhead.config.unknown import unknown_setting
from fedhead.devices import Precision
from fedhead.errors import UserError
from fedhead.files import require_private, safe_name, write_atomically
from fedhead.protocol.actions import ACTIONS
from fedhead.registry import suggest
from fedhead.tuning import ActivationsFrom

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from fedhead.client.release.guard import Guard
    from fedhead.secure.keys import SiteKeys
    from fedhead.secure.roster import Roster


MAX_BACKBONE_BYTES = 4 * 2**30
DIGEST_PREFIX = "sha256:"
RELEASES_PER_DAY = 5000
"""More than honest runs need: one of 20 rounds takes about 30 releases of a site."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Table):
    """The site's limits: it computes nothing from fewer rows, takes no larger backbone, and trains no further."""

    min_class_count: int = Field(5, ge=0, description="Least rows of a class, or groups where the data has these.")
    min_rows: int = Field(20, ge=0)
    max_backbone_bytes: int = Field(
        MAX_BACKBONE_BYTES, ge=0, description="Largest file of weights that a coordinator may send, in bytes."
    )
    evaluate_few: bool = Field(
        True,
        description="Whether the site evaluates heads on classes with fewer than `min_class_count` held-out rows, in "
        "either calibration half.",
    )
    plain_clusters: bool = Field(
        False,
        description="Whether the site takes part in runs of the task 'clusters' without secure summation; true lets a "
        "coordinator that breaks the rules read the features of single rows.",
    )
    max_lr: Positive = Field(MAX_LR, description="Largest learning rate that the site trains with.")
    max_epochs: int = Field(MAX_EPOCHS, ge=1, description="Most passes over the rows in one round.")
    max_penalty: NonNegative = Field(
        MAX_PENALTY, description="Largest weight decay, and largest weight of the proximal term."
    )
    max_feature: Positive = Field(
        MAX_FEATURE, description="Largest root mean square of the features after a run's standardisation."
    )

    max_share: float = Field(
        MAX_SHARE,
        gt=0,
        le=1,
        description="Largest share of one row in the residuals behind a full gradient; 1 for no limit.",
    )
    max_trainable: int = Field(
        MAX_TRAINABLE,
        ge=0,
        description="Most parameters of a backbone that the site trains and sends in a tuned run; 0 allows heads "
        "alone. More of them reveal more of the site's rows.",
    )

    @property
    def guard(self) -> "Guard":
        """The limits on what is computed from few rows."""
        from fedhead.client.release.guard import Guard

        return Guard(self.min_class_count, self.min_rows, self.evaluate_few, self.plain_clusters)

    @property
    def training(self) -> TrainingLimits:
        """The bounds on local training."""
        return TrainingLimits(
            self.min_class_count,
            self.max_lr,
            self.max_epochs,
            self.max_penalty,
            self.max_feature,
            self.max_share,
            max_trainable=self.max_trainable,
        )


class Permit(_Table):
    """The actions that the site answers."""

    actions: tuple[str, ...] = Field(
        tuple(action.name for action in ACTIONS.values() if action.permitted),
        description="Actions that the site answers; it refuses all others.",
    )

    @field_validator("actions")
    @classmethod
    def _are_known(cls, actions: tuple[str, ...]) -> tuple[str, ...]:
        for action in actions:
            if action not in ACTIONS:
                raise ValueError(f"there is no action {action!r}. {suggest(action, list(ACTIONS))}")
        return actions


class Backbones(_Table):
    """Backbones that the site's operator allows, beside those that the site has itself.

    Attributes:
        allow: weights by `sha256:HEX`, and specs `source:name`, which allow any weights; of the source `python` also
            that the site calls the function.
        check_features: refuse backbones whose features single rows out.
    """

    check_features: bool = Field(
        True, description="Refuse backbones whose features single rows out; false only logs it."
    )
    allow: tuple[str, ...] = Field(
        (),
        description="Backbones that the site accepts beside its own: weights as `sha256:HEX`, or specs with any "
        "weights; `python:MODULE:FUNCTION` allows to call the function.",
    )

    @field_validator("allow")
    @classmethod
    def _are_digests_or_specs(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for one in allow:
            source, _, name = one.partition(":")
            if not name or (source == "sha256" and not re.fullmatch("[0-9a-f]{64}", name)):
                raise ValueError(
                    f"{one!r} is neither weights, as sha256: and 64 hexadecimal digits, nor a backbone's source:name."
                )
        return allow


class Budget(_Table):
    """Limits on the number of releases; the ledger counts them, so a restart changes nothing."""

    releases_per_day: int = Field(
        RELEASES_PER_DAY, ge=1, description="Replies about its rows that the site gives on one day, in UTC."
    )


class Privacy(_Table):
    """The site's conditions for releasing sums of its rows in any run, and its privacy budget."""

    require: Literal["none", "secure-sum", "dp", "both"] = Field(
        "none",
        description="Protection that every run must use: 'none', 'secure-sum' to send sums and heads only masked, 'dp' "
        "for differential privacy, or 'both'.",
    )
    min_sites: int = Field(3, ge=3, description="Least number of sites in a secure sum.")
    min_difference: int = Field(
        3,
        ge=1,
        description="Least number of sites by which two secure sums about the same values may differ, unless they are "
        "over the same sites; 1 allows any difference.",
    )
    max_colluding: int = Field(
        1,
        ge=0,
        description="Number of other sites that may collude with the coordinator without it learning this site's sums.",
    )
    epsilon: Epsilon = Field(
        0.0,
        description="Privacy budget of the site's rows for their lifetime, by account; 0 refuses private runs.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta of the privacy budget; below 1 / rows.")
    noise: Literal["shared", "own"] = Field(
        "shared",
        description="Whether the sites of a secure sum may share the noise ('shared'), or this site takes part only "
        "where each site adds all of it ('own').",
    )
    unit: Literal["row", "group"] = Field(
        "row", description="What differential privacy protects at least: a 'row', or a 'group' such as a patient."
    )


class SiteSettings(_Table):
    """One site's settings.

    Attributes:
        name: by which runs know it.
        coordinator: `host:port`.
        ca_bundle: a PEM file of authorities that it trusts beside the kit's; empty for none.
        data: a data spec.
        device: where its features are computed.
        precision: of its backbones' products, see `fedhead.features.extraction.usable`.
        activations: how it gets the activations below tuned layers, see `fedhead.features.activations`.
        holdout: the share of rows that it holds out for evaluation.
        strict_data: refuse to take part with unreadable rows, instead of skipping them.
        limits: of its guard.
        permit: the actions that a coordinator may request.
        backbones: those that its operator allows.
        budget: of its releases.
        privacy: the protection that it demands.
    """

    name: str = Field(description="Name of the site in runs.")
    coordinator: str
    ca_bundle: str = Field(
        "", description="PEM file of further authorities, such as that of a reverse proxy before the coordinator."
    )
    data: str = ""
    device: str = "auto"
    precision: Precision = Field(
        "float32",
        description="Precision of extraction: 'float32', or 'mixed', which is faster on GPUs and on CPUs that multiply "
        "bfloat16 and used if the backbone's features of two fixed inputs stay within 2 %.",
    )
    activations: ActivationsFrom = Field(
        "auto",
        description="Activations below tuned layers: 'store' them once, 'recompute' them for each batch, or 'auto' to "
        "store what takes at most half of the free disk.",
    )
    holdout: float = Field(0.2, ge=0, lt=1, allow_inf_nan=False, description="Share of rows that the site holds out.")
    strict_data: bool = False
    limits: Limits = Limits()
    permit: Permit = Permit()
    backbones: Backbones = Backbones()
    budget: Budget = Budget()
    privacy: Privacy = Privacy()

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if safe_name(name) != name:
            raise ValueError(
                f"a site cannot be called {name!r}: names are up to 64 of a-z, 0-9, - and _, and begin with a "
                "letter or digit; Windows keeps con, aux, nul and the like for devices."
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
            UserError: naming each wrong one, and `where` it is set.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(f"In {where}: {' '.join(_sentence(detail) for detail in error.errors())}") from None


@dataclass(frozen=True)
class SecureKeys:
    """The keys for secure summation.

    Attributes:
        site: the site's own, private.
        roster: the public keys of all sites.
    """

    site: "SiteKeys"
    roster: "Roster"


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
        if (path / "key.pub").exists() and not any((path / name).exists() for name in ("key.pem", "sealing.key")):
            raise UserError(
                f"{path} has no key.pem, because the site made its key itself. Put the files of this kit into the "
                "folder that fedhead site init made, and use that folder."
            )
        self.key = load_key(path / "key.pem")

    def secure_keys(self) -> SecureKeys | None:
        """Return the keys for secure summation; None if the kit has no roster.

        Raises:
            UserError: if a file is missing or damaged, others can read the private key, or the site has not accepted
                the roster.
            SecureSumError: if the roster is not signed by its authority.
        """
        from fedhead.client.accepted_roster import pinned_roster

        roster = pinned_roster(self.path, self.settings({}).name)
        return None if roster is None else SecureKeys(self.site_keys(), roster)

    def site_keys(self) -> "SiteKeys":
        """Return the site's own keys for secure summation.

        Raises:
            UserError: if a file is missing or damaged, or others can read the private key.
        """
        from fedhead.secure.keys import SiteKeys

        return SiteKeys(self.key, sealing_key(self.path))

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
        backbones = dict(values.get("backbones", {}))
        if further := changes.get("backbones", {}).get("allow"):
            backbones["allow"] = [*backbones.get("allow", ()), *further]
        return SiteSettings.from_values({**values, **changes, "limits": limits, "backbones": backbones}, str(path))


def trusted(kit: Kit, settings: SiteSettings) -> bytes:
    """Return the authorities that may certify the coordinator, as PEM: the kit's, and those of `ca_bundle`.

    Raises:
        UserError: if `ca_bundle` cannot be read.
    """
    if not settings.ca_bundle:
        return kit.root_certificates
    try:
        further = Path(settings.ca_bundle).read_bytes()
    except OSError as error:
        raise UserError(f"The file of ca_bundle, {settings.ca_bundle}, cannot be read: {error.strerror}.") from None
    return kit.root_certificates + b"\n" + further


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


def sealing_key(folder: Path) -> bytes:
    """Read the private key of a kit that opens shares sealed for the site, which nobody else can read.

    Raises:
        UserError: if it is missing or damaged, or others can read it.
    """
    path = folder / "sealing.key"
    try:
        key = base64.b64decode(path.read_bytes(), validate=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. A kit with a roster.toml holds it, too.") from None
    except ValueError:
        key = b""
    require_private(path)
    if len(key) != 32:
        raise UserError(f"{path} is not a sealing key: 32 bytes in base64.")
    return key


def insecure_key(folder: Path) -> "EllipticCurvePrivateKey":
    """Return the key that identifies a site without a kit, made when it is first needed and kept in `folder`."""
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
    if unknown := unknown_setting(detail, SiteSettings):
        return unknown
    message = detail["msg"].removeprefix("Value error, ")
    return f"Setting {where!r}: {message[0].lower()}{message[1:]}"
