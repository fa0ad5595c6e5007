"""The section on a survival model's quality: concordance, Kaplan-Meier curves by site and pooled, and calibration."""

from collections.abc import Callable
from typing import Any

from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.scores import number_interval, on_test_set, score_by_site, worst_first, worst_site
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted


def survival_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a survival model's quality."""
    on_test = on_test_set(record, "concordance")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"Concordance is {number_interval(pooled['concordance'])} on {counted(pooled['rows'], 'held-out row')} with "
        f"{counted(pooled['events'], 'event')} from {counted(record.num_evaluated, 'site')}."
    )
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in (on_test, *_sentences(record)) if one],
        figures=[_curve(record), *_by_site(record), *_calibration(record)],
    )


def _sentences(record: RunRecord) -> list[str]:
    said = [
        "Ranges in brackets are 95 % intervals; they assume independent rows.",
        "Concordance is the share of comparable pairs of rows in which the row with the earlier event has the higher "
        "predicted risk; one half is chance. Times and risks are compared in bins.",
    ]
    said += calibration_sentences(record)
    return said + worst_site(
        record,
        "concordance",
        lambda one: f"{number_interval(one['concordance'])} with {counted(one['events'], 'event')}",
        "events",
    )


def calibration_sentences(record: RunRecord) -> list[str]:
    """Return a sentence that compares expected with observed events."""
    ratio = record.pooled.get("expected_to_observed")
    if ratio is None:
        return []
    return [f"The model expects {ratio:.2f} times as many events as were observed among the held-out rows."]


def _curve(record: RunRecord) -> Figure:
    pooled = record.pooled
    table = Table(
        ["until", "Kaplan-Meier", "predicted", *record.sites],
        [
            [
                f"{edge:g}",
                number_interval(pooled["survival"][place]),
                _number(pooled["predicted_survival"][place]),
                *(_number((one["survival"][place] or [None])[0]) for one in record.sites.values()),
            ]
            for place, edge in enumerate(pooled["edges"])
        ],
        note="A curve ends where fewer than 5 held-out rows are at risk.",
    )
    lines = [("all sites", pooled), *list(record.sites.items())[: charts.COLOURS - 1]]
    curves = [(name, _points(one)) for name, one in lines]
    caption = (
        "Kaplan-Meier estimates by time bin on held-out rows: the share without an event until each time. A row last "
        "seen within a bin counts as at risk for half of it. The predicted survival is somewhat low where many rows "
        "are lost to follow-up, since the model learns from the bins through which a row was followed."
    )
    return Figure("Survival by site and pooled", charts.steps(curves, pooled["edges"][-1]), table, caption)


def _points(report: Values) -> list[tuple[float, float]]:
    found = zip(report["edges"], report["survival"], strict=True)
    return [(0.0, 1.0), *((edge, point[0]) for edge, point in found if point is not None)]


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _by_site(record: RunRecord) -> list[Figure]:
    sites = worst_first(record, "concordance")
    if not sites:
        return []
    table = Table(
        ["site", "rows", "events", "concordance", "expected / observed"],
        [
            [
                name,
                str(one["rows"]),
                str(one["events"]),
                number_interval(one["concordance"]),
                _number(one["expected_to_observed"]),
            ]
            for name, one in sites
        ],
    )
    caption = "Dots with 95 % intervals; the dashed line is the pooled one."
    return [score_by_site(record, sites, "concordance", "concordance", table, caption)]


def _calibration(record: RunRecord) -> list[Figure]:
    bins: Any = record.evaluation.get("curves", {}).get("time_bins", [])
    if not bins:
        return []
    table = Table(
        ["until", "rows at risk", "expected events", "observed events"],
        [[f"{one['until']:g}", str(one["rows"]), f"{one['expected']:.1f}", str(one["observed"])] for one in bins],
        note="Held-out rows in each time bin, until one with fewer than 5 rows at risk.",
    )
    points = [(one["expected"], float(one["observed"]), one["rows"]) for one in bins]
    caption = "A dot for each time bin. On the diagonal, as many events are observed as expected."
    return [Figure("Observed against expected events", charts.calibration(points), table, caption)]
