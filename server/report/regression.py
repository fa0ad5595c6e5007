"""The section on a regression's quality: pooled, by target and by site, and the coverage of prediction intervals."""

from collections.abc import Callable, Sequence
from typing import Any

from fedhead.server.report import charts
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.scores import (
    number_interval,
    on_test_set,
    score_by_site,
    score_forest,
    worst_first,
    worst_site,
)
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent


def regression_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a regression's quality."""
    on_test = on_test_set(record, "R2")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    rows, sites = counted(pooled["rows"], "held-out row"), counted(record.num_evaluated, "site")
    of = "" if len(pooled["targets"]) == 1 else f", the mean of {len(pooled['targets'])} targets,"
    answer = f"R2{of} is {number_interval(pooled['r2'])} on {rows} from {sites}."
    return Section(
        key=key,
        question=question,
        answer=answer,
        sentences=[one for one in (on_test, *_sentences(record), *interval_sentences(record)) if one],
        figures=[*_by_target(record), *_by_site(record), *_curves(record), *_intervals(record)],
    )


def _sentences(record: RunRecord) -> list[str]:
    said = [
        "Ranges in brackets are 95 % intervals; they assume independent rows.",
        "R2 is the explained share of a target's variance among these rows; 0 is no better than predicting their mean.",
    ]
    said += [
        f"{one['name']}: mean absolute error {number_interval(one['mae'], '.4g')}, root mean squared error "
        f"{number_interval(one['rmse'], '.4g')}, where the target's standard deviation is {one['deviation']:.4g}."
        for one in record.pooled["targets"][:5]
    ]
    return said + worst_site(
        record, "r2", lambda one: f"R2 {number_interval(one['r2'])} on {counted(one['rows'], 'row')}"
    )


def interval_sentences(record: RunRecord) -> list[str]:
    """Return sentences on the coverage of prediction intervals."""
    found = record.evaluation.get("calibration")
    if not found or not found.get("intervals"):
        return []
    name, lines = next(iter(found["intervals"].items()))
    line = next((one for one in lines if one["coverage"] == 0.9 and one["half_width"] is not None), None)
    if line is None:
        return ["Too few rows are held out for 90 % prediction intervals."]
    return [
        f"90 % prediction intervals for {name} extend {line['half_width']:.4g} to either side. Computed from "
        f"{counted(found['rows_chosen_on'], 'held-out row')}, they contain {percent(line['held'])} of the other "
        f"{found['rows_judged_on']:,}. The model's own intervals use all held-out rows."
    ]


def _by_target(record: RunRecord) -> list[Figure]:
    targets: Sequence[Values] = record.pooled["targets"]
    table = Table(
        ["target", "rows", "R2", "MAE", "RMSE", "bias", "deviation"],
        [
            [
                one["name"],
                str(one["rows"]),
                number_interval(one["r2"]),
                *(number_interval(one[key], ".4g") for key in ("mae", "rmse", "bias")),
                f"{one['deviation']:.4g}",
            ]
            for one in targets
        ],
        note="Errors are in the target's own units. Bias is the mean of prediction minus target.",
    )
    caption = "Dots with 95 % intervals."
    return [Figure("R2 by target", score_forest([(one["name"], one) for one in targets], "r2", "R2"), table, caption)]


def _by_site(record: RunRecord) -> list[Figure]:
    sites = worst_first(record, "r2")
    if not sites:
        return []
    several = len(record.pooled["targets"]) > 1
    table = Table(
        ["site", "rows", "R2", *([] if several else ["MAE", "RMSE"])],
        [
            [
                name,
                str(one["rows"]),
                number_interval(one["r2"]),
                *([] if several else [number_interval(one["targets"][0][key], ".4g") for key in ("mae", "rmse")]),
            ]
            for name, one in sites
        ],
    )
    caption = "Dots with 95 % intervals; the dashed line is R2 on all sites' rows pooled."
    return [score_by_site(record, sites, "r2", "R2", table, caption)]


def _curves(record: RunRecord) -> list[Figure]:
    curves = record.evaluation.get("curves", {})
    found = zip(record.pooled["targets"], curves.get("predictions", ()), curves.get("edges", ()), strict=False)
    figures = []
    for target, curve, _ in list(found)[:8]:
        points = [
            (predicted, observed, count)
            for count, predicted, observed in zip(curve["rows"], curve["predicted"], curve["observed"], strict=True)
            if count
        ]
        if not points:
            continue
        table = Table(
            ["predicted, mean", "rows", "observed, mean"],
            [[f"{predicted:.4g}", str(count), f"{observed:.4g}"] for predicted, observed, count in points],
        )
        caption = "Held-out rows in bins of the predicted value: on the diagonal, predictions are correct on average."
        figures.append(
            Figure(f"Observed against predicted {target['name']}", charts.calibration(points), table, caption)
        )
    return figures


def _intervals(record: RunRecord) -> list[Figure]:
    found: Any = (record.evaluation.get("calibration") or {}).get("intervals", {})
    lines = [(name, line) for name, own in found.items() for line in own if line["half_width"] is not None]
    if not lines:
        return []
    table = Table(
        ["target", "nominal", "actual", "half-width"],
        [[name, percent(line["coverage"]), percent(line["held"]), f"{line['half_width']:.4g}"] for name, line in lines],
        note="Computed from one half of the held-out rows and tested on the other.",
    )
    first = next(iter(found))
    bars = [(percent(line["coverage"]), (line["held"],)) for name, line in lines if name == first]
    chart = charts.bars(bars, ("",), percent)
    return [Figure(f"Coverage of prediction intervals for {first}", chart, table, "Each bar should reach its label.")]
