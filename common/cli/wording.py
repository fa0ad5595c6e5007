"""How figures are worded on a terminal."""


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
