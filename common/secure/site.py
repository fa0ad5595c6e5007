"""The site's half of a secure sum: a state that each exchange replaces by the next.

`open_session`, then `SiteState.mask`, `agree` and `unmask`, each once. The caller keeps the returned state on disk
before it sends the reply, so that a restart can neither repeat an exchange nor lose the session. The functions check
what can be checked with a roster and the state; `fedhead.client.release.secure_sessions` adds what a site remembers
across sessions.
"""

import logging
import secrets
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedhead.secure import SecureSumError
from fedhead.secure.fixed_point import Elements
from fedhead.secure.keys import SiteKeys
from fedhead.secure.masks import mask, new_private_key, public_key
from fedhead.secure.messages import (
    Agreements,
    Opening,
    Openings,
    PublicKeys,
    agreement_text,
    check_sites,
    commit,
    require_threshold,
    sealed_digest,
)
from fedhead.secure.roster import Roster
from fedhead.secure.sealing import seal, unseal
from fedhead.secure.session import Context
from fedhead.secure.shamir import SHARE_BYTES, number, share

logger = logging.getLogger(__name__)

NO_SHARE = bytes(SHARE_BYTES)
"""Returned in place of a share that could not be read."""

Stage = Literal["opened", "masked", "agreed", "unmasked"]


