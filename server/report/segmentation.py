"""The section on a segmentation's quality: intersection over union pooled, by site and by class."""

from collections.abc import Callable

from fedhead.server.report.examples import examples
from fedhead.server.report.images import ImageScore
from fedhead.server.report.layout import DASH, Section
from fedhead.server.report.scores import number_interval, on_test_set
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent

_IOU = ImageScore("miou", "mean IoU", classes="areas", own="iou", own_title="IoU")


def segmentation_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a segmentation's quality."""
    on_test = on_test_set(record, "the mean IoU")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"The mean intersection over union (IoU) is {number_interval(pooled['miou'])} on "
        f"{counted(pooled['rows'], 'held-out image')} from {counted(record.num_evaluated, 'site')}; the mean Dice "
        f"coefficient is {number_interval(pooled['dice'])}."
    )
    said = [
        on_test,
        "Ranges in brackets are 95 % intervals; they assume independent images.",
        "IoU is the share of pixels in both areas, the true and the predicted one, among those in either; pixels of "
        "all held-out images are counted together.",
        *_IOU.worst(record),
    ]
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in said if one],
        figures=[
            *_IOU.by_class(record, ["share of pixels", "IoU", "Dice"], _cells),
            *_IOU.by_site(record, "dice", "mean Dice"),
            *examples(record),
        ],
    )


def _cells(one: Values) -> list[str]:
    share = DASH if one["share"] is None else percent(one["share"])
    return [share, number_interval(one["iou"]), number_interval(one["dice"])]
