"""The context of one secure sum, on which every key, share and signature of it depends.

The coordinator proposes a `Context`; each site checks it against its own roster, policy and the request that it comes
with, and derives all keys with its digest `h`. A coordinator that tells two sites different contexts therefore gets
masks that do not cancel and signatures that do not verify.

A site answers for one set of survivors only per `Purpose`, so the coordinator cannot subtract one set's sum from
another's. The purpose's `subject` must be computed at the site from the request, from everything that decides the
values, and from nothing that can vary without changing them: not from a round number.
"""

import hashlib
import json
import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedhead.protocol.actions import CLUSTER, DISTANCES, STATISTICS
from fedhead.protocol.fields import Digest, Text
from fedhead.secure import SecureSumError
from fedhead.secure.layout import Layout
from fedhead.secure.roster import MOST_SITES, Roster, SiteName

MIN_SITES = 3
"""The least number of sites: of two, each learns the other's values from the sum."""


def smallest_threshold(count: int) -> int:
    """Return the least threshold of `count` sites: `floor(2 count / 3) + 1`."""
    return 2 * count // 3 + 1


def most_colluding(count: int, threshold: int) -> int:
    """Return how many sites may collude with the coordinator without it learning another site's values.

    One that collects each of the two shares of a site from `threshold` sites learns both, unless at least
    `2 threshold - count` sites give only one, as honest ones do. The sum of `threshold` survivors must also leave two
    sites unknown.
    """
    return min(2 * threshold - count - 1, threshold - 2)


def threshold_for(count: int, colluding: int = 0, noises: int = 0) -> int:
    """Return the least threshold of `count` sites that is safe against some of them; it may be more than `count`.

    Args:
        count: the number of sites.
        colluding: see `most_colluding`.
        noises: the least number of survivors that do not collude, whose noises must add up.
    """
    return max(smallest_threshold(count), (count + colluding) // 2 + 1, colluding + 2, noises + colluding)


@dataclass(frozen=True)
class Purpose:
    """The values that a secure sum is about, as a site understands a request or a coordinator proposes it.

    Attributes:
        run: the run.
        what: the action whose reply is summed.
        rows: the rows behind it, such as `train` or `held_out`.
        subject: digest of everything else that decides the values; see above.
    """

    run: str
    what: str
    rows: str
    subject: str

    @property
    def topic(self) -> str:
        """Digest of everything but the run, which the coordinator can name as it likes.

        Several actions return sums of features, so these have one name.
        """
        what = "sums of features" if self.what in (STATISTICS, DISTANCES, CLUSTER) else self.what
        return hashlib.sha256(json.dumps([what, self.rows, self.subject]).encode()).hexdigest()


class Context(BaseModel):
    """The context of one secure sum.

    Attributes:
        version: of the protocol.
        session: a random id; a site answers each once.
        run: see `Purpose`, also for the next three.
        what: the action.
        rows: the rows.
        subject: the digest.
        layout: the arrays.
        sites: the sites asked, sorted; a site's position here, from 1, is the position of its shares.
        threshold: the least number of sites whose sum is opened.
        roster: digest of the roster.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    session: Digest
    run: Text
    what: Text
    rows: Text
    subject: Digest
    layout: Layout
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=MOST_SITES)]
    threshold: Annotated[int, Field(ge=1, le=MOST_SITES, strict=True)]
    roster: Digest

    @model_validator(mode="after")
    def _sites_are_sorted(self) -> Self:
        if list(self.sites) != sorted(set(self.sites)):
            raise ValueError("its sites are repeated, or not sorted")
        return self

    @classmethod
    def propose(
        cls,
        roster: Roster,
        sites: Collection[str],
        layout: Layout,
        purpose: Purpose,
        threshold: int | None = None,
    ) -> Self:
        """Return the context of a new session.

        Args:
            roster: has all `sites`.
            sites: the sites to ask.
            layout: the arrays to sum.
            purpose: their subject.
            threshold: by default the smallest, which tolerates the most dropouts.

        Raises:
            SecureSumError: if a site is not in the roster, there are too few, or the threshold is out of bounds.
        """
        context = cls(
            session=secrets.token_hex(32),
            **asdict(purpose),
            layout=layout,
            sites=tuple(sorted(sites)),
            threshold=smallest_threshold(len(sites)) if threshold is None else threshold,
            roster=roster.digest,
        )
        context.check(roster)
        return context

    def check(self, roster: Roster, min_sites: int = MIN_SITES, max_colluding: int = 0) -> None:
        """Check the context against a roster and a site's policy.

        Args:
            roster: the pinned one.
            min_sites: the least number of sites.
            max_colluding: the number of sites that may collude with the coordinator and still not learn another
                site's values.

        Raises:
            SecureSumError: if the roster is another one, a site is not in it, there are too few, or the threshold is
                out of bounds.
        """
        count = len(self.sites)
        if self.roster != roster.digest:
            raise SecureSumError("The coordinator uses another roster than the one pinned at this site.")
        if strangers := [name for name in self.sites if name not in roster.sites]:
            raise SecureSumError(f"The roster does not have the site {strangers[0]}.")
        if count < max(min_sites, MIN_SITES):
            raise SecureSumError(f"A secure sum over {count} sites is refused: {max(min_sites, MIN_SITES)} are needed.")
        if not smallest_threshold(count) <= self.threshold <= count:
            raise SecureSumError(
                f"The threshold {self.threshold} of {count} sites is refused: {smallest_threshold(count)} to {count} "
                "are allowed."
            )
        if most_colluding(count, self.threshold) < max_colluding:
            raise SecureSumError(
                f"The threshold {self.threshold} of {count} sites protects against "
                f"{most_colluding(count, self.threshold)} colluding sites; {max_colluding} are required."
            )

    @property
    def canonical(self) -> bytes:
        """The context as JSON without spaces, keys sorted."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> bytes:
        """`h`, SHA-256 of the canonical context, 32 bytes."""
        return hashlib.sha256(self.canonical).digest()

    @property
    def purpose(self) -> Purpose:
        """What the sum is about."""
        return Purpose(self.run, self.what, self.rows, self.subject)

    def position(self, site: str) -> int:
        """Return the position of a site's shares, from 1."""
        return self.sites.index(site) + 1
