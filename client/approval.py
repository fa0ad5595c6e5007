"""Approval by a person: the first release of each kind waits until someone at the site has agreed to it."""

import json
from collections.abc import Callable
from pathlib import Path

from fedhead.client.guard import Entry
from fedhead.errors import FedheadError
from fedhead.files import write_atomically

Ask = Callable[[str], bool]
"""Shows a person what would leave, and returns whether they agree."""


class Approvals:
    """Lets a release pass if a person agreed to its kind before, or agrees now; remembers what they agreed to.

    Args:
        path: where it is remembered.
        coordinator: whom the approvals are for: the digest of its key, or its address where it has none.
        ask: how to reach a person; None if nobody is there.
    """

    def __init__(self, path: Path, coordinator: str, ask: Ask | None) -> None:
        self._path = path
        self._coordinator = coordinator
        self._ask = ask

    def __call__(self, entry: Entry) -> None:
        """Return if `entry` may leave.

        Raises:
            FedheadError: if nobody agreed, or the approvals on disk are damaged.
        """
        approved = self._read()
        mine = approved.setdefault(self._coordinator, {})
        if entry.action in mine:
            return
        if self._ask is None:
            raise FedheadError(
                f"{entry.site} releases {entry.action} only after a person there has approved it, and nobody can be "
                "asked: fedhead client --approve was started without a terminal. Start it in one, once."
            )
        if not self._ask(described(entry)):
            raise FedheadError(f"The operator of {entry.site} did not approve {entry.action}.")
        mine[entry.action] = entry.when.isoformat()
        write_atomically(self._path, json.dumps(approved, indent=1) + "\n")

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            approved = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FedheadError(
                f"The approvals in {self._path} cannot be read ({error}). Remove the file, and approve again."
            ) from None
        return {str(coordinator): dict(actions) for coordinator, actions in approved.items()}


def described(entry: Entry) -> str:
    """Return a ledger entry as a person reads it."""
    classes = ", ".join(f"{name} {count}" for name, count in entry.classes.items()) or "none"
    return (
        f"action   {entry.action}\nrun      {entry.run}\nrows     {entry.rows}\nclasses  {classes}\n"
        f"bytes    {entry.bytes}\ndigest   {entry.digest}"
    )
