"""The section on a detector's quality: average precision pooled, by site and by class."""

from collections.abc import Callable

from fedhead.server.report import charts
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.scores import number_interval, score_by_site, worst_first
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted


def detection_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a detector's quality."""
    tested = record.tested
    on_test = "" if tested is None else f"On the pooled test set AP50 is {record.words(tested)}."
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"The mean average precision of the classes is {number_interval(pooled['ap50'])} at an overlap of 0.5 (AP50), "
        f"and {number_interval(pooled['ap'])} averaged over overlaps from 0.5 to 0.95 (AP), on "
        f"{counted(pooled['rows'], 'held-out image')} from {counted(record.num_evaluated, 'site')}."
    )
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in (on_test, *_sentences(record)) if one],
        figures=[*_by_class(record), *_by_site(record)],
    )


def _sentences(record: RunRecord) -> list[str]:
    said = [
        "Ranges in brackets are 95 % intervals, by the number of images with a class: boxes of one image are alike.",
        "A found box is correct if its overlap with a true box of its class, as intersection over union, reaches the "
        "threshold.",
    ]
    known = [one for one in record.pooled["boxes"] if one["ap50"][0] is not None]
    if known:
        worst = min(known, key=lambda one: one["ap50"][0])
        said.append(f"Worst class: {worst['name']}, with AP50 {number_interval(worst['ap50'])}.")
    sites = [(name, one) for name, one in worst_first(record, "ap50") if one["ap50"][0] is not None]
    if len(sites) > 1:
        name, one = sites[0]
        said.append(f"Worst site: {name}, {number_interval(one['ap50'])} on {counted(one['rows'], 'image')}.")
    return said


def _by_class(record: RunRecord) -> list[Figure]:
    boxes = record.pooled["boxes"]
    table = Table(
        ["class", "images", "boxes", "AP50", "AP"],
        [
            [
                one["name"],
                str(one["items"]),
                str(one["boxes"]),
                number_interval(one["ap50"]),
                number_interval(one["ap"]),
            ]
            for one in boxes
        ],
    )
    lines = [
        charts.Interval(one["name"], one["ap50"][0], one["ap50"][1], one["ap50"][2], one["items"])
        for one in boxes
        if one["ap50"][0] is not None
    ]
    if not lines:
        return []
    caption = "Dots with 95 % intervals; the dashed line is the mean."
    drawn = charts.forest(lines, "AP50 on held-out images", record.pooled["ap50"][0], wording=lambda one: f"{one:.2f}")
    return [Figure("AP50 by class", drawn, table, caption)]


def _by_site(record: RunRecord) -> list[Figure]:
    sites: list[tuple[str, Values]] = worst_first(record, "ap50")
    if not sites:
        return []
    table = Table(
        ["site", "images", "AP50", "AP", *(one["name"] for one in record.pooled["boxes"])],
        [
            [
                name,
                str(one["rows"]),
                number_interval(one["ap50"]),
                number_interval(one["ap"]),
                *(number_interval(own["ap50"]) for own in one["boxes"]),
            ]
            for name, one in sites
        ],
        note="In the columns of classes: AP50.",
    )
    caption = "Dots with 95 % intervals; the dashed line is the pooled one."
    return [score_by_site(record, sites, "ap50", "AP50", table, caption)]
