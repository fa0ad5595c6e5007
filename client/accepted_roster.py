"""The roster that a site has accepted: a copy apart from the kit, so that a new kit does not change it unnoticed.

Whoever made a site's keys for it could pretend to be the site anyway, so the first roster of a kit with such keys is
accepted as it is. A site that made its own keys (`fedhead site init`) must accept the first one, too. Every changed
roster must be accepted.
"""

from pathlib import Path

from fedhead.client.key import REQUEST_FILE
from fedhead.errors import UserError
from fedhead.files import digest_file, home, safe_name, write_atomically
from fedhead.secure.roster import Roster

ROSTER_FILE = "roster.toml"


def accepted_path(kit: Path, site: str) -> Path:
    """Return the file with the roster that a site has accepted for the coordinator of a kit."""
    coordinator = digest_file(kit / "ca.pem")[:16]
    return home() / "secure" / f"{safe_name(site)}-{coordinator}.roster.toml"


def accepted(kit: Path, site: str) -> Roster | None:
    """Return the roster that a site has accepted; None if there is none yet.

    Raises:
        UserError: if the file is damaged.
    """
    path = accepted_path(kit, site)
    return Roster.read(path) if path.exists() else None


def accept(kit: Path, site: str, roster: Roster) -> None:
    """Accept a roster in the place of the one before.

    Raises:
        SecureSumError: if its authority has not signed it.
        UserError: if it may not be written.
    """
    roster.verify()
    write_atomically(accepted_path(kit, site), roster.to_toml())


def pinned_roster(kit: Path, site: str) -> Roster | None:
    """Return the roster in a site's kit, which the site has accepted; None if the kit has none.

    Raises:
        UserError: if the roster is not the accepted one, or cannot be read.
        SecureSumError: if its authority has not signed it.
    """
    path = kit / ROSTER_FILE
    if not path.is_file():
        return None
    roster = Roster.read(path)
    roster.verify()
    before = accepted(kit, site)
    if before is not None and before.digest == roster.digest:
        return roster
    if before is None and not (kit / REQUEST_FILE).exists():
        accept(kit, site, roster)
        return roster
    about = (
        "was not accepted yet" if before is None else f"is not the accepted one: {'; '.join(changes(before, roster))}"
    )
    raise UserError(
        f"The roster {path} {about}. It decides whom this site's sums are masked with. Compare its fingerprint with "
        f"the consortium's authority by telephone, then: fedhead roster verify {kit} --accept {roster.fingerprint}"
    )


def changes(before: Roster, after: Roster) -> list[str]:
    """Return a phrase for each kind of difference between two rosters."""
    changed = [name for name in after.sites if name in before.sites and after.sites[name] != before.sites[name]]
    kinds = {
        "it adds": [name for name in after.sites if name not in before.sites],
        "it removes": [name for name in before.sites if name not in after.sites],
        "it has other keys of": changed,
    }
    phrases = [f"{kind} {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    return phrases if after.authority == before.authority else ["it is signed by another authority", *phrases]
