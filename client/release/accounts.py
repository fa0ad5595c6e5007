"""A site's privacy accounts: the `mu^2` that noisy releases have spent, and the noisy sums themselves.

Training rows and held-out rows are different rows, so each has an account, and a row's guarantee is its own account's.
When the site holds out another share, rows change sides, and all charges under other shares count for both.

A reply is stored as pending before its account is charged, and charged before it leaves. The same request gets the
stored reply again: the same sums with fresh noise would be a second release.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.errors import FedheadError
from fedhead.files import disk_errors, locked, sync_folder, write_atomically
from fedhead.privacy.accountant import compose, epsilon_for, mu_for
from fedhead.privacy.noise import FloatArray
from fedhead.wording import counted

Account = Literal["train", "held_out"]
ACCOUNTS: Mapping[Account, str] = {"train": "training rows", "held_out": "held-out rows"}
"""The accounts, and the rows that each is about."""

_ROUNDING = 1 + 1e-9
_PENDING, _CHARGED = ".pending", ".safetensors"
"""Suffixes of stored replies, before and after their charge is written."""


class Charge(BaseModel):
    """One noisy release.

    Attributes:
        when: in UTC.
        run: the id of the run.
        stage: the sums that were released.
        account: the rows that are charged.
        mu: that the release spent.
        key: the digest of the request, and the name of the stored reply.
        epsilon: the budget of the account's lifetime, as the site's settings had it.
        delta: the same.
        share: of the rows that the site held out; None for charges that do not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: AwareDatetime
    run: str
    stage: str
    account: Account
    mu: float = Field(gt=0, allow_inf_nan=False)
    key: str = Field(pattern="^[0-9a-f]{64}$")
    epsilon: float = Field(ge=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    share: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)

    def counts_for(self, account: Account, share: float | None) -> bool:
        """Return whether the release may rest on rows of an account, if a share of all rows is held out now."""
        return self.account == account or share is None or self.share != share


class Accounts:
    """The accounts of one site.

    Args:
        path: a file of JSON lines that only grows; replies are stored in a folder beside it.
        epsilon: that each account may spend in its lifetime.
        delta: the same.
        share: of the rows that the site holds out.
    """

    def __init__(self, path: Path, epsilon: float, delta: float, share: float) -> None:
        self.path = path
        self.share = share
        self.delta = delta
        self.epsilon = epsilon
        self.mu = mu_for(epsilon, delta)

    def charges(self) -> list[Charge]:
        """Return all charges, oldest first.

        Raises:
            FedheadError: if the file is damaged.
        """
        return read_charges(self.path)

    def require(self, run: str, needs: Mapping[Account, float]) -> None:
        """Check that the budget covers a run's plan beside the spending of other runs.

        Args:
            run: its id.
            needs: the `mu` that it spends of each account.

        Raises:
            FedheadError: if an account holds less; it says so without a number.
        """
        charges = self.charges()
        for account, mu in needs.items():
            own = (charge for charge in charges if charge.counts_for(account, self.share))
            others = compose(charge.mu for charge in own if (charge.run, charge.account) != (run, account))
            if compose((others, mu)) > self.mu * _ROUNDING:
                raise FedheadError(
                    f"The run asks for more privacy budget of this site's {ACCOUNTS[account]} than is left; fedhead "
                    "ledger shows the accounts. Lower the run's epsilon, or raise epsilon in [privacy] of site.toml."
                )

    def release(
        self,
        run: str,
        stage: str,
        account: Account,
        mu: float,
        most: float,
        key: str,
        draw: Callable[[], dict[str, FloatArray]],
    ) -> dict[str, FloatArray]:
        """Return the noisy sums of a request: the stored ones, or new ones that are stored and charged.

        Args:
            run: the id of the run.
            stage: the sums.
            account: the rows to charge.
            mu: that a new release spends.
            most: the `mu` that the run may spend of this account.
            key: the digest of the request.
            draw: makes new noisy sums.

        Raises:
            FedheadError: if the account or the run's share of it does not hold so much, or a file is damaged.
        """
        with disk_errors(self.path), locked(self.path.with_suffix(".lock")):
            charges = self.charges()
            if any(charge.key == key for charge in charges):
                # The process may have been ended after the charge.
                self._settle(key)
                return self._stored(key)
            own = [charge for charge in charges if charge.counts_for(account, self.share)]
            spent = (charge.mu for charge in own if (charge.run, charge.account) == (run, account))
            if compose([*spent, mu]) > most * _ROUNDING:
                raise FedheadError("The run has spent the privacy budget that its manifest states.")
            if compose([*(charge.mu for charge in own), mu]) > self.mu * _ROUNDING:
                raise FedheadError(f"The privacy budget of this site's {ACCOUNTS[account]} is spent.")
            noisy = draw()
            self._replies.mkdir(mode=0o700, parents=True, exist_ok=True)
            pending = self._replies / f"{key}{_PENDING}"
            write_atomically(pending, save(noisy))
            sync_folder(self._replies)
            about = {"run": run, "stage": stage, "account": account, "mu": mu, "key": key}
            charge = Charge(when=datetime.now(UTC), **about, epsilon=self.epsilon, delta=self.delta, share=self.share)
            self._write([*charges, charge])
            self._settle(key)
        return noisy

    def _write(self, charges: Sequence[Charge]) -> None:
        write_atomically(self.path, "".join(f"{charge.model_dump_json()}\n" for charge in charges))
        sync_folder(self.path.parent)

    @property
    def _replies(self) -> Path:
        return _replies(self.path)

    def _settle(self, key: str) -> None:
        """Mark a stored reply as charged."""
        with suppress(FileNotFoundError):
            (self._replies / f"{key}{_PENDING}").replace(self._replies / f"{key}{_CHARGED}")
            sync_folder(self._replies)

    def _stored(self, key: str) -> dict[str, FloatArray]:
        path = self._replies / f"{key}{_CHARGED}"
        try:
            return {name: np.array(array) for name, array in load(path.read_bytes()).items()}
        except (OSError, SafetensorError):
            raise FedheadError(
                "The stored reply to this request is missing or damaged at the site, and fresh noise would be a second "
                "release. Start a new run."
            ) from None


