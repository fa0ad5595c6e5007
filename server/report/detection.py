"""The section on a detector's quality: average precision pooled, by site and by class."""

from collections.abc import Callable

from fedhead.server.report.examples import examples
from fedhead.server.report.images import ImageScore
from fedhead.server.report.layout import Section
from fedhead.server.report.scores import number_interval, on_test_set
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted

_AP50 = ImageScore("ap50", "AP50", classes="boxes", own="ap50", own_title="AP50")


def detection_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a detector's quality."""
    on_test = on_test_set(record, "AP50")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"The mean average precision of the classes is {number_interval(pooled['ap50'])} at an overlap of 0.5 (AP50), "
        f"and {number_interval(pooled['ap'])} averaged over overlaps from 0.5 to 0.95 (AP), on "
        f"{counted(pooled['rows'], 'held-out image')} from {counted(record.num_evaluated, 'site')}."
    )
    said = [
        on_test,
        "Ranges in brackets are 95 % intervals, by the number of images with a class: boxes of one image are alike.",
        "A found box is correct if its overlap with a true box of its class, as intersection over union, reaches the "
        "threshold.",
        *_AP50.worst(record),
    ]
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in said if one],
        figures=[
            *_AP50.by_class(record, ["boxes", "AP50", "AP"], _cells),
            *_AP50.by_site(record, "ap", "AP"),
            *examples(record),
        ],
    )


def _cells(one: Values) -> list[str]:
    return [str(one["boxes"]), number_interval(one["ap50"]), number_interval(one["ap"])]
