"""The report's charts: inline SVG from plain numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
"""Number of lines with a colour of their own (`c0` to `c7` in the style sheet)."""


@dataclass(frozen=True)
class Interval:
    """A named share with its 95 % interval, or without one if `low` is None."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    rows: int | None = None


def forest(
    intervals: Sequence[Interval],
    title: str,
    reference: float | None = None,
    wording: Callable[[float], str] | None = None,
) -> Markup:
    """Draw shares in rows, each as a dot with its interval; `reference` is a line across all rows.

    With a custom `wording`, values may be any numbers.
    """
    if wording is not None:
        return _forest_of_numbers(intervals, title, reference, wording)
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


def _forest_of_numbers(
    intervals: Sequence[Interval], title: str, reference: float | None, wording: Callable[[float], str]
) -> Markup:
    names = _name_width([one.name for one in intervals])
    ends = [end for one in intervals for end in (one.value, one.low) if end is not None]
    # A site with few rows may have an R2 of -20, which must not compress all others.
    least, most = max(min([0.0, *ends]), -1.0), 1.0
    if (highest := max(one.value for one in intervals)) > 1:
        least, most = _around([*ends, highest, *(one.high for one in intervals if one.high is not None)])
    scale = Scale(least, most, names + 8, WIDTH - 58)
    bottom = 8 + ROW * len(intervals)
    parts = [bottom_axis(scale, 4, bottom, wording, title)]
    if reference is not None:
        parts.append(line(scale(max(reference, least)), 4, scale(max(reference, least)), bottom, "reference"))
    for row, one in enumerate(intervals):
        y = 8 + ROW * (row + 0.5)
        parts.append(_name(one.name, names, y))
        if one.low is not None and one.high is not None:
            parts.append(line(scale(max(one.low, least)), y, scale(max(one.high, least)), y, "whisker"))
        tip = f"{one.name}: {wording(one.value)}" + (f" of {one.rows} rows" if one.rows is not None else "")
        parts += [
            dot(scale(max(one.value, least)), y, "mark", tip),
            text(WIDTH, y + 4, wording(one.value), "value", "end"),
        ]
    return drawing(bottom + 40, title, *parts)


def calibration(points: Sequence[tuple[float, float, int]]) -> Markup:
    """Draw mean observed values against mean predicted ones, with their numbers of rows and the diagonal."""
    left, bottom = 58.0, 318.0
    values = [value for predicted, observed, _ in points for value in (predicted, observed)]
    room = 0.05 * (max(values) - min(values)) or 1.0
    least, most = min(values) - room, max(values) + room
    across, up = Scale(least, most, left, WIDTH - 12), Scale(least, most, bottom, 26)
    heaviest = max(count for _, _, count in points)
    parts = [
        bottom_axis(across, 26, bottom, _short, "predicted", 5),
        left_axis(up, left, WIDTH - 12, _short, "observed", 5),
        line(across(least), up(least), across(most), up(most), "reference"),
    ]
    for predicted, observed, count in points:
        tip = f"{count} rows: predicted {_short(predicted)}, observed {_short(observed)} on average"
        parts.append(dot(across(predicted), up(observed), "mark", tip, 2 + 4 * (count / heaviest) ** 0.5))
    return drawing(bottom + 40, "Observed against predicted values", *parts)


