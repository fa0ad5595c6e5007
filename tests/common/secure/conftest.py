from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.secure.keys import SiteKeys, signed_roster
from fedhead.secure.roster import Roster

MakeRoster = Callable[..., tuple[Roster, dict[str, SiteKeys]]]


@pytest.fixture(scope="session")
def make_roster() -> MakeRoster:
    """Return a signed roster of `count` new sites, and their keys."""

    def make(count: int, authority: ec.EllipticCurvePrivateKey | None = None) -> tuple[Roster, dict[str, SiteKeys]]:
        keys = {f"site-{number:03}": SiteKeys.generate() for number in range(count)}
        members = {name: own.member for name, own in keys.items()}
        return signed_roster(authority or ec.generate_private_key(ec.SECP256R1()), members), keys

    return make
