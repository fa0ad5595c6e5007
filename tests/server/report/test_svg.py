from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from fedhead.server.report.svg import Scale, drawing, element, rectangle, shortened, text


def test_text_and_attributes_are_escaped() -> None:
    hostile = "<script>alert(\"1\")</script> & 'x'"
    drawn = drawing(10, hostile, text(1, 2, hostile), rectangle(0, 0, 1, 1, hostile, hostile))
    assert "<script" not in drawn
    root = ElementTree.fromstring(drawn)
    name = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{name}title") == hostile
    assert root.findtext(f"{name}text") == hostile
    assert root.find(f"{name}rect").get("class") == hostile  # type: ignore[union-attr]


def test_markup_is_nested_without_escaping() -> None:
    assert element("g", element("a", "x<y"), class_="k", stroke_width=1.0) == Markup(
        '<g class="k" stroke-width="1"><a>x&lt;y</a></g>'
    )


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_inside(low: float, span: float, about: int) -> None:
    scale = Scale(low, low + span, 0, 100)
    ticks = scale.ticks(about)
    assert 1 <= len(ticks) <= max(about, 3) + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    steps = {round((b - a) / span, 6) for a, b in pairwise(ticks)}
    assert len(steps) <= 1


def test_scales_stay_within_their_ends() -> None:
    scale = Scale(0, 10, 100, 0)
    assert [scale(value) for value in (-5, 0, 5, 10, 99)] == [100, 100, 50, 0, 0]


@pytest.mark.parametrize("name", ["a", "x" * 200, "ß" * 40])
def test_names_are_truncated_to_their_width(name: str) -> None:
    assert len(shortened(name, 100)) <= 16
    assert shortened(name, 6.4 * len(name) + 10) == name
