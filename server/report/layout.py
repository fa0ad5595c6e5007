"""What a report is made of: sections of sentences, figures and tables, which the page lays out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

DASH = "\N{EN DASH}"

MOST_ROWS = 250
"""A table shows so many rows; the run folder's files hold all."""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, the first column a name.

    Attributes:
        columns: their headings.
        rows: cells, as many as columns.
        note: a sentence below.
        words: the columns that hold words, which are set to the left; numbers are to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: Sequence[int] = (0,)

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The rows that are shown."""
        return self.rows[:MOST_ROWS]

    @property
    def remark(self) -> str:
        """The note, and how many rows are not shown."""
        hidden = len(self.rows) - len(self.shown)
        left_out = f"{hidden:,} more rows are in the run folder." if hidden > 0 else ""
        return f"{self.note} {left_out}".strip()


@dataclass(frozen=True)
class Figure:
    """A chart, and the numbers behind it.

    Attributes:
        title: what it shows.
        chart: SVG.
        table: the numbers.
        caption: a sentence on how to read it.
        wide: whether it takes the page's whole width.
    """

    title: str
    chart: Markup
    table: Table
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        key: its anchor.
        question: the heading.
        answer: the answer in a sentence, set large.
        sentences: what else is to be said.
        figures: charts.
        tables: tables that stand by themselves, by title.
        facts: names and values.
        code: texts to be shown as they are, by title.
    """

    key: str
    question: str
    answer: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Table]] = ()
    facts: Sequence[tuple[str, str]] = ()
    code: Sequence[tuple[str, str]] = field(default=())
