"""Parts of a report: sections of sentences, figures and tables, laid out by the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

DASH = "\N{EN DASH}"

MOST_ROWS = 250
"""Largest number of rows that a table shows; the run folder's files hold all rows."""


@dataclass(frozen=True)
class Table:
    """Cells of text, with names in the first column.

    Attributes:
        columns: the headings.
        rows: the cells, one per column.
        note: a sentence below the table.
        words: the text columns, left-aligned; numbers are right-aligned.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: Sequence[int] = (0,)

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The visible rows."""
        return self.rows[:MOST_ROWS]

    @property
    def remark(self) -> str:
        """The note, and the number of hidden rows."""
        hidden = len(self.rows) - len(self.shown)
        left_out = f"{hidden:,} more rows are in the run folder." if hidden > 0 else ""
        return f"{self.note} {left_out}".strip()


@dataclass(frozen=True)
class Figure:
    """A chart and its numbers.

    Attributes:
        title: the title.
        chart: SVG.
        table: the numbers.
        caption: a sentence on how to read the chart.
        wide: whether it spans the page's whole width.
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
        key: the anchor.
        question: the heading.
        answer: the answer in a sentence, in large type.
        sentences: further remarks.
        figures: charts.
        tables: standalone tables, by title.
        facts: names and values.
        code: verbatim texts, by title.
    """

    key: str
    question: str
    answer: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Table]] = ()
    facts: Sequence[tuple[str, str]] = ()
    code: Sequence[tuple[str, str]] = field(default=())
