"""How figures are worded, on a terminal and in reports, and how texts from outside are made safe to show."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedhead.evaluation.metrics import Estimate

MOST_CHARACTERS = 500
"""Length of a text from outside that is kept."""

MOST_NAMES = 20
"""Names that a sentence lists in quotes."""

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""Controls, line separators, surrogates, and characters that are invisible or change the order of a line."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")


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
    """Return a number with its noun: `1 site`, `2 sites`."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def signed(value: float, decimals: int) -> str:
    """Return a number with its sign; a number that rounds to 0 has none."""
    return f"{rounded:+.{decimals}f}" if (rounded := round(value, decimals)) else f"{0:.{decimals}f}"


def listed(names: Sequence[str], most: int) -> str:
    """Return names with commas between them, after `most` of them only how many others there are."""
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {counted(others, 'other')}" if others > 0 else "")


def quoted(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """Return names in quotes with commas between them, after `most` of them only how many others there are."""
    return listed([*map(repr, names)], most)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names with each reason, in the order of the reasons' first occurrence."""
    shared: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        shared.setdefault(reason, []).append(name)
    return shared


def interval(estimate: "Estimate") -> str:
    """Return a share and its 95 % interval, in per cent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "-"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"


def number_interval(estimate: "Estimate", decimals: int | None = None) -> str:
    """Return a number and its 95 % interval, with as many decimals, or four significant digits."""
    if estimate.value is None:
        return "-"
    form = ".4g" if decimals is None else f".{decimals}f"
    value = f"{estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({estimate.low:{form}} to {estimate.high:{form}})"


def score_words(score: float | None, score_name: str) -> str:
    """Return a score as a person reads it: an accuracy in per cent, others as a number."""
    if score_name == "accuracy":
        return percent(score)
    return "" if score is None else f"{score:.3f}"


def printable(text: str) -> str:
    """Return a text that UTF-8 can hold: bytes of names in another encoding are read as Latin-1.

    Python keeps the bytes of file names that are not UTF-8 as half surrogate pairs, which no strict encoder takes.
    """
    return _SURROGATES.sub(_whole, text)


def without_controls(text: str) -> str:
    r"""Return a text that a terminal or page shows as it is; control characters become escapes such as `\x1b`.

    Newlines and tabs stay. Characters that reorder a line, or that are invisible, count as controls.
    """
    return _CONTROLS.sub(_escaped, printable(text))


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text from outside as one line without control characters, cut to `most` characters."""
    cut = without_controls(_BREAKS.sub(" ", printable(text[: most + 1])))
    return cut if len(cut) <= most else cut[: most - 1] + "…"


def _escaped(control: re.Match[str]) -> str:
    code = ord(control[0])
    return f"\\x{code:02x}" if code < 2**8 else f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def _whole(surrogate: re.Match[str]) -> str:
    code = ord(surrogate[0])
    return chr(code - 0xDC00) if 0xDC80 <= code <= 0xDCFF else "\ufffd"
