"""`vectors:FILE`: word vectors in the text format of GloVe or word2vec; a text is the mean of its words' vectors.

A word is looked up unchanged, then in lower case, then in its parts between hyphens and apostrophes. Unknown words are
skipped, and a text without any known word has features of zeros.
"""

import gzip
import hashlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedhead.backbones.backbone import Backbone, backbone_sources, read_files
from fedhead.backbones.preprocessing import TextPreprocessing
from fedhead.backbones.state_dict import read_weights
from fedhead.data.specs import to_path
from fedhead.errors import UserError

WORDS = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]|_")
PARTS = re.compile(r"['\u2019-]")


@backbone_sources.register("vectors")
def load(name: str, weights: str, layer: str, seed: int) -> Backbone:
    """Build the averaging backbone of a file of word vectors, plain or gzipped.

    Args:
        name: the file.
        weights: `default` for the file itself, or the file of a saved backbone, which includes its words.
        layer: only `penultimate`.
        seed: not used.

    Raises:
        UserError: if the file is missing, in another encoding, or has a line that is not a word with numbers.
    """
    if layer != "penultimate":
        raise UserError(f"vectors:{name} has only the layer 'penultimate', not {layer!r}.")
    if weights == "random":
        raise UserError("Random word vectors are useless; use --weights default.")
    if weights == "default":
        path = to_path(name).resolve()
        words, table = read_vectors(path)
        name = str(path)
    else:
        words, table = _read_saved(weights)
    text = "\n".join(words)
    return Backbone(
        f"vectors:{name}",
        _Vectors(table),
        TextPreprocessing(encoding(words), hashlib.sha256(text.encode()).hexdigest()),
        files={"words.txt": text},
    )


class _Vectors(nn.Module):
    """A map from word numbers `[n, length]` to vectors `[n, length, d]`, which the backbone averages."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding(table.shape[0], table.shape[1], _weight=table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.table(input_ids)
        return vectors


def encoding(words: Sequence[str]) -> Callable[[str], Sequence[int]]:
    """Return a function from a text to its words' numbers."""
    numbers = {word: number for number, word in enumerate(words)}

    def encode(text: str) -> Sequence[int]:
        return [number for word in WORDS.findall(text) for number in _look_up(word, numbers)]

    return encode


def _look_up(word: str, numbers: Mapping[str, int]) -> list[int]:
    for form in (word, word.lower()):
        if form in numbers:
            return [numbers[form]]
    parts = PARTS.split(word)
    return [number for part in parts for number in _look_up(part, numbers)] if len(parts) > 1 else []


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Read word vectors: a word and its numbers per line, optionally after a line with the table's size.

    Args:
        path: a text in UTF-8; gzipped if its name ends in `.gz`.

    Returns:
        The words, each once (the first one counts), and their vectors `[words, d]` float32.

    Raises:
        UserError: naming the first invalid line.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}. Expected word vectors, as in vectors:glove.6B.100d.txt.")
    words: dict[str, int] = {}
    rows: list[npt.NDArray[np.float32]] = []
    width = 0
    # An invalid number would also cause a warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for number, line in _lines(path):
            if number == 1 and re.fullmatch(r"\d+ \d+", line):
                width = int(line.split()[1])
                continue
            width = width or line.count(" ")
            # Some words of GloVe contain spaces.
            word, *values = line.rsplit(" ", width)
            row = _numbers(" ".join(values))
            if width == 0 or len(values) != width or row is None or len(row) != width or not word:
                raise UserError(
                    f"Line {number} of {path} is not a word with {width or 'its'} numbers, separated by single spaces: "
                    f"{line[:60]!r}."
                )
            if word not in words:
                words[word] = len(rows)
                rows.append(row)
    if not rows:
        raise UserError(f"{path} contains no word vectors.")
    return list(words), torch.from_numpy(np.stack(rows))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line's number and text."""
    number = 0
    try:
        with path.open("rb") as plain:
            file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8").rstrip(" \r\n")
    except UnicodeDecodeError:
        raise UserError(
            f"Line {number} of {path} is not in UTF-8. Expected the text format of GloVe or word2vec; gensim's "
            "save_word2vec_format(..., binary=False) converts word2vec's binary files."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}.") from None


def _numbers(text: str) -> npt.NDArray[np.float32] | None:
    try:
        row = np.fromstring(text, dtype=np.float32, sep=" ")
    except ValueError:
        return None
    return row if np.isfinite(row).all() else None


def _read_saved(path: str) -> tuple[list[str], Tensor]:
    text = read_files(path).get("words.txt")
    if text is None:
        raise UserError(
            f"{path} is not a saved backbone of word vectors; name the vectors themselves, as vectors:FILE."
        )
    words, tensors = text.split("\n"), read_weights(path)
    table = tensors.get("table.weight")
    if table is None or table.ndim != 2 or len(table) != len(words):
        raise UserError(f"{path} is damaged: it does not have one vector for each of its {len(words)} words.")
    return words, table
