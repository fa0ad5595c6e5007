"""The section on subgroups: the head's metrics and calibration in each, and the worst."""

from fedhead.server.report.layout import Section, Table
from fedhead.server.report.quality import interval
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import listed, percent, signed


def subgroups(record: RunRecord) -> Section | None:
    """Return the section; None if the run evaluated no subgroups."""
    found: Values = record.evaluation.get("subgroups") or {}
    groups = found.get("groups")
    if not groups:
        return None
    sentences = [
        "Metrics are of the calibrated head on held-out rows. A site counts rows by subgroup only where these are "
        "enough, so the rows are fewer than all held-out ones."
    ]
    if found.get("without"):
        sentences.append(f"No site counted rows of: {listed(found['without'], 20)}.")
    columns = ["subgroup", "rows", "accuracy", "balanced accuracy", "calibration error", "against the others"]
    thresholds = any(one.get("threshold") is not None for one in groups)
    if thresholds:
        columns += ["threshold", "sensitivity", "specificity"]
        sentences.append(
            "The thresholds are those at which each subgroup reaches the sensitivity that was asked for, to the last "
            "class. Predictions do not use them."
        )
    table = Table(
        columns,
        [_line(one, thresholds) for one in groups],
        note="Intervals are of 95 %; those of differences are Newcombe's.",
        words=(0,),
    )
    return Section(
        "subgroups",
        "Is the model as good in each subgroup?",
        found["sentence"],
        sentences,
        tables=[("Subgroups", table)],
    )


def _line(one: Values, thresholds: bool) -> list[str]:
    points = ""
    if one["difference"]:
        value, low, high = (signed(100 * limit, 1) for limit in one["difference"])
        points = f"{value} points ({low} to {high})"
    cells = [
        one["name"],
        str(one["rows"]),
        interval(one["accuracy"]),
        interval(one["balanced_accuracy"]),
        percent(one["calibration_error"]),
        points,
    ]
    if not thresholds:
        return cells
    threshold = one.get("threshold")
    return [
        *cells,
        "" if threshold is None else f"{threshold:.3f}",
        percent(one.get("sensitivity")),
        percent(one.get("specificity")),
    ]
