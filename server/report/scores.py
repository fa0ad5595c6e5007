"""Scores that are numbers rather than shares, such as R2 and concordance: in words, and by site."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Table
from fedhead.server.runs.record import RunRecord, Values

_MOST_SITES = 36


def number_interval(figure: Sequence[float | None] | None, digits: str = ".3f") -> str:
    """Return a number with its 95 % interval."""
    if not figure or figure[0] is None:
        return DASH
    value, low, high = figure
    if low is None or high is None:
        return f"{value:{digits}}"
    return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"


def on_test_set(record: RunRecord, score: str) -> str:
    """Return a sentence on the score on the pooled test set, named as in the middle of a sentence; "" without one."""
    return "" if record.tested is None else f"On the pooled test set {score} is {record.words(record.tested)}."


def worst_first(record: RunRecord, score: str) -> list[tuple[str, Values]]:
    """Return the sites' names and reports, those without the score last."""
    sign = -1 if record.task.lower_is_better else 1
    known = {name: one[score][0] for name, one in record.sites.items()}
    return sorted(
        record.sites.items(), key=lambda pair: (float("inf") if (at := known[pair[0]]) is None else sign * at, pair[0])
    )


def worst_site(
    record: RunRecord, score: str, said: Callable[[Values], str], counts: str = "rows", units: str = ""
) -> list[str]:
    """Return a sentence on the site with the least score; none if no site has it.

    Args:
        record: of the run.
        score: its name in a report.
        said: words the report of this site.
        counts: the name of the number in a report that makes the score certain.
        units: the counted things, for readers; by default its name.
    """
    known = {name: one for name, one in record.sites.items() if one[score][0] is not None}
    if not known:
        return []
    name, worst = min(known.items(), key=lambda pair: (pair[1][score][0], -pair[1]["rows"]))
    few = f" With so few {units or counts} this is uncertain." if worst[counts] < 30 else ""
    return [f"Worst site: {name}, {said(worst)}.{few}"]


def score_forest(
    reports: Sequence[tuple[str, Values]], score: str, words: str, reference: float | None = None, row: str = "row"
) -> Markup:
    """Draw a score with its interval for each report that has it.

    Args:
        reports: names and reports.
        score: its name in a report.
        words: its name for readers.
        reference: where a dashed line is.
        row: the name of a row for readers.
    """
    known = [(name, one[score], one["rows"]) for name, one in reports if one[score][0] is not None]
    lines = [charts.Interval(name, value, low, high, rows) for name, (value, low, high), rows in known]
    return charts.forest(lines, f"{words} on held-out {row}s", reference, wording=lambda value: f"{value:.2f}")


def score_by_site(
    record: RunRecord, sites: Sequence[tuple[str, Values]], score: str, words: str, table: Table, caption: str
) -> Figure:
    """Return the figure of the sites with the worst scores, beside the table of all.

    Args:
        record: of the run.
        sites: names and reports, the worst first.
        score: its name in a report.
        words: its name for readers, in the middle of a sentence.
        table: of all sites.
        caption: of the figure.
    """
    which = "highest" if record.task.lower_is_better else "lowest"
    title = f"{words[0].upper()}{words[1:]} by site"
    if len(sites) > _MOST_SITES:
        title = f"The {_MOST_SITES} sites of {len(sites):,} with the {which} {words}"
    return Figure(
        title,
        score_forest(sites[:_MOST_SITES], score, words, record.pooled[score][0], record.task.row_name),
        table,
        caption,
    )
