"""Elements, scales and axes of inline SVG: text is escaped, and the page's style sheet sets colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 440.0
"""Width of every chart in its own units: text of size 12 stays readable on a phone, scaled down to 340 pixels."""

LETTER = 6.4
"""Average width of a letter in axis labels."""


def element(name: str, *children: Markup | str, **attributes: str | float | None) -> Markup:
    """Return an element; children that are not markup are escaped, and attributes that are None are omitted.

    `class_` becomes `class`, and other underscores become hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>")


def join(parts: Sequence[Markup]) -> Markup:
    """Return elements concatenated."""
    return Markup("").join(parts)


def drawing(height: float, description: str, *children: Markup) -> Markup:
    """Return a chart of `WIDTH` by `height`; `description` is its text alternative."""
    return element(
        "svg",
        element("title", description),
        *children,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """Return a line of text with its baseline at `y`."""
    return element("text", content, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, tip: str = "", **more: float) -> Markup:
    """Return a rectangle with a tooltip."""
    return element("rect", *_tip(tip), x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_, **more)


def dot(x: float, y: float, class_: str, tip: str = "", radius: float = 4.0) -> Markup:
    """Return a circle with a tooltip."""
    return element("circle", *_tip(tip), cx=x, cy=y, r=radius, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str, tip: str = "") -> Markup:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", *_tip(tip), points=path, class_=class_)


def shortened(name: str, width: float) -> str:
    """Return a name truncated to `width`, with an ellipsis."""
    most = max(int(width / LETTER), 2)
    return name if len(name) <= most else f"{name[: most - 1]}…"


@dataclass(frozen=True)
class Scale:
    """A linear map from values to coordinates.

    Attributes:
        low: the value at `start`.
        high: the value at `end`, above `low`.
        start: the coordinate of `low`.
        end: the coordinate of `high`.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Return about `about` round values (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def bottom_axis(
    scale: Scale, top: float, bottom: float, wording: Callable[[float], str], title: str = "", about: int = 5
) -> Markup:
    """Return grid lines from `top` to `bottom` with their values below them."""
    parts = [line(scale.start, bottom, scale.end, bottom, "axis")]
    for tick in scale.ticks(about):
        x = scale(tick)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 16, wording(tick), "tick", "middle")]
    if title:
        parts.append(text((scale.start + scale.end) / 2, bottom + 33, title, "title", "middle"))
    return join(parts)


def left_axis(
    scale: Scale, left: float, right: float, wording: Callable[[float], str], title: str = "", about: int = 5
) -> Markup:
    """Return grid lines from `left` to `right` with their values on the left and the title above."""
    parts = []
    for tick in scale.ticks(about):
        y = scale(tick)
        parts += [line(left, y, right, y, "grid"), text(left - 6, y + 4, wording(tick), "tick", "end")]
    if title:
        parts.append(text(2, min(scale.start, scale.end) - 10, title, "title"))
    return join(parts)


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else f"{round(value, 2):g}"


def _tip(tip: str) -> tuple[Markup, ...]:
    return (element("title", tip),) if tip else ()
