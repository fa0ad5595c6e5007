"""Types, bounds and texts of settings."""

import re
from typing import Annotated

from pydantic import Field

from fedhead.errors import UserError
from fedhead.tuning import parse_tune

MOST_LIFTED = 4096
"""Largest width of a lift: the sums of wider features would be projected."""

DENSE_LAYERS = {"detection": "places", "segmentation": "maps"}
"""Tasks about places of items, such as pixels, with the layers that each takes by default."""

SUBGROUPED = ("classification", "ordinal")
"""The tasks whose heads are evaluated by subgroup."""

MOST_SUBGROUPS = 100
"""Largest number of subgroups; a column with more values does not divide people or devices into groups."""

LONGEST_SUBGROUP = 200
"""Longest name of a subgroup."""

GENERATION = "generation"
"""The task of language models."""

GENERATION_COLUMNS = ("loss", "tokens", "cut")
"""What a language model gives for a conversation; see `fedhead.backbones.hf_causal`."""

Scalar = bool | int | float | str
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST_DECAY = 1000.0
"""Largest factor between the learning rates of two blocks."""
MOST_EPSILON = 100.0
"""Bar on epsilon: beyond it the bound, a factor of exp(epsilon), says nothing."""
Epsilon = Annotated[float, Field(ge=0, le=MOST_EPSILON, allow_inf_nan=False)]


def lifted_width(text: str) -> int | None:
    """Return the width of `landmarks:WIDTH` or `relu:WIDTH`; None for other texts and widths above `MOST_LIFTED`."""
    found = re.fullmatch("(?:landmarks|relu):([1-9][0-9]{0,5})", text)
    return int(found[1]) if found is not None and int(found[1]) <= MOST_LIFTED else None


def require_tunable(layers: str) -> str:
    """Check the layers to tune, and return them; empty for none.

    Raises:
        ValueError: if it is malformed.
    """
    if layers:
        try:
            parse_tune(layers)
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from None
    return layers