def _short(value: float) -> str:
    return f"{value:.4g}"


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Draw counts as a matrix, rows by true class and columns by predicted class, shaded by share of the row."""
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
            # Even one row in a thousand must be visible.
            shade = 0.0 if not count else 0.08 + 0.92 * share
            parts.append(rectangle(x, y, cell - 1, cell - 1, "cell", tip))
            if count:
                parts.append(rectangle(x, y, cell - 1, cell - 1, f"fill-{kind}", tip, fill_opacity=shade))
                if labelled:
                    heat = "hot" if shade > 0.78 else "warm" if shade > 0.55 else "cold"
                    parts.append(text(x + (cell - 1) / 2, y + cell / 2 + 4, str(count), f"count {heat}", "middle"))
    return drawing(top + cell * len(names) + 4, "Rows by true and predicted class", *parts)


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], mean: Sequence[tuple[float, float]]) -> Markup:
    """Draw ROC curves, of up to `COLOURS` classes in colours, of more as pale lines, and their mean."""
    left, bottom = 46.0, 318.0
    across, up = Scale(0, 1, left, WIDTH - 12), Scale(0, 1, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, _whole_percent, "false positive rate"),
        left_axis(up, left, WIDTH - 12, _whole_percent, "true positive rate (sensitivity)"),
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


def steps(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], last: float) -> Markup:
    """Draw falling step functions of time from 0 to `last`; each has the value 1 at 0 and then its points' values."""
    left, bottom = 46.0, 268.0
    across, up = Scale(0, last, left, WIDTH - 12), Scale(0, 1, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, lambda value: f"{value:g}", "time"),
        left_axis(up, left, WIDTH - 12, _whole_percent, "without an event"),
    ]
    for number, (name, points) in enumerate(lines):
        path = [(across(points[0][0]), up(points[0][1]))]
        for (_, before), (time, after) in pairwise(points):
            path += [(across(time), up(before)), (across(time), up(after))]
        parts.append(polyline(path, f"curve c{number}", name))
    legend, height = _legend([(name, f"c{number}") for number, (name, _) in enumerate(lines)], bottom + 58)
    return drawing(height, "Kaplan-Meier curves", *parts, legend)


def reliability(
    rows: Sequence[int],
    confidence: Sequence[float | None],
    frequency: Sequence[tuple[float | None, float | None, float | None]],
) -> Markup:
    """Draw observed frequencies against predicted probabilities, above a histogram of the predictions."""
    left, bottom, floor = 46.0, 300.0, 366.0
    across, up = Scale(0, 1, left, WIDTH - 12), Scale(0, 1, bottom, 26)
    bars = Scale(0, max(max(rows, default=0), 1), floor, bottom + 12)
    parts = [
        left_axis(up, left, WIDTH - 12, _whole_percent, "observed frequency"),
        bottom_axis(across, 26, floor, _whole_percent, "predicted probability"),
        line(across(0), up(0), across(1), up(1), "reference"),
        text(left - 6, floor - 4, "rows", "tick", "end"),
    ]
    step = 1 / max(len(rows), 1)
    for number, (count, given, (share, low, high)) in enumerate(zip(rows, confidence, frequency, strict=True)):
        if not count or given is None or share is None:
            continue
        x = across(number * step)
        said = f"{count} predictions with mean probability {percent(given)}; {percent(share)} were correct"
        parts.append(rectangle(x + 1, bars(count), across(step) - left - 2, floor - bars(count), "bar", said))
        if low is not None and high is not None:
            parts.append(line(across(given), up(low), across(given), up(high), "whisker"))
        parts.append(dot(across(given), up(share), "mark", said))
    return drawing(floor + 40, "Observed frequency against predicted probability", *parts)


def progress(
    points: Sequence[tuple[float, float, str]], kept: int, baseline: float | None = None, *, shares: bool = True
) -> Markup:
    """Draw the score over the bytes exchanged.

    Args:
        points: bytes, score, and description of each head, in order.
        kept: the index of the kept head; -1 for none yet.
        baseline: a score for comparison, drawn as a horizontal line.
        shares: whether scores are shares of rows; otherwise they may be negative, or above 1 as perplexities are.
    """
    left, bottom = 46.0, 262.0
    values = [value for _, value, _ in points] + ([baseline] if baseline is not None else [])
    floor = min(max(min(values) - 0.02, 0.0 if shares else -1.0), 0.98)
    across = Scale(0, max(spent for spent, _, _ in points) * 1.04 or 1.0, left, WIDTH - 20)
    top = min(max(values) + 0.01, 1.0)
    if max(values) > 1:
        floor, top = _around(values)
    up = Scale(floor, top, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, lambda count: size(round(count)), "sent and received by all sites so far", 4),
        left_axis(up, left, WIDTH - 12, _fine_percent(up) if shares else _short, "accuracy" if shares else "score"),
    ]
    if baseline is not None:
        parts.append(line(left, up(baseline), WIDTH - 12, up(baseline), "reference"))
        parts.append(text(WIDTH - 14, up(baseline) - 5, "without transfer", "tick", "end"))
    path = [(across(spent), up(max(value, floor))) for spent, value, _ in points]
    parts.append(polyline(path, "curve c0"))
    small = len(points) > 40
    parts += [dot(x, y, "mark", tip, 2.0 if small else 3.5) for (x, y), (_, _, tip) in zip(path, points, strict=True)]
    if 0 <= kept < len(path):
        parts.append(dot(*path[kept], "ring", f"kept: {points[kept][2]}", 8.0))
    return drawing(bottom + 40, f"{'Accuracy' if shares else 'Score'} over the bytes exchanged", *parts)


