"""How figures are worded, on a terminal and in reports."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedhead.metrics import Estimate


def percent(share: float | None) -> str:
    """Return a share in 0..1 as per cent, and nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def size(count: int) -> str:
    """Return a number of bytes with its unit."""
    if count < 1000:
        return f"{count} B"
    for unit, factor in (("kB", 1e3), ("MB", 1e6)):
        if count < 1000 * factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """Return a time span in the unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, what: str, plural: str = "") -> str:
    """Return a number with what it counts: `1 site`, `2 sites`."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """Return names with commas between them, after `most` of them only how many others there are."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {counted(others, 'other')}" if others > 0 else "")


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return who has each reason, in the order in which the reasons are first given."""
    shared: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        shared.setdefault(reason, []).append(name)
    return shared


def interval(estimate: "Estimate") -> str:
    """Return a share and its 95 % interval, in per cent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"
