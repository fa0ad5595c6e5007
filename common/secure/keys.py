"""A site's private keys for secure sums, and rosters made of their public parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec

from fedhead.secure.masks import new_private_key, public_key
from fedhead.secure.roster import Member, Roster, encode, sign, signing_text


@dataclass(frozen=True)
class SiteKeys:
    """A site's private keys.

    Attributes:
        signing: P-256; the key by which the site also identifies itself to the coordinator.
        sealing: X25519, 32 bytes; opens shares sealed for the site.
    """

    signing: ec.EllipticCurvePrivateKey
    sealing: bytes

    @classmethod
    def generate(cls) -> Self:
        """Return new keys."""
        return cls(ec.generate_private_key(ec.SECP256R1()), new_private_key())

    @property
    def member(self) -> Member:
        """The public keys, for the roster."""
        return Member(signing=signing_text(self.signing.public_key()), sealing=encode(public_key(self.sealing)))

    def sign(self, message: bytes) -> bytes:
        """Return the site's signature of a message."""
        return sign(self.signing, message)


def signed_roster(authority: ec.EllipticCurvePrivateKey, members: Mapping[str, Member]) -> Roster:
    """Return the roster of some sites, signed by their authority."""
    return Roster(authority=signing_text(authority.public_key()), sites=dict(members)).signed(authority)
