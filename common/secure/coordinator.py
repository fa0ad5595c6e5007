"""The coordinator's half of a secure sum: it collects the sites' replies, and opens the sum of the survivors.

One exchange after the other::

    session = SecureSum(context, roster)
    session.take_opening(site, opening)            # of each site that replies to `open`
    openings = session.openings()                  # to every site in it: these, and session.sealed_for(site)
    session.take_vector(site, vector)              # of each site that replies to `mask`
    survivors = session.survivors()                # to every survivor
    session.take_agreement(site, signature)        # of each site that replies to `agree`
    agreements = session.agreements()              # to every survivor
    session.take_shares(site, shares)              # of each site that replies to `unmask`
    arrays = session.total()

The `take` methods raise `SecureSumError` for a reply that must be dropped; the others raise it if too few sites are
left. Sites may be lost after each exchange as long as `context.threshold` of them remain.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedhead.secure import SecureSumError, masks
from fedhead.secure.fixed_point import Elements, add
from fedhead.secure.messages import (
    Agreements,
    Opening,
    Openings,
    agreement_text,
    commit,
    require_threshold,
    sealed_digest,
)
from fedhead.secure.roster import Roster
from fedhead.secure.session import Context
from fedhead.secure.shamir import coefficients, combine, number
from fedhead.wording import listed


class SecureSum:
    """One secure sum at the coordinator.

    Args:
        context: that was proposed to the sites.
        roster: that it refers to.

    Attributes:
        faults: pairs of sites, one of which is faulty: the second returned another share than the first committed to.
    """

    def __init__(self, context: Context, roster: Roster) -> None:
        context.check(roster)
        self.context = context
        self.roster = roster
        self.faults: list[tuple[str, str]] = []
        self._digest = context.digest
        self._private = masks.new_private_key()
        self._opened: dict[str, Opening] = {}
        self._openings: Openings | None = None
        self._vectors: set[str] = set()
        self._survivors: tuple[str, ...] | None = None
        self._total: Elements = np.zeros((context.layout.limbs, context.layout.size), np.uint64)
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, dict[str, bytes]] = {}

    def take_opening(self, site: str, opening: Opening) -> None:
        """Take a site's reply to `open`.

        Raises:
            SecureSumError: if it is not signed by the site, has an invalid key, or repeats one, or the exchange has
                ended.
        """
        keys = opening.keys
        self._require_from(site, self.context.sites, self._opened, self._openings is None)
        if keys.sealed != sealed_digest(opening.sealed, opening.commitments):
            raise SecureSumError(f"The opening of {site} has another digest than its sealed shares.")
        if not self.roster.sites[site].verify(opening.signature, keys.text(self._digest, site)):
            raise SecureSumError(f"The opening of {site} is not signed by it.")
        for key in (keys.ephemeral, keys.mask):
            try:
                masks.agree(self._private, key, self._digest, "check", (site, ""))
            except SecureSumError:
                # Otherwise every other site would refuse all openings, because of this one.
                raise SecureSumError(f"The opening of {site} has a key that is no valid X25519 key.") from None
        known = {
            key for one in self._opened.values() for key in (one.keys.ephemeral, one.keys.mask, one.keys.commitment)
        }
        if len(known | {keys.ephemeral, keys.mask, keys.commitment}) < len(known) + 3:
            raise SecureSumError(f"The opening of {site} has the key of another site.")
        self._opened[site] = opening

    def openings(self) -> Openings:
        """End the exchange `open`, and return the openings, the same each time.

        Raises:
            SecureSumError: if too few sites opened.
        """
        if self._openings is None:
            require_threshold(len(self._opened), self.context, "opened")
            opened = {name: self._opened[name] for name in self.context.sites if name in self._opened}
            self._openings = Openings(
                {name: one.keys for name, one in opened.items()}, {name: one.signature for name, one in opened.items()}
            )
        return self._openings

    def sealed_for(self, site: str) -> dict[str, bytes]:
        """Return the shares that each opened site sealed for this site."""
        at = self.context.position(site) - 1
        return {name: self._opened[name].sealed[at] for name in self.openings().keys}

    def take_vector(self, site: str, vector: Elements) -> None:
        """Add a site's masked vector, its reply to `mask`.

        Raises:
            SecureSumError: if it is not of the layout, the site did not open, or the exchange has ended.
        """
        self._require_from(site, self.openings().keys, self._vectors, self._survivors is None)
        self.context.layout.check(vector)
        add(self._total, vector)
        self._vectors.add(site)

    def survivors(self) -> tuple[str, ...]:
        """End the exchange `mask`, and return the sites whose vectors were added, the same each time.

        Raises:
            SecureSumError: if too few sites sent one.
        """
        if self._survivors is None:
            require_threshold(len(self._vectors), self.context, "sent their masked values")
            self._survivors = tuple(name for name in self.context.sites if name in self._vectors)
        return self._survivors

    def take_agreement(self, site: str, signature: bytes) -> None:
        """Take a site's reply to `agree`.

        Raises:
            SecureSumError: if it is not the site's signature, or the site is no survivor.
        """
        self._require_from(site, self.survivors(), self._signatures, not self._shares)
        text = agreement_text(self._digest, self.openings().digest, self.survivors())
        if not self.roster.sites[site].verify(signature, text):
            raise SecureSumError(f"The agreement of {site} is not signed by it.")
        self._signatures[site] = signature

    def agreements(self) -> Agreements:
        """Return the agreements so far.

        Raises:
            SecureSumError: if too few sites agreed.
        """
        require_threshold(len(self._signatures), self.context, "agreed")
        return Agreements({name: self._signatures[name] for name in self.survivors() if name in self._signatures})

    def take_shares(self, site: str, shares: dict[str, bytes]) -> None:
        """Take a site's reply to `unmask`; shares that were not committed to are left out and noted in `faults`.

        Raises:
            SecureSumError: if a share is no element of the field, or the site is no survivor.
        """
        self._require_from(site, self.survivors(), self._shares, True)
        alive, at = set(self.survivors()), self.context.position(site) - 1
        for share in shares.values():
            number(share)
        good = {}
        for name, share in shares.items():
            kind, committed = ("seed share", 0) if name in alive else ("mask key share", 1)
            if commit(share, self._digest, kind, name, site) == self._opened[name].commitments[at][committed]:
                good[name] = share
            else:
                self.faults.append((name, site))
        self._shares[site] = good

    def total(self) -> dict[str, npt.NDArray[Any]]:
        """Return the sum of the survivors' arrays, int64 and float64 by name.

        Raises:
            SecureSumError: if too few sites returned their shares, or a site shared other secrets than it used.
        """
        return self.context.layout.unpack(self.unmasked())

    def unmasked(self) -> Elements:
        """Return the sum of the survivors' vectors.

        Raises:
            SecureSumError: as `total` does.
        """
        require_threshold(len(self._shares), self.context, "returned their shares")
        alive, openings, digest = self.survivors(), self.openings(), self._digest
        publics = {name: openings.keys[name].mask for name in alive}
        secrets, total = self._secrets(), self._total.copy()
        for name, secret in secrets.items():
            if name in publics:
                masks.remove_own_mask(total, secret, digest, name)
            else:
                masks.remove_pair_masks(total, name, secret, publics, digest)
        return total

    def _secrets(self) -> dict[str, bytes]:
        """Return each survivor's seed and each other opened site's mask key, recovered from shares."""
        alive, secrets = set(self.survivors()), {}
        at_zero: dict[tuple[int, ...], dict[int, int]] = {}
        for name, keys in self.openings().keys.items():
            held = {self.context.position(site): own[name] for site, own in self._shares.items() if name in own}
            if len(held) < self.context.threshold:
                raise SecureSumError(
                    f"The secure sum was given up: only {len(held)} sites have a valid share of a secret of {name}. "
                    f"{self._suspects()}"
                )
            chosen = tuple(sorted(held)[: self.context.threshold])
            if chosen not in at_zero:
                at_zero[chosen] = coefficients(chosen)
            secret = combine(held, at_zero[chosen])
            if secret is None:
                genuine = False
            elif name in alive:
                genuine = commit(secret, self._digest, "seed", name) == keys.commitment
            else:
                genuine = masks.public_key(secret) == keys.mask
            if secret is None or not genuine:
                raise SecureSumError(
                    f"The site {name} shared other secrets than it used; leave it out and start again."
                )
            secrets[name] = secret
        return secrets

    def _suspects(self) -> str:
        pairs = [f"{maker} or {holder}" for maker, holder in self.faults]
        return f"Faulty is {listed(pairs, 5)}." if pairs else ""

    def _require_from(self, site: str, among: Any, known: Any, in_time: bool) -> None:
        if site not in among or site in known or not in_time:
            raise SecureSumError(f"A message of the secure sum by {site} is repeated, late or unexpected.")
