"""The report's charts: plain numbers in, inline SVG out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedhead.server.report.svg import (
    LETTER,
    WIDTH,
    Scale,
    bottom_axis,
    dot,
    drawing,
    element,
    join,
    left_axis,
    line,
    polyline,
    rectangle,
    shortened,
    text,
)
from fedhead.wording import percent, size

ROW = 20.0
COLOURS = 8
"""So many lines have a colour of their own (`c0` to `c7` in the style sheet)."""


@dataclass(frozen=True)
class Interval:
    """A named share with its 95 % interval, or without one where `low` is None."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    rows: int | None = None


def forest(intervals: Sequence[Interval], title: str, reference: float | None = None) -> Markup:
    """Return shares one below another, each a dot with its interval; `reference` is drawn across all."""
    names = _name_width([one.name for one in intervals])
    least = min([one.value if one.low is None else one.low for one in intervals], default=0.0)
    scale = Scale(_share_floor(least), 1.0, names + 8, WIDTH - 58)
    bottom = 8 + ROW * len(intervals)
    parts = [bottom_axis(scale, 4, bottom, _whole_percent, title)]
    if reference is not None:
        parts.append(line(scale(reference), 4, scale(reference), bottom, "reference"))
    for row, one in enumerate(intervals):
        y = 8 + ROW * (row + 0.5)
        parts.append(_name(one.name, names, y))
        if one.low is not None and one.high is not None:
            parts.append(line(scale(one.low), y, scale(one.high), y, "whisker"))
        tip = f"{one.name}: {percent(one.value)}" + (f" of {one.rows} rows" if one.rows is not None else "")
        parts += [dot(scale(one.value), y, "mark", tip), text(WIDTH, y + 4, percent(one.value), "value", "end")]
    return drawing(bottom + 40, title, *parts)


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Return a square of counts, rows by true class and columns by predicted class, shaded by share of the row."""
    left = _name_width(names, most=92) + 6
    cell = min((WIDTH - left) / len(names), 46.0)
    top = max(_name_width(names, most=70) * 0.75, 8) + 30
    labelled = cell >= 19
    parts = [text(left, 12, "predicted as →", "title")]
    for number, name in enumerate(names):
        x = left + cell * (number + 0.5)
        turned = f"rotate(-45 {x:.1f} {top - 6:.1f})"
        parts.append(
            element(
                "text", element("title", name), shortened(name, 70), x=x, y=top - 6, class_="tick", transform=turned
            )
        )
        parts.append(_name(name, left - 6, top + cell * (number + 0.5)))
    for row, line_of_counts in enumerate(counts):
        total = sum(line_of_counts)
        for column, count in enumerate(line_of_counts):
            share = count / total if total else 0.0
            x, y = left + cell * column, top + cell * row
            tip = f"{count} of {total} rows of {names[row]} predicted as {names[column]}"
            kind = "right" if row == column else "wrong"
            # One row in a thousand must still be seen.
            shade = 0.0 if not count else 0.08 + 0.92 * share
            parts.append(rectangle(x, y, cell - 1, cell - 1, "cell", tip))
            if count:
                parts.append(rectangle(x, y, cell - 1, cell - 1, f"fill-{kind}", tip, fill_opacity=shade))
                if labelled:
                    heat = "hot" if shade > 0.78 else "warm" if shade > 0.55 else "cold"
                    parts.append(text(x + (cell - 1) / 2, y + cell / 2 + 4, str(count), f"count {heat}", "middle"))
    return drawing(top + cell * len(names) + 4, "Rows by true and predicted class", *parts)


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], mean: Sequence[tuple[float, float]]) -> Markup:
    """Return ROC curves: of up to `COLOURS` classes each in a colour, of more as pale lines; their mean over them."""
    left, bottom = 46.0, 318.0
    across, up = Scale(0, 1, left, WIDTH - 12), Scale(0, 1, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, _whole_percent, "other rows wrongly taken for the class"),
        left_axis(up, left, WIDTH - 12, _whole_percent, "rows of the class found"),
        line(across(0), up(0), across(1), up(1), "reference"),
    ]
    few = len(lines) <= COLOURS
    for number, (name, points) in enumerate(lines):
        path = [(across(x), up(y)) for x, y in points]
        parts.append(polyline(path, f"curve c{number}" if few else "curve pale", name))
    if mean:
        parts.append(polyline([(across(x), up(y)) for x, y in mean], "curve mean", "mean of the classes"))
    entries = [(name, f"c{number}") for number, (name, _) in enumerate(lines)] if few else [("each class", "pale")]
    if mean:
        entries.append(("mean of the classes", "mean"))
    legend, height = _legend(entries, bottom + 58)
    return drawing(height, "Receiver operating characteristic of each class", *parts, legend)


def reliability(
    rows: Sequence[int],
    confidence: Sequence[float | None],
    frequency: Sequence[tuple[float | None, float | None, float | None]],
) -> Markup:
    """Return what came true against the probability given, and below it how many predictions each probability has."""
    left, bottom, floor = 46.0, 300.0, 366.0
    across, up = Scale(0, 1, left, WIDTH - 12), Scale(0, 1, bottom, 26)
    bars = Scale(0, max(max(rows, default=0), 1), floor, bottom + 12)
    parts = [
        left_axis(up, left, WIDTH - 12, _whole_percent, "came true"),
        bottom_axis(across, 26, floor, _whole_percent, "probability given"),
        line(across(0), up(0), across(1), up(1), "reference"),
        text(left - 6, floor - 4, "rows", "tick", "end"),
    ]
    step = 1 / max(len(rows), 1)
    for number, (count, given, (share, low, high)) in enumerate(zip(rows, confidence, frequency, strict=True)):
        if not count or given is None or share is None:
            continue
        x = across(number * step)
        said = f"{count} predictions given {percent(given)} on average; {percent(share)} came true"
        parts.append(rectangle(x + 1, bars(count), across(step) - left - 2, floor - bars(count), "bar", said))
        if low is not None and high is not None:
            parts.append(line(across(given), up(low), across(given), up(high), "whisker"))
        parts.append(dot(across(given), up(share), "mark", said))
    return drawing(floor + 40, "Share that came true, against the probability given", *parts)


def progress(points: Sequence[tuple[float, float, str]], kept: int, baseline: float | None = None) -> Markup:
    """Return accuracy over all bytes exchanged so far.

    Args:
        points: bytes, accuracy, and what made the head, in order.
        kept: which point is the head that is kept; -1 for none yet.
        baseline: an accuracy to compare with, drawn across.
    """
    left, bottom = 46.0, 262.0
    values = [value for _, value, _ in points] + ([baseline] if baseline is not None else [])
    floor = min(max(min(values) - 0.02, 0.0), 0.98)
    across = Scale(0, max(spent for spent, _, _ in points) * 1.04 or 1.0, left, WIDTH - 20)
    up = Scale(floor, min(max(values) + 0.01, 1.0), bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, lambda count: size(round(count)), "sent and received by all sites so far", 4),
        left_axis(up, left, WIDTH - 12, _fine_percent(up), "accuracy"),
    ]
    if baseline is not None:
        parts.append(line(left, up(baseline), WIDTH - 12, up(baseline), "reference"))
        parts.append(text(WIDTH - 14, up(baseline) - 5, "without transfer", "tick", "end"))
    path = [(across(spent), up(value)) for spent, value, _ in points]
    parts.append(polyline(path, "curve c0"))
    small = len(points) > 40
    parts += [dot(x, y, "mark", tip, 2.0 if small else 3.5) for (x, y), (_, _, tip) in zip(path, points, strict=True)]
    if 0 <= kept < len(path):
        parts.append(dot(*path[kept], "ring", f"kept: {points[kept][2]}", 8.0))
    return drawing(bottom + 40, "Accuracy over the bytes exchanged", *parts)


@dataclass(frozen=True)
class Choice:
    """How a site's own head, the shared head, and the head of the others do on its held-out rows."""

    name: str
    own: float
    pooled: float
    others: float
    rows: int


