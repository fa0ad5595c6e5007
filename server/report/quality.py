"""The section on the model's quality: pooled, by site and by class, each with its interval."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedhead.server.report import charts
from fedhead.server.report.detection import detection_quality
from fedhead.server.report.generation import generation_quality
from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.privacy import noisy_accuracy
from fedhead.server.report.regression import interval_sentences, regression_quality
from fedhead.server.report.scores import number_interval, worst_site
from fedhead.server.report.segmentation import segmentation_quality
from fedhead.server.report.survival import calibration_sentences, survival_quality
from fedhead.server.report.tagging import tagging_quality
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, listed, percent

MOST_LINES = 36
"""Largest number of lines in a chart with a line per site or class; beyond it the chart shows the worst."""

MOST_CELLS = 24
"""Largest number of classes in a confusion matrix; beyond it the matrix shows the most confused classes."""

QUESTION = "How good is the model?"
_KEY = "quality"
_MOST_CURVES = 60
_MOST_CORNERS = 60


def quality(record: RunRecord) -> Section:
    """Return the section."""
    if record.real:
        return regression_quality(record, _KEY, QUESTION, _unknown)
    if (section := _SECTIONS.get(record.task.name)) is not None:
        return section(record, _KEY, QUESTION, _unknown)
    tested = record.tested
    on_test = f"On the pooled test set it is {percent(tested)}." if tested else ""
    if record.noisy:
        return Section(_KEY, QUESTION, noisy_accuracy(record.noisy), [on_test] if on_test else [])
    if not record.pooled:
        return Section(_KEY, QUESTION, on_test or _unknown(record))
    pooled = record.pooled
    score = "Accuracy" if record.one_class else "The share of rows with all labels correct"
    answer = (
        f"{score} is {interval(pooled['accuracy'])} on {counted(pooled['rows'], 'held-out row')} from "
        f"{counted(record.num_evaluated, 'site')}."
    )
    return Section(
        key=_KEY,
        question=QUESTION,
        answer=answer,
        sentences=[sentence for sentence in (on_test, *_sentences(record)) if sentence],
        figures=[
            *_by_site(record),
            *_by_class(record),
            *_confusion(record),
            *_roc(record),
            *_reliability(record),
        ],
    )


_SECTIONS: Mapping[str, Callable[[RunRecord, str, str, Callable[[RunRecord], str]], Section]] = {
    "detection": detection_quality,
    "generation": generation_quality,
    "segmentation": segmentation_quality,
    "survival": survival_quality,
    "tagging": tagging_quality,
}
"""The sections of tasks that have their own."""


def interval(figure: Sequence[float | None] | None) -> str:
    """Return a share with its 95 % interval."""
    if not figure or figure[0] is None:
        return DASH
    value, low, high = figure
    if low is None or high is None:
        return percent(value)
    return f"{100 * (value or 0):.1f} % ({100 * low:.1f}{DASH}{100 * high:.1f})"


def _scored(record: RunRecord, score: float) -> str:
    return f"an R2 of {record.words(score)}" if record.real else record.words(score)


def _unknown(record: RunRecord) -> str:
    if record.status == "running":
        right = "" if record.real else " correct"
        latest = "" if record.score is None else f" So far the latest head has {_scored(record, record.score)}{right}."
        return f"The run has not finished; sites evaluate in detail at its end.{latest}"
    if record.status != "finished":
        return "The run did not finish, so no head was evaluated in detail."
    if record.private:
        return "Unknown: the run spent no privacy budget on an evaluation (evaluate = 0), and there is no test set."
    if not record.config.get("holdout"):
        return "Unknown: no rows are held out (holdout = 0), and there is no test set."
    return "Unknown: no site had held-out rows."


def _sentences(record: RunRecord) -> list[str]:
    pooled = record.pooled
    said = ["Ranges in brackets are 95 % intervals; they assume independent rows."]
    means = [f"The mean area under the ROC curve over the classes is {interval(pooled['auroc'])}"]
    if record.one_class:
        means.append(f"the balanced accuracy {interval(pooled['balanced_accuracy'])}")
    said.append(", ".join(means) + ".")
    if "quadratic_kappa" in pooled:
        said.append(
            f"Predicted levels are {number_interval(pooled['mae'])} levels from the true ones on average. Cohen's "
            f"kappa with quadratic weights is {number_interval(pooled['quadratic_kappa'])}."
        )
    said += worst_site(record, "accuracy", lambda one: f"{interval(one['accuracy'])} of {counted(one['rows'], 'row')}")
    present = [one for one in pooled["classes"] if one["sensitivity"][0] is not None]
    if present:
        least = min(present, key=lambda one: (one["sensitivity"][0], -one["rows"]))
        said.append(
            f"Worst class: {least['name']}, with sensitivity {interval(least['sensitivity'])} on {least['rows']} rows."
        )
    unlearned = [one["name"] for one in record.evaluation.get("coverage", ()) if not one["rows"]]
    if unlearned:
        said.append(f"Unlearned classes, without rows at any site: {listed(unlearned, 10)}.")
    return [*said, *calibration(record)]


def calibration(record: RunRecord) -> list[str]:
    """Return sentences on the calibration of probabilities, or on the coverage of intervals."""
    if record.task.name == "survival":
        return calibration_sentences(record)
    if record.real:
        return interval_sentences(record)
    if record.task.name == "generation":
        return ["Not measured: a language model's perplexity already depends on the probabilities that it gives."]
    if record.task.dense:
        return ["Not measured: places of one image are alike, so their probabilities are not calibrated by counts."]
    if record.private:
        kept = (
            " Noisy counts of right predictions by confidence are in evaluation.json."
            if record.evaluation.get("privacy", {}).get("evaluation")
            else ""
        )
        return [f"Not measured on more rows: the privacy budget buys no such measurement.{kept}"]
    found = record.evaluation.get("calibration")
    if found and found["rows_judged_on"]:
        before, after = found["before"]["reliability"]["error"], found["after"]["reliability"]["error"]
        return [
            f"The model divides its logits by a temperature of {found['temperature']:.2g}, chosen on "
            f"{counted(found['rows_chosen_on'], 'held-out row')}. On the other {found['rows_judged_on']:,} this "
            f"changes the expected calibration error (of probabilities in 20 bins) from {percent(before)} to "
            f"{percent(after)}."
        ]
    error = _curves(record).get("reliability", {}).get("error")
    return [] if error is None else [f"Expected calibration error: {percent(error)} (probabilities in 20 bins)."]


def _by_site(record: RunRecord) -> list[Figure]:
    sites = sorted(record.sites.items(), key=lambda pair: (pair[1]["accuracy"][0], pair[0]))
    if not sites:
        return []
    table = Table(
        ["site", "rows", "accuracy", "balanced accuracy", "AUROC"],
        [
            [
                name,
                str(one["rows"]),
                interval(one["accuracy"]),
                interval(one["balanced_accuracy"]),
                interval(one["auroc"]),
            ]
            for name, one in sites
        ],
    )
    title = "Accuracy by site"
    worst = [_line(name, one, "accuracy") for name, one in sites[:MOST_LINES]]
    pooled = record.pooled["accuracy"][0]
    caption = "Dots with 95 % intervals; the dashed line is the accuracy on all sites' rows pooled."
    if len(sites) <= MOST_LINES:
        return [Figure(title, charts.forest(worst, "of the site's held-out rows correct", pooled), table, caption)]
    values = [one["accuracy"][0] for _, one in sites]
    spread = charts.distribution(values, "of a site's held-out rows correct")
    return [
        Figure(
            f"Accuracy of {len(sites):,} sites",
            spread,
            table,
            "Each site counts once, regardless of its number of rows.",
        ),
        Figure(
            f"The {MOST_LINES} sites with the lowest accuracy",
            charts.forest(worst, "of the site's held-out rows correct", pooled),
            Table(table.columns, table.rows[:MOST_LINES]),
            caption,
        ),
    ]


def _line(name: str, report: Values, figure: str) -> charts.Interval:
    value, low, high = report[figure]
    return charts.Interval(name, value, low, high, report["rows"])


def _by_class(record: RunRecord) -> list[Figure]:
    classes: Sequence[Values] = record.pooled["classes"]
    table = Table(
        ["class", "rows", "sensitivity", "specificity", "AUROC"],
        [
            [one["name"], str(one["rows"]), *(interval(one[key]) for key in ("sensitivity", "specificity", "auroc"))]
            for one in classes
        ],
    )
    present = [one for one in classes if one["sensitivity"][0] is not None]
    if not present:
        return []
    title, shown = "Sensitivity by class", present
    if len(present) > MOST_LINES:
        title = f"The {MOST_LINES} classes of {len(classes):,} with the lowest sensitivity"
        shown = sorted(present, key=lambda one: one["sensitivity"][0])[:MOST_LINES]
    lines = [_line(one["name"], one, "sensitivity") for one in shown]
    caption = "Sensitivity (recall): the share of a class's rows that are predicted as it, with its 95 % interval."
    return [Figure(title, charts.forest(lines, "of the class's rows predicted correctly"), table, caption)]


def _curves(record: RunRecord) -> Values:
    curves: Values = record.evaluation.get("curves", {})
    return curves


def _confusion(record: RunRecord) -> list[Figure]:
    counts: Sequence[Any] = _curves(record).get("confusion", ())
    names = record.classes
    if not counts or len(counts) != len(names):
        return []
    if not record.one_class:
        return [_labels(counts, names)]
    pairs = _confused(counts, names)
    if len(names) <= MOST_CELLS:
        table = Table(["true class", *names], [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)])
        return [Figure("Confusion matrix", charts.confusion(counts, names), table, _SHADES)]
    wrong = [sum(row) - row[number] for number, row in enumerate(counts)]
    taken = [sum(row[number] for row in counts) - counts[number][number] for number in range(len(names))]
    order = sorted(range(len(names)), key=lambda number: (-wrong[number] - taken[number], number))
    chosen = sorted(order[:MOST_CELLS])
    part = [[counts[row][column] for column in chosen] for row in chosen]
    title = f"Confusion of the {MOST_CELLS} most confused classes of {len(names):,}"
    return [Figure(title, charts.confusion(part, [names[number] for number in chosen]), pairs, _SHADES)]


_SHADES = "Rows by true class, shaded by share of the class: correct on the diagonal, wrong elsewhere."


def _confused(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    found = [
        (count, sum(line), names[row], names[column])
        for row, line in enumerate(counts)
        for column, count in enumerate(line)
        if count and row != column
    ]
    found.sort(key=lambda one: (-one[0], one[2], one[3]))
    return Table(
        ["true class", "predicted as", "rows", "share of the class"],
        [[true, taken, str(count), str(total)] for count, total, true, taken in found],
        words=(0, 1),
    )


def _labels(counts: Sequence[Any], names: Sequence[str]) -> Figure:
    cells = [(name, (int(one[1][1]), int(one[1][0]), int(one[0][1]))) for name, one in zip(names, counts, strict=True)]
    worst = sorted(cells, key=lambda one: (-one[1][1] - one[1][2], one[0]))[:MOST_LINES]
    kinds = ("found", "missed", "wrongly predicted")
    return Figure(
        "Labels found, missed and wrongly predicted",
        charts.bars([(name, values) for name, values in worst], kinds, lambda count: f"{count:g}"),
        Table(["label", *kinds], [[name, *map(str, values)] for name, values in cells]),
        "Each label is counted separately.",
    )


def _roc(record: RunRecord) -> list[Figure]:
    areas: Mapping[str, Any] = {one["name"]: one["auroc"] for one in record.pooled["classes"]}
    curves = {
        name: points for name, points in zip(record.classes, _curves(record).get("roc", ()), strict=False) if points
    }
    if not curves:
        return []
    worst_first = sorted(curves, key=lambda name: (areas.get(name) or [1.0])[0] or 0.0)
    chosen = [name for name in curves if name in set(worst_first[:_MOST_CURVES])]
    lines = [(_with_area(name, areas), _thinned(curves[name])) for name in chosen]
    table = Table(["class", "AUROC"], [[name, interval(areas.get(name))] for name in curves])
    many = len(chosen) > charts.COLOURS
    note = f"The {_MOST_CURVES} lowest curves of {len(curves):,} are drawn." if len(curves) > len(chosen) else ""
    caption = f"Each class against the rest, over all thresholds; the upper left corner is ideal. {note}".strip()
    return [Figure("ROC curves", charts.curves(lines, _mean(list(curves.values())) if many else ()), table, caption)]


def _with_area(name: str, areas: Mapping[str, Any]) -> str:
    area = (areas.get(name) or [None])[0]
    return name if area is None else f"{name} ({area:.3f})"


def _thinned(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_CORNERS` of a curve's corners, including its ends."""
    step = max(-(-len(points) // _MOST_CORNERS), 1)
    kept = [*points[:-1:step], points[-1]]
    return [(x, y) for x, y in kept]


def _mean(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Return the mean height of curves at 51 positions."""
    import numpy as np

    # On a vertical segment the upper end counts: evaluate slightly to the right of each position.
    places = np.linspace(0, 1, 51)
    heights = np.mean([np.interp(places + 1e-9, *np.transpose(points)) for points in curves], axis=0)
    return [(0.0, 0.0), *zip(places.tolist(), heights.tolist(), strict=True)]


def _reliability(record: RunRecord) -> list[Figure]:
    calibration = record.evaluation.get("calibration")
    if calibration and calibration["rows_judged_on"]:
        temperature = f"{calibration['temperature']:.2g}"
        return [
            _reliability_figure(record, "Reliability before calibration", calibration["before"]["reliability"]),
            _reliability_figure(
                record, f"Reliability at temperature {temperature}", calibration["after"]["reliability"]
            ),
        ]
    found = _curves(record).get("reliability")
    return [_reliability_figure(record, "Reliability", found)] if found and sum(found["rows"]) else []


def _reliability_figure(record: RunRecord, title: str, found: Values) -> Figure:
    rows, given, came = found["rows"], found["confidence"], found["frequency"]
    table = Table(
        ["probability", "predictions", "mean probability", "observed frequency"],
        [
            [
                f"{100 * number / len(rows):.0f}{DASH}{100 * (number + 1) / len(rows):.0f} %",
                str(count),
                percent(mean),
                interval(share),
            ]
            for number, (count, mean, share) in enumerate(zip(rows, given, came, strict=True))
            if count
        ],
        note=f"Expected calibration error: {percent(found['error'])}.",
    )
    subject = "The predicted class of each row" if record.one_class else "Each label of each row"
    caption = f"{subject}: on the diagonal, probabilities match observed frequencies."
    return Figure(title, charts.reliability(rows, given, came), table, caption)