def _replies(path: Path) -> Path:
    """Return the folder of the stored replies."""
    return path.with_suffix(".replies")


def accounts_path(ledger: Path) -> Path:
    """Return the file of the accounts beside a site's ledger."""
    return ledger.with_suffix(".privacy")


def read_charges(path: Path) -> list[Charge]:
    """Return all charges of a file, oldest first; none if there is no file.

    Raises:
        FedheadError: if the file is damaged, cannot be read, or lacks charges of noisy sums that were released.
    """
    # Before the charges, which another process may be adding to.
    released = {reply.stem for reply in _replies(path).glob(f"*{_CHARGED}")}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise FedheadError(f"The privacy accounts {path} cannot be read: {error}.") from None
    charges = []
    for number, line in enumerate(lines, start=1):
        try:
            charges.append(Charge.model_validate_json(line))
        except ValidationError:
            raise FedheadError(
                f"Line {number} of the privacy accounts {path} is damaged or was changed by hand. Restore the file "
                "from a backup; nothing leaves with noise until it can be read."
            ) from None
    if lost := released - {charge.key for charge in charges}:
        raise FedheadError(
            f"The privacy accounts {path} are missing or lack charges: {_replies(path)} has "
            f"{counted(len(lost), 'noisy reply', 'noisy replies')} that they do not charge. Restore the file from a "
            "backup: without it, nothing leaves with noise, because the budget would begin anew."
        )
    return charges


@dataclass(frozen=True)
class Statement:
    """The state of one account.

    Attributes:
        name: the rows that it is about.
        mu: spent.
        spent: the same as epsilon at `delta`.
        left: epsilon that one more run may spend.
        epsilon: the budget.
        delta: the same.
        releases: the number of noisy releases.
    """

    name: str
    mu: float
    spent: float
    left: float
    epsilon: float
    delta: float
    releases: int


def statements(charges: list[Charge]) -> list[Statement]:
    """Return the state of each account under the budget and the held-out share of the latest charge.

    Returns:
        None without charges. A release that rests on rows of both accounts is in both.
    """
    if not charges:
        return []
    epsilon, delta = charges[-1].epsilon, charges[-1].delta
    rows = []
    for account, name in ACCOUNTS.items():
        own = [charge.mu for charge in charges if charge.counts_for(account, charges[-1].share)]
        mu = compose(own)
        rest = math.sqrt(max(mu_for(epsilon, delta) ** 2 - mu**2, 0.0))
        rows.append(Statement(name, mu, epsilon_for(mu, delta), epsilon_for(rest, delta), epsilon, delta, len(own)))
    return rows
