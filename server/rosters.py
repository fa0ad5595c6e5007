"""Rosters at the authority of a consortium: its key, and the members that it signs."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import ValidationError

from fedhead.certificates import read_request, read_sealing_key
from fedhead.errors import UserError
from fedhead.files import require_private
from fedhead.protocol.fields import wrong_fields
from fedhead.secure.roster import Member, Roster, encode, signing_text
from fedhead.server.authority import write_private


def authority_key(path: Path, *, make: bool = False) -> ec.EllipticCurvePrivateKey:
    """Return the authority's key.

    Args:
        path: a PEM file that only its owner can read.
        make: whether to make the key if there is no such file.

    Raises:
        UserError: if it cannot be read, others can read it, or it is not a key on the curve P-256.
    """
    if make and not path.exists():
        write_private(path, ec.generate_private_key(ec.SECP256R1()))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The authority's key {path} cannot be read: {error.strerror}.") from None
    require_private(path)
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UserError(f"{path} is not a private key on the curve P-256, as fedhead roster sign makes one.")
    return key


def member_of(public: bytes, sealing: bytes) -> Member:
    """Return a site's entry in a roster.

    Args:
        public: its key, as PEM.
        sealing: its X25519 public key.
    """
    key = load_pem_public_key(public)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return Member(signing=signing_text(key), sealing=encode(sealing))


def requested_members(requests: Sequence[Path]) -> dict[str, Member]:
    """Return the entries that sites' requests ask for, by name.

    Raises:
        UserError: if a request is malformed, has no key for secure sums, or a name is repeated.
    """
    members: dict[str, Member] = {}
    for path in requests:
        name, public = read_request(path)
        sealing = read_sealing_key(path)
        if sealing is None:
            raise UserError(
                f"{path} has no key for secure sums: it was made by an earlier version. Ask the site for a new one by "
                "fedhead site init."
            )
        if name in members:
            raise UserError(f"Two requests are of the site {name!r}.")
        members[name] = member_of(public, sealing)
    return members


def sign_roster(
    path: Path, key: ec.EllipticCurvePrivateKey, add: Mapping[str, Member], remove: Collection[str] = ()
) -> Roster:
    """Add sites to a roster and remove others, sign it, and write it.

    Args:
        path: the roster, which is made if it is missing.
        key: the authority's.
        add: sites to add; one with other keys replaces an earlier site of its name.
        remove: names of sites to remove.

    Raises:
        UserError: if the roster is another authority's, a site to remove is not in it, two sites have the same key,
            or the file may not be written.
    """
    sites = {}
    if path.exists():
        before = Roster.read(path)
        if before.authority != signing_text(key.public_key()):
            raise UserError(f"{path} is the roster of another authority. Choose another --out, or move it away.")
        sites = dict(before.sites)
    for name in remove:
        if sites.pop(name, None) is None:
            raise UserError(f"The roster {path} does not have the site {name!r}; it has {', '.join(sorted(sites))}.")
    try:
        roster = Roster(authority=signing_text(key.public_key()), sites=dict(sorted({**sites, **add}.items())))
    except ValidationError as error:
        reason = wrong_fields(error) or "two sites have the same key"
        raise UserError(f"These sites make no roster: {reason}.") from None
    roster = roster.signed(key)
    roster.save(path)
    path.chmod(0o644)
    return roster
