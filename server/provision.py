"""Keys, certificates and a kit per site: which sites may connect, and how they and the coordinator authenticate.

A folder of kits is laid out as::

    kit/ca.pem, kit/ca.key          the private certificate authority; its key stays with the person who provisions
    kit/roster.key                   the key that signs the roster of secure sums; it stays there, too
    kit/coordinator/                 server.pem, server.key, ca.pem, sites.toml, coordinator.toml, roster.toml
    kit/NAME/                        site.toml, ca.pem, key.pem, key.pub, sealing.key, roster.toml

`coordinator/` and each `NAME/` are complete in themselves, to be copied to the machine they are for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.addresses import split_address
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.files import require_new_folder, write_atomically
from fedhead.secure.masks import new_private_key, public_key
from fedhead.secure.roster import Member, Roster, encode, signing_text
from fedhead.server.authority import (
    alternative_name,
    authority_certificate,
    pem,
    write_private,
    write_public,
    write_server,
)
from fedhead.server.kit import COORDINATOR, ROSTER, CoordinatorKit, check_site_name
from fedhead.server.kit_settings import COORDINATOR_SETTINGS, quoted, site_settings
from fedhead.server.rosters import authority_key, member_of, sign_roster

SERVER_DAYS = 730
ROSTER_KEY = "roster.key"


def provision(
    out: Path,
    coordinator: str,
    sites: Sequence[str],
    also: Sequence[str] = (),
    days: int = SERVER_DAYS,
    backbones: Mapping[str, str] | None = None,
) -> CoordinatorKit:
    """Make a certificate authority, the coordinator's kit and one for each site.

    Args:
        out: a new or empty folder.
        coordinator: `HOST:PORT` that sites connect to.
        sites: their names; others may be added later.
        also: further names or addresses of the coordinator, for its certificate.
        days: for how long that certificate is valid.
        backbones: that the sites' kits allow, each with its comment; see `backbones_of`.

    Raises:
        UserError: if the folder holds something, or a name or address cannot be used.
    """
    require_new_folder(out, "to change a kit: --add-site, --revoke or --renew.")
    host, port = split_address(coordinator)
    if port == 0:
        raise UserError(f"{coordinator!r} names no port; expected HOST:PORT, as in coord.example.org:9092.")
    if sites:
        check_new_names(sites, ())
    for name in (host, *also):
        alternative_name(name)
    ca_key = ec.generate_private_key(ec.SECP384R1())
    authority = authority_certificate(ca_key)
    write_private(out / "ca.key", ca_key)
    write_public(out / "ca.pem", pem(authority))
    authority_key(out / ROSTER_KEY, make=True)
    folder = out / COORDINATOR
    write_public(folder / "ca.pem", pem(authority))
    write_server(folder, host, also, days, authority, ca_key)
    listen = f"[::]:{port}" if ":" in host else f"0.0.0.0:{port}"
    write_public(
        folder / "coordinator.toml", COORDINATOR_SETTINGS.format(address=quoted(coordinator), listen=listen).encode()
    )
    kit = CoordinatorKit(folder, coordinator, listen, {}, {})
    kit.write_registry()
    return add_sites(out, sites, backbones) if sites else kit


def backbones_of(config: RunConfig) -> dict[str, str]:
    """Return the entries of `[backbones] allow` that sites need for a run, each with a comment.

    Raises:
        FedheadError: if the backbone's weights are not available here.
    """
    from fedhead.backbones import load_backbone
    from fedhead.backbones.weights import PACKAGED

    if config.backbone.startswith("python:"):
        return {config.backbone: "a function that the site calls"}
    if config.backbone in ("identity", "features") or (
        config.backbone.startswith(PACKAGED) and config.weights == "default"
    ):
        return {}
    backbone = load_backbone(config.backbone, weights=config.weights, layer=config.layer, seed=config.seed)
    weights = "" if backbone.trained else ", random weights"
    return {f"sha256:{backbone.weights_digest}": f"{backbone.spec}, layer {backbone.layer}{weights}"}


def add_sites(out: Path, names: Sequence[str], backbones: Mapping[str, str] | None = None) -> CoordinatorKit:
    """Make a kit for each further site, and register its key.

    Raises:
        UserError: if `out` is no folder of kits, or a name is taken or cannot be used.
    """
    kit = CoordinatorKit.read(out / COORDINATOR)
    check_new_names(names, kit.sites)
    # Each request is signed: with P-384 that would take most of the coordinator's time.
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in names}
    public = {
        name: key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        for name, key in keys.items()
    }
    kit = register(out, kit, public, backbones)
    members = {}
    for name, key in keys.items():
        write_private(out / name / "key.pem", key)
        sealing = new_private_key()
        write_atomically(out / name / "sealing.key", encode(sealing))
        members[name] = member_of(public[name], public_key(sealing))
    update_rosters(out, members)
    return kit


def update_rosters(out: Path, add: Mapping[str, Member], remove: Sequence[str] = ()) -> bool:
    """Change the roster of secure sums in all kits, and return whether it is signed with the key here.

    Nothing is changed if the key is not in `out`, or the coordinator has the roster of another authority.

    Args:
        out: the folder of kits.
        add: sites to add.
        remove: names of sites to remove, those that are in the roster.

    Raises:
        UserError: if the roster or the key cannot be read, or two sites have the same key.
    """
    path = out / COORDINATOR / ROSTER
    before = Roster.read(path) if path.exists() else None
    if not (out / ROSTER_KEY).exists():
        return False
    key = authority_key(out / ROSTER_KEY)
    if before is not None and before.authority != signing_text(key.public_key()):
        return False
    known = set() if before is None else set(before.sites)
    gone = [name for name in remove if name in known]
    if known - set(gone) or add:
        roster = sign_roster(path, key, add, gone)
        content = roster.to_toml().encode()
        for name in roster.sites:
            if (out / name).is_dir():
                write_public(out / name / ROSTER, content)
    elif gone:
        path.unlink()
    return True


def register(
    out: Path, kit: CoordinatorKit, keys: Mapping[str, bytes], backbones: Mapping[str, str] | None = None
) -> CoordinatorKit:
    """Register sites' public keys, and make each a kit without its private key.

    Args:
        out: the folder of kits.
        kit: the coordinator's.
        keys: as PEM, by the names of new sites.
        backbones: that their kits allow, each with its comment.

    Raises:
        UserError: if there is a kit of a name already.
    """
    for name in keys:
        if (out / name).exists():
            raise UserError(f"{out / name} exists already; move the old kit of {name} away first.")
    for name, key in keys.items():
        folder = out / name
        write_public(folder / "key.pub", key)
        write_public(folder / "ca.pem", (out / COORDINATOR / "ca.pem").read_bytes())
        write_public(folder / "site.toml", site_settings(name, kit.address, backbones or {}).encode())
    kit = replace(kit, sites={**kit.sites, **keys})
    kit.write_registry()
    return kit


def revoke(out: Path, names: Sequence[str]) -> CoordinatorKit:
    """Strike sites from the register; their keys are refused from now on.

    Raises:
        UserError: if a site is not registered.
    """
    kit = CoordinatorKit.read(out / COORDINATOR)
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
    update_rosters(out, {}, names)
    return kit


def renew(out: Path, also: Sequence[str] = (), days: int = SERVER_DAYS) -> CoordinatorKit:
    """Make the coordinator a new certificate; the sites' kits stay as they are.

    Raises:
        UserError: if the certificate authority's key is not in `out`.
    """
    kit = CoordinatorKit.read(out / COORDINATOR)
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
    write_server(kit.folder, split_address(kit.address)[0], [*before, *also], days, authority, key)
    return kit


def check_new_names(names: Sequence[str], known: Iterable[str]) -> None:
    """Check that new sites can have these names beside the `known` ones.

    Raises:
        UserError: if a name cannot be used or is taken, or there is none.
    """
    if not names:
        raise UserError("No site is named: --site NAME for each.")
    for name in names:
        check_site_name(name)
        if name in known or list(names).count(name) > 1:
            raise UserError(f"There is a site {name!r} already; each needs a name of its own.")
