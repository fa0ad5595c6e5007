"""Types of the fields of received messages: each is validated by type, range and length before use."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from fedhead.config import LONGEST_SUBGROUP, MOST_SUBGROUPS
from fedhead.wording import one_line

MOST_CLASSES = 100_000
MOST_FEATURES = 2**20

MOST_ROWS = 2**48
"""Of rows or bytes that a message may claim."""


def _is_printable(text: str) -> str:
    if one_line(text, len(text)) != text:
        raise ValueError("it contains control characters")
    return text


def _are_distinct(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return names


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal; it may be used in a file name."""

Text = Annotated[str, Field(max_length=512), AfterValidator(_is_printable)]
"""A short text of one line, without control characters."""

BackboneSpec = Annotated[str, Field(max_length=65_536), AfterValidator(_is_printable)]
"""The spec of a backbone of one line; that of `identity` names every column."""

Sentence = Annotated[str, AfterValidator(one_line)]
"""A message for people, reduced to one line of a few hundred characters without control characters."""

Name = Annotated[str, Field(min_length=1, max_length=512)]
"""A class name; it may contain any characters."""

Names = Annotated[tuple[Name, ...], Field(max_length=MOST_CLASSES), AfterValidator(_are_distinct)]
"""Distinct names."""


def _are_plain(names: Sequence[str]) -> Sequence[str]:
    if any(one_line(name, LONGEST_SUBGROUP) != name for name in names):
        raise ValueError("a name is too long, or contains control characters")
    return names


SubgroupNames = Annotated[
    tuple[Name, ...],
    Field(min_length=1, max_length=MOST_SUBGROUPS),
    AfterValidator(_are_distinct),
    AfterValidator(_are_plain),
]
"""Distinct names of subgroups, of one line each."""

Width = Annotated[int, Field(ge=1, le=MOST_FEATURES, strict=True)]
"""A number of features."""

Count = Annotated[int, Field(ge=0, le=MOST_ROWS, strict=True)]
"""A number of rows or bytes."""

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]

FileSize = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
"""A number of bytes; the site limits it further."""

RoundNumber = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
"""A round; 0 for the initial head."""

Coefficient = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)]
"""A factor of a loss or of outputs; larger ones overflow in float32."""

Flag = Annotated[bool, Field(strict=True)]


def wrong_fields(error: ValidationError) -> str:
    """Return the names of the invalid fields, without their values, which may be anything."""
    return one_line(", ".join(sorted({".".join(map(str, detail["loc"])) for detail in error.errors()})))