class SiteState(BaseModel):
    """A site's state of one session, with its secrets.

    Attributes:
        context: of the session.
        site: the site's name.
        stage: the last exchange that was answered.
        seed: of the site's own mask.
        mask_key: X25519 private key.
        keys: the site's public keys as it signed them, 128 bytes.
        openings: digest of the openings, once masked.
        opened: the sites that opened, once masked.
        masks: their mask keys.
        shares: by site that opened, this site's share of its seed and of its mask key.
        survivors: the sites that it agreed to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    context: Context
    site: str
    stage: Stage
    seed: bytes
    mask_key: bytes
    keys: bytes
    openings: bytes = b""
    opened: tuple[str, ...] = ()
    masks: dict[str, bytes] = {}
    shares: dict[str, tuple[bytes, bytes]] = {}
    survivors: tuple[str, ...] = ()

    def mask(self, openings: Openings, sealed: dict[str, bytes], keys: SiteKeys, roster: Roster) -> "SiteState":
        """Check the openings of all sites, and return the state that masks this site's vector.

        Args:
            openings: of all sites that opened.
            sealed: the shares that each of them sealed for this site.
            keys: this site's.
            roster: the pinned one.

        Raises:
            SecureSumError: if the exchange was answered before, fewer sites opened than the threshold, a signature is
                wrong, this site's keys were replaced, or a key occurs twice. Another site's shares may be unreadable:
                the coordinator sees from their commitments that this site returns none.
        """
        self._require("opened", "mask")
        openings.check(self.context, roster)
        own = openings.keys.get(self.site)
        if own is None or own.to_array().tobytes() != self.keys:
            raise SecureSumError(f"The openings do not have the keys of {self.site} as it made them.")
        digest, shares = self.context.digest, {}
        for name, public in openings.keys.items():
            try:
                pair = unseal(sealed[name], keys.sealing, public.ephemeral, digest, (name, self.site))
                for one in pair:
                    number(one)
            except SecureSumError as error:
                if name == self.site:
                    raise
                # A refusal would leave out this site because of another one's fault.
                logger.warning("%s This site returns no share of the secrets of %s.", error, name)
                pair = (NO_SHARE, NO_SHARE)
            shares[name] = pair
        return self.model_copy(
            update={
                "stage": "masked",
                "openings": openings.digest,
                "opened": tuple(openings.keys),
                "masks": openings.masks,
                "shares": shares,
            }
        )

    def masked(self, vector: Elements) -> Elements:
        """Return this site's vector with all masks, once `mask` accepted the openings.

        Args:
            vector: `Layout.pack` of the site's arrays.

        Raises:
            SecureSumError: if the vector is not of the context's layout.
        """
        self._require("masked", "mask")
        self.context.layout.check(vector)
        return mask(vector, self.seed, self.mask_key, self.masks, self.context.digest, self.site)

    def agree(self, survivors: tuple[str, ...], keys: SiteKeys) -> tuple["SiteState", bytes]:
        """Sign the set of sites whose vectors the coordinator has.

        Raises:
            SecureSumError: if the exchange was answered before, or the set does not have this site, has a site that
                did not open, or is smaller than the threshold.
        """
        self._require("masked", "agree")
        check_sites(survivors, self.context)
        if strangers := [name for name in survivors if name not in self.opened]:
            raise SecureSumError(f"The site {strangers[0]} is said to have survived, and did not open.")
        if self.site not in survivors:
            raise SecureSumError(f"The sum lacks {self.site}, which is asked to agree to it.")
        require_threshold(len(survivors), self.context, "survived")
        signature = keys.sign(agreement_text(self.context.digest, self.openings, survivors))
        return self.model_copy(update={"stage": "agreed", "survivors": survivors}), signature

    def unmask(self, agreements: Agreements, roster: Roster) -> tuple["SiteState", dict[str, bytes]]:
        """Return for each site that opened either the share of its seed or that of its mask key.

        Returns:
            The state without secrets, and a share of the seed of each survivor, of the mask key of each other site.

        Raises:
            SecureSumError: if the exchange was answered before, or fewer survivors than the threshold signed the
                set of survivors that this site signed.
        """
        self._require("agreed", "unmask")
        text = agreement_text(self.context.digest, self.openings, self.survivors)
        for name, signature in agreements.signatures.items():
            if name not in self.survivors or not roster.sites[name].verify(signature, text):
                raise SecureSumError(f"The site {name} did not agree to the survivors that {self.site} agreed to.")
        require_threshold(len(agreements.signatures), self.context, "agreed")
        alive = set(self.survivors)
        shares = {name: pair[0] if name in alive else pair[1] for name, pair in self.shares.items()}
        return self.ended(), shares

    def ended(self) -> "SiteState":
        """Return the state of the session once it has ended, without any secret."""
        return self.model_copy(update={"stage": "unmasked", "seed": b"", "mask_key": b"", "shares": {}, "masks": {}})

    def _require(self, stage: Stage, exchange: str) -> None:
        if self.stage != stage:
            raise SecureSumError(
                f"The site {self.site} was asked to {exchange} in a secure sum that it has {self.stage}; it answers "
                "each exchange once, in order."
            )


def open_session(context: Context, site: str, keys: SiteKeys, roster: Roster) -> tuple[SiteState, Opening]:
    """Make a site's secrets for a session, and seal a share of each for every site.

    Args:
        context: checked by the caller; see `Context.check`.
        site: this site's name.
        keys: this site's.
        roster: the pinned one.

    Raises:
        SecureSumError: if the site is not in the context, or its keys are not those in the roster.
    """
    if site not in context.sites:
        raise SecureSumError(f"The secure sum does not have the site {site}, which is asked to take part.")
    if roster.sites[site] != keys.member:
        raise SecureSumError(f"The roster has other keys of the site {site} than it uses.")
    seed, mask_key, ephemeral = secrets.token_bytes(32), new_private_key(), new_private_key()
    count, digest = len(context.sites), context.digest
    pairs = list(zip(share(seed, context.threshold, count), share(mask_key, context.threshold, count), strict=True))
    sealed = tuple(
        seal(pair, ephemeral, roster.sites[name].sealing_bytes, digest, (site, name))
        for name, pair in zip(context.sites, pairs, strict=True)
    )
    commitments = tuple(
        (commit(one, digest, "seed share", site, name), commit(other, digest, "mask key share", site, name))
        for name, (one, other) in zip(context.sites, pairs, strict=True)
    )
    public = PublicKeys(
        public_key(ephemeral),
        public_key(mask_key),
        commit(seed, digest, "seed", site),
        sealed_digest(sealed, commitments),
    )
    state = SiteState(
        context=context, site=site, stage="opened", seed=seed, mask_key=mask_key, keys=public.to_array().tobytes()
    )
    return state, Opening(public, keys.sign(public.text(digest, site)), sealed, commitments)
