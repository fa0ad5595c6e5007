"""The section on a tagger's quality: entities pooled, by type and by site."""

from collections.abc import Callable

from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.scores import number_interval, on_test_set, score_by_site, worst_first, worst_site
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted


def tagging_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a tagger's quality."""
    on_test = on_test_set(record, "F1")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"F1 of entities is {number_interval(pooled['f1'])} on {counted(pooled['entities'], 'entity', 'entities')} in "
        f"{counted(pooled['rows'], 'held-out word')} from {counted(record.num_evaluated, 'site')}."
    )
    said = [
        on_test,
        "Ranges in brackets are 95 % intervals; they assume independent entities.",
        "An entity is found if its type and both of its ends are right. "
        f"Precision is {number_interval(pooled['precision'])}, recall {number_interval(pooled['recall'])}.",
        *_worst(record),
    ]
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in said if one],
        figures=_by_site(record),
        tables=[("Entities by type", _by_type(record))],
    )


def _worst(record: RunRecord) -> list[str]:
    def said(one: Values) -> str:
        return f"{number_interval(one['f1'])} on {counted(one['entities'], 'entity', 'entities')}"

    return worst_site(record, "f1", said, "entities")


def _by_type(record: RunRecord) -> Table:
    return Table(["type", *_COLUMNS], [[one["name"], *_cells(one)] for one in record.pooled["types"]])


def _by_site(record: RunRecord) -> list[Figure]:
    sites = worst_first(record, "f1")
    if not sites:
        return []
    table = Table(["site", *_COLUMNS], [[name, *_cells(one)] for name, one in sites])
    caption = "Dots with 95 % intervals; the dashed line is the pooled F1."
    return [score_by_site(record, sites, "f1", "F1 of entities", table, caption)]


_COLUMNS = ("entities", "precision", "recall", "F1")


def _cells(one: Values) -> list[str]:
    return [str(one["entities"]), *(number_interval(one[name]) for name in ("precision", "recall", "f1"))]
