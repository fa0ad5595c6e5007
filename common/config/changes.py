"""Changes over settings, from tables or from texts as in `local.lr=0.05`."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from fedhead.errors import UserError


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` over them, table by table."""
    merged = dict(values)
    for key, change in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, change) if isinstance(below, dict) and isinstance(change, dict) else change
    return merged


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `TABLE.KEY=VALUE` texts into nested changes; a value is TOML, or else text.

    Raises:
        UserError: if one has no `=` or no key.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise UserError(f"Expected TABLE.KEY=VALUE, as in local.lr=0.05, not {assignment!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        for key in reversed(keys):
            value = {key: value}
        changes = merge(changes, value)
    return changes
