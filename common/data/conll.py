"""`conll:FILE`: sentences with a tag for each word, one word to a line; rows are words.

`conll:train.txt?token=0&tag=3&group=1&site=2` names columns by their position from 0. Blank lines and lines that start
with `-DOCSTART-` end a sentence.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedhead.data.items import Word
from fedhead.data.labels import index_names
from fedhead.data.samples import Samples, sources
from fedhead.data.specs import split_options, to_path
from fedhead.errors import UserError
from fedhead.wording import printable

OUTSIDE = "O"
"""The tag of words outside of entities."""

MOST_WORDS = 5_000
"""Most words of a sentence."""

LONGEST_LINE = 10_000
MOST_TYPES = 200
_START = "-DOCSTART-"
_OPTIONS = ("group", "site", "tag", "token")


@dataclass(frozen=True)
class _Line:
    """A word's line: its number, and its fields of interest."""

    number: int
    word: str
    tag: str
    group: str | None
    site: str | None


@sources.register("conll")
def load(argument: str) -> Samples:
    """Load a file of tagged sentences.

    Args:
        argument: `FILE?token=0&tag=3&site=&group=`: positions of columns; negative ones count from the end. By default
            the first column has the words and the last one the tags.

    Raises:
        UserError: with the line number, if a line has too few columns, an invalid tag or an excessive length; or if the
            file is missing, is not in UTF-8 or has no words.
    """
    name, options = split_options(argument, _OPTIONS, f"conll:{argument}")
    path = to_path(name)
    if not path.is_file():
        raise UserError(f"There is no file {path}. Expected a word and its tag on each line, as in conll:train.txt.")
    columns = {option: _position(option, options[option]) for option in _OPTIONS if option in options}
    columns = {"token": 0, "tag": -1, **columns}
    digest = hashlib.sha256(f"conll-1 {sorted(columns.items())} ".encode())
    words: list[Word] = []
    tags: list[str] = []
    numbers: list[int] = []
    places: list[tuple[int, int]] = []
    groups: list[str | None] = []
    sites: list[str] = []
    for sequence, sentence in enumerate(_sentences(path, columns, digest)):
        texts = tuple(line.word for line in sentence)
        first = sentence[0]
        group = first.group or _identity(texts)
        for place, (line, tag) in enumerate(zip(sentence, _bio(sentence, path), strict=True)):
            words.append(Word(texts, place))
            tags.append(tag)
            numbers.append(line.number)
            places.append((sequence, place))
            groups.append(group)
            sites.append(first.site or "")
    if not words:
        raise UserError(f"{path} has no words; expected a word and its tag on each line.")
    classes, labels = index_names(tags)
    if len(classes) > 2 * MOST_TYPES + 1:
        raise UserError(f"{path} has {len(classes)} different tags, more than {2 * MOST_TYPES + 1}: is ?tag= right?")
    return Samples(
        spec=f"conll:{argument}",
        classes=classes,
        labels=labels,
        read=words.__getitem__,
        name=lambda row: f"{path}, line {numbers[row]}",
        fingerprint=digest.hexdigest(),
        groups=groups,
        sites=sites if "site" in columns else None,
        kind="text",
        sequences=np.array(places, dtype=np.int64),
    )


def _position(option: str, text: str) -> int:
    try:
        position = int(text)
    except ValueError:
        position = 1000
    if not -1000 < position < 1000:
        raise UserError(f"The option {option} is the position of a column, counted from 0, not {text!r}.")
    return position


def _identity(words: Sequence[str]) -> str:
    """Return the group of a sentence without one, which equal sentences share."""
    return "sentence " + hashlib.blake2b(" ".join(words).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _sentences(path: Path, columns: dict[str, int], digest: "hashlib._Hash") -> Iterator[list[_Line]]:
    """Yield the lines of each sentence, reading the file once."""
    sentence: list[_Line] = []
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            digest.update(raw)
            if len(raw) > LONGEST_LINE:
                raise UserError(f"Line {number} of {path} has more than {LONGEST_LINE:,} bytes: is this a CoNLL file?")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"Line {number} of {path} is not in UTF-8; save the file as UTF-8.") from None
            if not text.strip() or text.startswith(_START):
                if sentence:
                    yield sentence
                sentence = []
                continue
            sentence.append(_line(text, number, columns, path))
            if len(sentence) > MOST_WORDS:
                raise UserError(
                    f"The sentence that ends at line {number} of {path} has more than {MOST_WORDS:,} words: separate "
                    "sentences by blank lines."
                )
    if sentence:
        yield sentence


def _line(text: str, number: int, columns: dict[str, int], path: Path) -> _Line:
    fields = text.split("\t") if "\t" in text else text.split()

    def field(option: str) -> str:
        position = columns[option]
        if not -len(fields) <= position < len(fields):
            raise UserError(
                f"Line {number} of {path} has {len(fields)} columns, and none at position {position} for the {option}: "
                f"{printable(text[:60])!r}."
            )
        return printable(fields[position].strip())

    if len(fields) < 2:
        raise UserError(f"Line {number} of {path} has a word without a tag: {printable(text[:60])!r}.")
    word = "_".join(field("token").split())
    if not word:
        raise UserError(f"Line {number} of {path} has no word.")
    group, site = (field(option) or None if option in columns else None for option in ("group", "site"))
    return _Line(number, word, field("tag"), group, site)


def _bio(sentence: Sequence[_Line], path: Path) -> Iterator[str]:
    """Yield the tags of a sentence in the form BIO, in which every entity starts with `B-`.

    Accepted are BIO, IOB1 (`B-` only between two entities of one type) and BIOES or BILOU.

    Raises:
        UserError: naming the line of an invalid tag.
    """
    before = OUTSIDE
    for line in sentence:
        if line.tag == OUTSIDE:
            before = OUTSIDE
            yield OUTSIDE
            continue
        prefix, dash, kind = line.tag.partition("-")
        if not dash or not kind or prefix not in tuple("BIESLU"):
            raise UserError(
                f"Line {line.number} of {path} has the tag {line.tag[:40]!r}; expected O, or B-TYPE or I-TYPE."
            )
        starts = prefix in "BSU" or before != kind
        # A single-word entity of BIOES or BILOU, or the end of one, ends before the next word.
        before = OUTSIDE if prefix in "ESLU" else kind
        yield f"{'B' if starts else 'I'}-{kind}"
