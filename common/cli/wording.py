"""How figures are worded on a terminal."""

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


def interval(estimate: "Estimate") -> str:
    """Return a share and its 95 % interval, in per cent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"
