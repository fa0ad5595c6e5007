"""A site's privacy accounts: the `mu^2` that noisy releases have spent, and the noisy sums themselves.

Training rows and held-out rows are different rows, so each has an account, and a row's guarantee is its own account's.
A reply is stored before its account is charged, and charged before it leaves. The same request gets the stored reply
again: the same sums with fresh noise would be a second release.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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

Account = Literal["train", "held_out"]
ACCOUNTS: Mapping[Account, str] = {"train": "training rows", "held_out": "held-out rows"}
"""The accounts, and the rows that each is about."""

_ROUNDING = 1 + 1e-9


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


class Accounts:
    """The accounts of one site.

    Args:
        path: a file of JSON lines that only grows; replies are stored in a folder beside it.
        epsilon: that each account may spend in its lifetime.
        delta: the same.
    """

    def __init__(self, path: Path, epsilon: float, delta: float) -> None:
        self.path = path
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
            others = compose(charge.mu for charge in charges if charge.account == account and charge.run != run)
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
                return self._stored(key)
            own = [charge for charge in charges if charge.account == account]
            if compose([*(charge.mu for charge in own if charge.run == run), mu]) > most * _ROUNDING:
                raise FedheadError("The run has spent the privacy budget that its manifest states.")
            if compose([*(charge.mu for charge in own), mu]) > self.mu * _ROUNDING:
                raise FedheadError(f"The privacy budget of this site's {ACCOUNTS[account]} is spent.")
            noisy = draw()
            # Sums without a file of accounts mean that it was lost; see `read_charges`.
            self._write(charges)
            self._replies.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._replies / f"{key}.safetensors", save(noisy))
            sync_folder(self._replies)
            about = {"run": run, "stage": stage, "account": account, "mu": mu, "key": key}
            charge = Charge(when=datetime.now(UTC), **about, epsilon=self.epsilon, delta=self.delta)
            self._write([*charges, charge])
        return noisy

    def _write(self, charges: Sequence[Charge]) -> None:
        write_atomically(self.path, "".join(f"{charge.model_dump_json()}\n" for charge in charges))
        sync_folder(self.path.parent)

    @property
    def _replies(self) -> Path:
        return _replies(self.path)

    def _stored(self, key: str) -> dict[str, FloatArray]:
        path = self._replies / f"{key}.safetensors"
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
        FedheadError: if the file is damaged, cannot be read, or is missing although noisy sums were released.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if any(_replies(path).glob("*.safetensors")):
            raise FedheadError(
                f"The privacy accounts {path} are missing, but {_replies(path)} has noisy sums that they charged. "
                "Restore the file from a backup: without it, nothing leaves with noise, because the budget would begin "
                "anew."
            ) from None
        return []
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
    """Return the state of each account under the budget of the latest charge; none without charges."""
    if not charges:
        return []
    epsilon, delta = charges[-1].epsilon, charges[-1].delta
    rows = []
    for account, name in ACCOUNTS.items():
        own = [charge.mu for charge in charges if charge.account == account]
        mu = compose(own)
        rest = math.sqrt(max(mu_for(epsilon, delta) ** 2 - mu**2, 0.0))
        rows.append(Statement(name, mu, epsilon_for(mu, delta), epsilon_for(rest, delta), epsilon, delta, len(own)))
    return rows