CHOICES = (("a head of its own", "c1"), ("the shared head", "c0"), ("a head made without the site", "c2"))


def choices(sites: Sequence[Choice]) -> Markup:
    """Return a line for each site, from its own head to the shared one."""
    names = _name_width([one.name for one in sites])
    least = min(min(one.own, one.pooled, one.others) for one in sites)
    scale = Scale(_share_floor(least), 1.0, names + 10, WIDTH - 10)
    bottom = 8 + ROW * len(sites)
    parts = [bottom_axis(scale, 4, bottom, _whole_percent, "accuracy on the site's held-out rows")]
    for row, one in enumerate(sites):
        y = 8 + ROW * (row + 0.5)
        tip = f"{one.name}, {one.rows} rows: own {percent(one.own)}, shared {percent(one.pooled)}, "
        tip += f"without it {percent(one.others)}"
        parts += [_name(one.name, names, y), line(scale(one.own), y, scale(one.pooled), y, "link")]
        parts.append(_diamond(scale(one.others), y, tip))
        parts += [dot(scale(one.own), y, "mark c1 hollow", tip, 5.0), dot(scale(one.pooled), y, "mark c0", tip, 3.2)]
    legend, height = _legend(CHOICES, bottom + 58)
    return drawing(height, "Each site's own head beside the shared head", *parts, legend)


