"""The section on a segmentation's quality: intersection over union pooled, by site and by class."""

from collections.abc import Callable

from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.scores import number_interval, score_by_site, worst_first
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent


def segmentation_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a segmentation's quality."""
    tested = record.tested
    on_test = "" if tested is None else f"On the pooled test set the mean IoU is {record.words(tested)}."
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"The mean intersection over union (IoU) is {number_interval(pooled['miou'])} on "
        f"{counted(pooled['rows'], 'held-out image')} from {counted(record.num_evaluated, 'site')}; the mean Dice "
        f"coefficient is {number_interval(pooled['dice'])}."
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
        "Ranges in brackets are 95 % intervals; they assume independent images.",
        "IoU is the share of pixels in both areas, the true and the predicted one, among those in either; pixels of "
        "all held-out images are counted together.",
    ]
    known = [one for one in record.pooled["areas"] if one["iou"][0] is not None]
    if known:
        worst = min(known, key=lambda one: one["iou"][0])
        said.append(f"Worst class: {worst['name']}, with IoU {number_interval(worst['iou'])}.")
    sites = [(name, one) for name, one in worst_first(record, "miou") if one["miou"][0] is not None]
    if len(sites) > 1:
        name, one = sites[0]
        said.append(f"Worst site: {name}, {number_interval(one['miou'])} on {counted(one['rows'], 'image')}.")
    return said


def _by_class(record: RunRecord) -> list[Figure]:
    areas = record.pooled["areas"]
    table = Table(
        ["class", "images", "share of pixels", "IoU", "Dice"],
        [
            [
                one["name"],
                str(one["items"]),
                DASH if one["share"] is None else percent(one["share"]),
                number_interval(one["iou"]),
                number_interval(one["dice"]),
            ]
            for one in areas
        ],
    )
    lines = [
        charts.Interval(one["name"], one["iou"][0], one["iou"][1], one["iou"][2], one["items"])
        for one in areas
        if one["iou"][0] is not None
    ]
    caption = "Dots with 95 % intervals; the dashed line is the mean."
    drawn = charts.forest(lines, "IoU on held-out images", record.pooled["miou"][0], wording=lambda one: f"{one:.2f}")
    return [Figure("IoU by class", drawn, table, caption)]


def _by_site(record: RunRecord) -> list[Figure]:
    sites: list[tuple[str, Values]] = worst_first(record, "miou")
    if not sites:
        return []
    table = Table(
        ["site", "images", "mean IoU", "mean Dice", *record.classes],
        [
            [
                name,
                str(one["rows"]),
                number_interval(one["miou"]),
                number_interval(one["dice"]),
                *(number_interval(own["iou"]) for own in one["areas"]),
            ]
            for name, one in sites
        ],
        note="In the columns of classes: IoU.",
    )
    caption = "Dots with 95 % intervals; the dashed line is the pooled one."
    return [score_by_site(record, sites, "miou", "mean IoU", table, caption)]
