"""Drawn images of a simulated run, which are kept in its folder for its report; those of real sites stay there."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from fedhead.errors import FedheadError
from fedhead.files import write_atomically

EXAMPLES = "examples.json"
"""Their file in a run folder."""

MOST_EXAMPLES = 24

MOST_BYTES = 4_000_000
"""Bound on the text of all of them."""


def _picture(text: str) -> str:
    """Check that a text is a JPEG image in base64, so that it is safe in a page."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    if not content.startswith(b"\xff\xd8\xff"):
        raise ValueError("it is not a JPEG image")
    return text


Picture = Annotated[str, Field(max_length=MOST_BYTES), AfterValidator(_picture)]


class Example(BaseModel):
    """An image that was held out.

    Attributes:
        name: of the image.
        site: that has it.
        score: of the evaluated head on this image alone.
        truth: the image with its annotation drawn on it, as JPEG in base64.
        prediction: the same with the prediction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    site: str
    score: float
    truth: Picture
    prediction: Picture

    def __len__(self) -> int:
        return len(self.truth) + len(self.prediction)


_EXAMPLES = TypeAdapter(Annotated[tuple[Example, ...], Field(max_length=MOST_EXAMPLES)])


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write examples to a run folder, or remove earlier ones if there are none."""
    if not examples:
        (folder / EXAMPLES).unlink(missing_ok=True)
        return
    write_atomically(folder / EXAMPLES, json.dumps([one.model_dump() for one in examples]))


def read_examples(folder: Path) -> tuple[Example, ...]:
    """Return the examples of a run folder; none if there is no file.

    Raises:
        FedheadError: if the file is damaged.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return ()
    try:
        if path.stat().st_size > 2 * MOST_BYTES:
            raise ValueError("it is too large")
        return _EXAMPLES.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise FedheadError(f"{path} is damaged ({first}); delete it, and the report leaves the images out.") from None