@dataclass(frozen=True)
class Choice:
    """Share that a site's own head, the shared head and the other sites' head reach on the site's held-out rows."""

    name: str
    own: float
    pooled: float
    others: float
    rows: int


CHOICES = (("the site's own head", "c1"), ("the shared head", "c0"), ("the head without the site", "c2"))


def choices(sites: Sequence[Choice], measure: str = "accuracy") -> Markup:
    """Draw a line for each site, from its own head to the shared one."""
    names = _name_width([one.name for one in sites])
    least = min(min(one.own, one.pooled, one.others) for one in sites)
    scale = Scale(_share_floor(least), 1.0, names + 10, WIDTH - 10)
    bottom = 8 + ROW * len(sites)
    parts = [bottom_axis(scale, 4, bottom, _whole_percent, f"{measure} on the site's held-out rows")]
    for row, one in enumerate(sites):
        y = 8 + ROW * (row + 0.5)
        tip = f"{one.name}, {one.rows} rows: own {percent(one.own)}, shared {percent(one.pooled)}, "
        tip += f"without it {percent(one.others)}"
        parts += [_name(one.name, names, y), line(scale(one.own), y, scale(one.pooled), y, "link")]
        parts.append(_diamond(scale(one.others), y, tip))
        parts += [dot(scale(one.own), y, "mark c1 hollow", tip, 5.0), dot(scale(one.pooled), y, "mark c0", tip, 3.2)]
    legend, height = _legend(CHOICES, bottom + 58)
    return drawing(height, "Each site's own head beside the shared head", *parts, legend)


def own_against_shared(sites: Sequence[Choice], measure: str = "accuracy") -> Markup:
    """Draw a dot for each of many sites: above the line the shared head is better, below it the site's own."""
    left, bottom = 46.0, 318.0
    least = _share_floor(min(min(one.own, one.pooled) for one in sites))
    across, up = Scale(least, 1, left, WIDTH - 12), Scale(least, 1, bottom, 26)
    parts = [
        bottom_axis(across, 26, bottom, _whole_percent, f"{measure}, site's own head"),
        left_axis(up, left, WIDTH - 12, _whole_percent, f"{measure}, shared head"),
        line(across(least), up(least), across(1), up(1), "reference"),
    ]
    parts += [dot(across(one.own), up(one.pooled), "mark faint", "", 3.0) for one in sites]
    return drawing(bottom + 40, "Each site's own head against the shared head", *parts)


def distribution(values: Sequence[float], title: str, bins: int = 20) -> Markup:
    """Draw a histogram of shares."""
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
    """Draw a stacked bar for each name, a part for each of `kinds`, on one scale from 0 with a line at `mark`."""
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
    """Return names beside their colours, in as many lines as needed, and the bottom coordinate."""
    parts, x, y = [], 4.0, top
    for name, colour in entries:
        shown = shortened(name, WIDTH - 40)
        width = 22 + LETTER * len(shown) + 14
        if x + width > WIDTH and x > 4:
            x, y = 4.0, y + 18
        parts += [rectangle(x, y - 8, 12, 8, f"bar {colour}"), text(x + 17, y, shown, "tick")]
        x += width
    return join(parts), y + 10


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of numbers such as perplexities, with a little room on both sides."""
    room = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


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
    """Return a round start value below the least share, so that differences are visible."""
    return max(0.0, min(int((least - 0.02) * 10) / 10, 0.9)) if least > 0.1 else 0.0


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _fine_percent(scale: Scale) -> Callable[[float], str]:
    span = scale.high - scale.low
    digits = 2 if span < 0.01 else 1 if span < 0.05 else 0
    return lambda share: f"{100 * share:.{digits}f} %"
