"""The section on the run's cost: bytes, time, and a comparison with sending the whole model."""

from collections.abc import Mapping, Sequence

from fedhead.server.report import charts
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.quality import MOST_LINES
from fedhead.server.runs.record import RunRecord
from fedhead.wording import duration, size


def cost(record: RunRecord) -> Section:
    """Return the section."""
    total = record.bytes_down + record.bytes_up
    whole = record.result.bytes_full_model if record.result else 0
    answer = (
        f"{size(record.bytes_down)} were sent to the sites and {size(record.bytes_up)} received from them in "
        f"{duration(seconds(record))}."
    )
    sentences = []
    figures = []
    if whole > total > 0:
        sentences.append(
            f"Sending the whole model{'' if record.headless else ', backbone and head'}, in both directions in every "
            "round would have taken "
            f"{size(whole)}: {whole / total:,.{0 if whole >= 10 * total else 1}f} times as much."
        )
        compared = [("this run", (float(total),)), ("whole model", (float(whole),))]
        figures.append(
            Figure(
                "Bytes, against sending the whole model",
                charts.bars(compared, ("",), lambda count: size(round(count))),
                Table(["", "bytes"], [[name, f"{values[0]:,.0f}"] for name, values in compared]),
            )
        )
    sentences.append(
        "Bytes are payload, without the overhead of Flower and TLS. Each site that lacks the backbone receives it once."
    )
    return Section("cost", "What did it cost?", answer, sentences, [*figures, *_by_phase(record), *_traffic(record)])


def seconds(record: RunRecord) -> float:
    """Return the duration of the run, or its elapsed time."""
    if record.result and record.result.seconds is not None:
        return record.result.seconds
    return sum(record.journal.seconds.values()) or sum(line.seconds for line in record.rounds)


PHASES = {
    "features": "features",
    "describe": "describing the run",
    "install": "sending the backbone",
    "statistics": "sums of features",
    "standardise": "standardising",
    "train": "rounds",
    "evaluate": "evaluating",
    "finish": "reports and diagnosis",
}


def _by_phase(record: RunRecord) -> list[Figure]:
    seconds = dict(record.journal.seconds)
    if record.result and record.result.seconds_extraction:
        seconds["features"] = record.result.seconds_extraction
    phases = [
        (PHASES.get(name, name), float(seconds[name]))
        for name in [*PHASES, *(seconds.keys() - PHASES)]
        if name in seconds
    ]
    if not phases:
        return []
    return [
        Figure(
            "Seconds by phase",
            charts.bars([(name, (value,)) for name, value in phases], ("",), duration),
            Table(["phase", "seconds"], [[name, f"{value:.3f}"] for name, value in phases]),
            "As measured by the coordinator, including waiting for sites.",
        )
    ]


def _traffic(record: RunRecord) -> list[Figure]:
    traffic: Mapping[str, Sequence[int]] = record.evaluation.get("traffic", {}).get("sites", {})
    if not traffic:
        return []
    table = Table(
        ["site", "down", "up"],
        [[name, f"{down:,}", f"{up:,}"] for name, (down, up) in sorted(traffic.items())],
        "In bytes.",
    )
    most = sorted(traffic.items(), key=lambda pair: (-sum(pair[1]), pair[0]))
    shown = sorted(most[:MOST_LINES]) if len(traffic) <= MOST_LINES else most[:MOST_LINES]
    lines = [(name, (float(down), float(up))) for name, (down, up) in shown]
    title = (
        "Bytes by site"
        if len(traffic) <= MOST_LINES
        else f"Bytes of the {MOST_LINES} sites with the most traffic of {len(traffic):,}"
    )
    return [Figure(title, charts.bars(lines, ("down", "up"), lambda count: size(round(count))), table)]