def own_against_shared(sites: Sequence[Choice]) -> Markup:
    """Return a dot for each of many sites: above the line the shared head is better, below it its own."""
    left, bottom = 46.0, 318.0
    least = _share_floor(min(min(one.own, one.pooled) for one in sites))
    across, up = Scale(least, 1, left, WIDTH - 12), Scale(least, 1, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, _whole_percent, "accuracy of a head of its own"),
        left_axis(up, left, WIDTH - 12, _whole_percent, "accuracy of the shared head"),
        line(across(least), up(least), across(1), up(1), "reference"),
    ]
    parts += [dot(across(one.own), up(one.pooled), "mark faint", "", 3.0) for one in sites]
    return drawing(bottom + 40, "Each site's own head against the shared head", *parts)


def distribution(values: Sequence[float], title: str, bins: int = 20) -> Markup:
    """Return how many of many shares lie where."""
    left, bottom = 46.0, 200.0
    least = _share_floor(min(values))
    width = (1 - least) / bins
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - least) / width), 0), bins - 1)] += 1
    across, up = Scale(least, 1, left, WIDTH - 12), Scale(0, max(counts), bottom, 26)
    parts = [
        bottom_axis(across, bottom, bottom, _whole_percent, title),
        left_axis(up, left, WIDTH - 12, lambda count: f"{count:g}", "sites", 4),
    ]
    for number, count in enumerate(counts):
        start, end = across(least + number * width), across(least + (number + 1) * width)
        said = f"{count} from {percent(least + number * width)} to {percent(least + (number + 1) * width)}"
        parts.append(rectangle(start + 1, up(count), end - start - 2, bottom - up(count), "bar", said))
    return drawing(bottom + 40, title, *parts)


def bars(
    parts_of: Sequence[tuple[str, Sequence[float]]],
    kinds: Sequence[str],
    wording: Callable[[float], str],
    mark: float = 0.0,
) -> Markup:
    """Return a bar for each name, of one part for each of `kinds`, to one scale from 0, in which `mark` is drawn."""
    names = _name_width([name for name, _ in parts_of])
    most = max([mark, *(sum(values) for _, values in parts_of)]) or 1.0
    scale = Scale(0, most, names + 8, WIDTH - 68)
    drawn = []
    for row, (name, values) in enumerate(parts_of):
        y = 4 + ROW * row
        drawn.append(_name(name, names, y + ROW / 2))
        x = scale(0)
        for kind, value in enumerate(values):
            length = scale(value) - scale(0)
            said = f"{name}: {wording(value)}" + (f" {kinds[kind]}" if kinds[kind] else "")
            drawn.append(rectangle(x, y + 3, max(length, 0.5) if value else 0, ROW - 6, f"bar c{kind}", said))
            x += length
        drawn.append(text(x + 6, y + ROW / 2 + 4, wording(sum(values)), "value"))
    bottom = 8 + ROW * len(parts_of)
    if mark:
        drawn.append(line(scale(mark), 0, scale(mark), bottom, "reference"))
    legend, height = Markup(""), bottom + 4
    if len(kinds) > 1:
        legend, height = _legend([(kind, f"c{number}") for number, kind in enumerate(kinds)], bottom + 14)
    return drawing(height, ", ".join(name for name, _ in parts_of[:10]), *drawn, legend)


def _legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[Markup, float]:
    """Return names beside their colours in as many lines as needed, and where they end."""
    parts, x, y = [], 4.0, top
    for name, colour in entries:
        shown = shortened(name, WIDTH - 40)
        width = 22 + LETTER * len(shown) + 14
        if x + width > WIDTH and x > 4:
            x, y = 4.0, y + 18
        parts += [rectangle(x, y - 8, 12, 8, f"bar {colour}"), text(x + 17, y, shown, "tick")]
        x += width
    return join(parts), y + 10


def _name_width(names: Sequence[str], most: float = 130) -> float:
    return min(max((len(name) for name in names), default=0) * LETTER + 4, most)


def _name(name: str, width: float, y: float) -> Markup:
    return element(
        "text", element("title", name), shortened(name, width), x=width, y=y + 4, class_="name", text_anchor="end"
    )


def _diamond(x: float, y: float, tip: str) -> Markup:
    reach = 5.0
    points = f"{x:.1f},{y - reach:.1f} {x + reach:.1f},{y:.1f} {x:.1f},{y + reach:.1f} {x - reach:.1f},{y:.1f}"
    return element("polygon", element("title", tip), points=points, class_="mark c2 hollow")


def _share_floor(least: float) -> float:
    """Return where an axis of shares starts: a round value below the least, so that differences are seen."""
    return max(0.0, min(int((least - 0.02) * 10) / 10, 0.9)) if least > 0.1 else 0.0


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _fine_percent(scale: Scale) -> Callable[[float], str]:
    span = scale.high - scale.low
    digits = 2 if span < 0.01 else 1 if span < 0.05 else 0
    return lambda share: f"{100 * share:.{digits}f} %"
