"""Texts from outside, made safe to show."""

import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fedhead.wording import MOST_CHARACTERS, one_line, signed, without_controls

REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def obeyed(character: str) -> bool:
    """Whether a terminal may obey a character, or a line change its order by it."""
    category = unicodedata.category(character)
    return category in {"Cc", "Cs", "Zl", "Zp"} or unicodedata.bidirectional(character) in REORDERING


def test_every_control_character_is_replaced() -> None:
    for code in range(sys.maxunicode + 1):
        if obeyed(chr(code)):
            shown = one_line(f"a{chr(code)}b")
            assert not any(map(obeyed, shown)), hex(code)
            assert (shown[0], shown[-1]) == ("a", "b")
            if chr(code) not in "\n\t":
                assert not any(map(obeyed, without_controls(chr(code)))), hex(code)


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=MOST_CHARACTERS))
def test_other_texts_stay(text: str) -> None:
    assert one_line(text) == without_controls(text) == text


@given(st.text(max_size=2000), st.integers(1, 600))
def test_a_line_is_as_short_as_asked(text: str, most: int) -> None:
    line = one_line(text, most)
    assert len(line) <= most
    assert "\n" not in line
    line.encode()


def test_bytes_of_a_file_name_become_no_controls() -> None:
    # In Latin-1 this byte is the one-character form of ESC [.
    assert one_line("a\udc9b2Jb") == without_controls("a\udc9b2Jb") == r"a\x9b2Jb"


@given(st.floats(-1e6, 1e6), st.integers(0, 4))
def test_signed_numbers_are_rounded_and_zero_has_no_sign(value: float, decimals: int) -> None:
    said = signed(value, decimals)
    assert float(said) == round(value, decimals)
    assert said[0] in "+-" if float(said) else set(said) <= set("0.")
