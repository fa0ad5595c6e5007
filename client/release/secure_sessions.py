"""The site's half of secure sums: its sessions on disk, and its permanent memory of those that it unmasked.

The memory is what makes the protocol hold against a coordinator that repeats itself: a site answers each exchange of a
session once, over restarts, and unmasks one set of survivors only per purpose. If the same values were summed over two
sets of survivors, the difference of the sums would be the values of the sites in one set alone.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from fedhead.errors import FedheadError, UserError
from fedhead.files import home, safe_name
from fedhead.secure import SecureSumError, UnsummableError
from fedhead.secure.fixed_point import Elements
from fedhead.secure.keys import SiteKeys
from fedhead.secure.layout import Layout
from fedhead.secure.messages import (
    Agreements,
    Openings,
    sealed_from_array,
    shares_to_arrays,
    signature_to_arrays,
)
from fedhead.secure.roster import Roster
from fedhead.secure.session import MIN_SITES, Context, Purpose
from fedhead.secure.site import SiteState, open_session
from fedhead.sums.sums import Arrays

logger = logging.getLogger(__name__)

MOST_OPEN = 64
"""Sessions that are kept at a time; the oldest is given up when another one begins."""

Reply = dict[str, npt.NDArray[Any]]

_TABLES = (
    "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, began REAL NOT NULL, state TEXT)",
    "CREATE TABLE IF NOT EXISTS unmasked (topic TEXT, run TEXT, survivors TEXT NOT NULL, PRIMARY KEY (topic, run))",
)


@dataclass(frozen=True)
class Policy:
    """A site's conditions for secure sums.

    Attributes:
        min_sites: the least number of sites of a sum.
        max_colluding: the number of sites that may collude with the coordinator and still learn nothing.
        min_difference: the least number of sites, from 1, by which the survivors of two runs about the same purpose may
            differ in either direction, unless they are the same; 1 allows any difference.
    """

    min_sites: int = MIN_SITES
    max_colluding: int = 0
    min_difference: int = MIN_SITES


class SecureSessions:
    """The secure sums of one site.

    Every method returns the arrays of a reply, after what must be remembered is on disk. A reply that is lost is not
    repeated: the site then counts as dropped out.

    Args:
        path: the database; see `secure_sessions_path`.
        site: the site's name.
        keys: the site's keys.
        roster: the pinned one, whose signature is checked.
        policy: the site's conditions.

    Raises:
        SecureSumError: if the roster is not signed by its authority.
    """

    def __init__(self, path: Path, site: str, keys: SiteKeys, roster: Roster, policy: Policy | None = None) -> None:
        roster.verify()
        self.path = path
        self.site = site
        self.keys = keys
        self.roster = roster
        self.policy = policy or Policy()

    def open(self, context: Context, purpose: Purpose) -> Reply:
        """Begin a session; see `Opening.to_arrays`.

        Args:
            context: that the coordinator proposes.
            purpose: of the request that it comes with, as this site understands it.

        Raises:
            SecureSumError: if the context does not suit the roster, the policy or the purpose, or its id was used.
            FedheadError: if the database is damaged, or the disk is full.
            UserError: if the database may not be written.
        """
        context.check(self.roster, self.policy.min_sites, self.policy.max_colluding)
        _require_purpose(context, purpose)
        state, opening = open_session(context, self.site, self.keys, self.roster)
        with self._transaction() as database:
            if database.execute("SELECT 1 FROM sessions WHERE id = ?", (context.session,)).fetchone():
                raise SecureSumError(f"The site {self.site} was asked to open a secure sum whose id was used before.")
            database.execute(
                "INSERT INTO sessions VALUES (?, ?, ?)", (context.session, time.time(), state.model_dump_json())
            )
            database.execute(
                "UPDATE sessions SET state = NULL WHERE id IN (SELECT id FROM sessions WHERE state IS NOT NULL "
                "ORDER BY began DESC, rowid DESC LIMIT -1 OFFSET ?)",
                (MOST_OPEN,),
            )
        return opening.to_arrays()

    def mask(
        self,
        session: str,
        purpose: Purpose,
        opened: tuple[str, ...],
        arrays: Arrays,
        values: Callable[[], Arrays | None],
    ) -> Reply:
        """Return the site's values with all masks: `masked`, uint64 `[limbs, size]`.

        A value that cannot be summed is no reason for a refusal, which would tell of this site alone.

        Args:
            session: its id.
            purpose: of the request that the values answer, as this site understands it.
            opened: the sites that opened.
            arrays: `Openings.to_arrays`, and as `sealed` the shares that they sealed for this site.
            values: computes the arrays to sum, None if they cannot be; it is called once the exchange is on disk.

        Raises:
            SecureSumError: as `SiteState.mask` does, or if the purpose or the layout is not the session's.
            FedheadError: as `open` does.
        """
        with self._transaction() as database:
            state = self._state(database, session)
            _require_purpose(state.context, purpose)
            known = {name: array for name, array in arrays.items() if name != "sealed"}
            openings = Openings.from_arrays(opened, known, state.context)
            if "sealed" not in arrays:
                raise SecureSumError("A message of the secure sum lacks the sealed shares.")
            state = state.mask(openings, sealed_from_array(opened, arrays["sealed"]), self.keys, self.roster)
            self._keep(database, state)
        return {"masked": state.masked(packed(values(), state.context.layout, len(state.context.sites)))}

    def threshold(self, session: str) -> int:
        """Return the least number of sites whose sum is opened in a session.

        Raises:
            SecureSumError: if the session is unknown, or has ended.
            FedheadError: as `open` does.
        """
        with self._transaction() as database:
            return self._state(database, session).context.threshold

    def agree(self, session: str, survivors: tuple[str, ...]) -> Reply:
        """Sign a set of survivors: `signature`.

        Args:
            session: its id.
            survivors: the sites whose masked values the coordinator has.

        Raises:
            SecureSumError: as `SiteState.agree` does, or if another set was unmasked for the same purpose.
            FedheadError: as `open` does.
        """
        with self._transaction() as database:
            state = self._state(database, session)
            state, signature = state.agree(survivors, self.keys)
            self._check_survivors(database, state)
            self._keep(database, state)
        return signature_to_arrays(signature)

    def unmask(self, session: str, agreed: tuple[str, ...], arrays: Arrays) -> Reply:
        """Return a share of one secret of each opened site: `shares`.

        Args:
            session: its id.
            agreed: the survivors that signed.
            arrays: `Agreements.to_arrays`.

        Raises:
            SecureSumError: as `SiteState.unmask` does, or if another set was unmasked for the same purpose.
            FedheadError: as `open` does.
        """
        with self._transaction() as database:
            state = self._state(database, session)
            ended, shares = state.unmask(Agreements.from_arrays(agreed, arrays, state.context), self.roster)
            self._check_survivors(database, state)
            purpose = state.context.purpose
            database.execute(
                "INSERT OR IGNORE INTO unmasked VALUES (?, ?, ?)",
                (purpose.topic, purpose.run, json.dumps(state.survivors)),
            )
            self._keep(database, ended)
        return shares_to_arrays(shares)

    def _check_survivors(self, database: sqlite3.Connection, state: SiteState) -> None:
        """Check a set of survivors against all sets that were unmasked for the same values.

        Raises:
            SecureSumError: if another set was, and their difference would be about few sites.
        """
        purpose, survivors = state.context.purpose, set(state.survivors)
        query = "SELECT run, survivors FROM unmasked WHERE topic = ?"
        for run, text in database.execute(query, (purpose.topic,)):
            before = set(json.loads(text))
            if run == purpose.run and survivors != before:
                raise SecureSumError(
                    f"The site {self.site} unmasked this sum over other sites before, in the same run; the difference "
                    "of the two would be about the sites in one of them."
                )
            for difference in (survivors - before, before - survivors):
                if 0 < len(difference) < self.policy.min_difference:
                    raise SecureSumError(
                        f"The site {self.site} unmasked this sum in the run {run} over sites that differ by "
                        f"{len(difference)}; {self.policy.min_difference} or more must differ, since the difference of "
                        "the two sums is about these sites alone."
                    )

    def _state(self, database: sqlite3.Connection, session: str) -> SiteState:
        row = database.execute("SELECT state FROM sessions WHERE id = ?", (session,)).fetchone()
        if row is None:
            raise SecureSumError(f"The site {self.site} knows no such secure sum.")
        if row[0] is None:
            raise SecureSumError(f"The site {self.site} has ended this secure sum, or given it up for newer ones.")
        try:
            return SiteState.model_validate_json(row[0])
        except ValidationError:
            raise self._damaged() from None

    def _keep(self, database: sqlite3.Connection, state: SiteState) -> None:
        kept = None if state.stage == "unmasked" else state.model_dump_json()
        database.execute("UPDATE sessions SET state = ? WHERE id = ?", (kept, state.context.session))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Change the database wholly or not at all, while no other process does."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.touch(0o600)
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
                # Secrets of ended sessions are overwritten, and a transaction that has returned survives a power cut.
                database.execute("PRAGMA secure_delete = ON")
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("BEGIN IMMEDIATE")
                try:
                    for table in _TABLES:
                        database.execute(table)
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise FedheadError(
                    f"The disk is full: {self.path} could not be written. Free some space, and start again."
                ) from None
            raise UserError(f"The site's memory of secure sums {self.path} cannot be used: {error}.") from None
        except sqlite3.DatabaseError:
            raise self._damaged() from None
        except OSError as error:
            raise UserError(f"{self.path} may not be written: {error.strerror}.") from None

    def _damaged(self) -> FedheadError:
        return FedheadError(
            f"The site's memory of secure sums {self.path} is damaged. Restore it from a backup: without it the site "
            "cannot know which sums it has unmasked."
        )


def packed(arrays: Arrays | None, layout: Layout, terms: int) -> Elements:
    """Return a site's arrays as elements; random ones if they cannot be summed.

    Args:
        arrays: to sum; None if they could not be computed.
        layout: of the sum.
        terms: the number of sites.

    Raises:
        SecureSumError: if the arrays are of another form.
    """
    try:
        if arrays is not None:
            return layout.pack(arrays, terms)
    except UnsummableError as error:
        logger.error("%s The sum of all sites will not be usable.", error)
    return layout.unsummable()


def secure_sessions_path(site: str) -> Path:
    """Return where the memory of a site's secure sums is kept."""
    return home() / "secure" / f"{safe_name(site)}.sqlite"


def _require_purpose(context: Context, purpose: Purpose) -> None:
    if context.purpose != purpose:
        raise SecureSumError("The secure sum is about something else than the request that it comes with.")
