"""The section on the sites: diagnosis of each, leave-one-out accuracy, and coverage of classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedhead.evaluation.shift import MIN_DISTANCE
from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.quality import MOST_LINES
from fedhead.server.report.site_scores import compared
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent


def fit(record: RunRecord) -> Section:
    """Return the section."""
    question = "Which sites should join?"
    diagnoses = record.diagnoses
    if not diagnoses and not record.compares_sites and (section := compared(record, question)):
        return replace(section, sentences=[*section.sentences, *_coverage_sentences(record)], figures=_coverage(record))
    if not diagnoses:
        reason = (
            "Sites are not compared with the pool for this task."
            if not record.compares_sites
            else "One site is its own pool: there is nothing to compare it with."
            if record.result and record.num_sites == 1
            else "Secure summation hides each site's sums, so no site is compared with the pool here."
            if record.secure
            else "Differential privacy hides each site's sums, so no site is compared with the pool here."
            if record.private
            else "Sites were not diagnosed: this needs a head solved from sums, each site's own sums, and --diagnose."
            if record.result
            else "Sites are diagnosed at the end of the run."
        )
        standing = [("Sites", _standing(record))] if record.standing else []
        return Section("fit", question, reason, _coverage_sentences(record), _coverage(record), tables=standing)
    counts = Counter(one["recommendation"] for one in diagnoses)
    summary = ", ".join(f"{number} {_ADVICE.get(name, name)}" for name, number in counts.most_common())
    odd = [one for one in diagnoses if one["recommendation"] not in ("join", "not enough rows to tell")]
    odd += [one for one in diagnoses if one["finding"] not in ("alike", "unknown") and one not in odd]
    sentences = [one["sentence"] for one in odd[:12]]
    if len(odd) > 12:
        sentences.append(f"{len(odd) - 12} more sites have advice other than to join: see the table.")
    table = _sites(record)
    figures = _distances(record, table)
    answer = f"Of {counted(len(diagnoses), 'site')}: {summary}."
    rest = [] if figures else [("Sites", table)]
    return Section(
        "fit",
        question,
        answer,
        [*sentences, *_coverage_sentences(record)],
        [*figures, *_coverage(record)],
        tables=[*rest, *_distributions(diagnoses)],
    )


def _sites(record: RunRecord) -> Table:
    """Return the table of all diagnoses."""
    diagnoses = record.diagnoses
    share = "accuracy" if record.task.compares_classes else "share of the variance explained"
    columns = "targets" if record.real else "classes"
    return Table(
        ["site", "rows", columns, "advice", "its rows", "distance", "shared head", "without the site", "reason"],
        [
            [
                one["site"],
                str(one["rows"]),
                str(one["classes"]),
                one["recommendation"],
                one["finding"],
                f"{one['shift']['distance']:.2f}" if one.get("shift") else DASH,
                *_leave_one_out(one),
                one["reason"] if len(diagnoses) <= 60 else "",
            ]
            for one in diagnoses
        ],
        note=f"Without the site: {share} of a head from all other sites on its held-out rows (leave-one-site-out).",
        words=(0, 3, 4, 8),
    )


def _distances(record: RunRecord, table: Table) -> list[Figure]:
    """Return the figure of the sites' distances from the others; sites with several labels per row have none."""
    if not (record.task.compares_classes or record.real):
        return []
    measured = sorted(
        ((one["site"], (float(one["shift"]["distance"]),)) for one in record.diagnoses if one.get("shift")),
        key=lambda pair: (-pair[1][0], pair[0]),
    )
    if not measured:
        return []
    columns, unit = ("classes", "units of the distance between two classes")
    if record.real:
        columns, unit = ("targets", "standard deviations of the target")
    farthest = f", the {MOST_LINES} farthest" if len(measured) > MOST_LINES else ""
    return [
        Figure(
            f"Distance between a site's rows and the others' of the same {columns}{farthest}",
            charts.bars(measured[:MOST_LINES], ("",), lambda distance: f"{distance:.2f}", MIN_DISTANCE),
            table,
            f"In {unit}; above the dashed line, {MIN_DISTANCE}, it matters. The distance does not depend on which "
            f"{columns} a site holds.",
        )
    ]


def _distributions(diagnoses: Sequence[Values]) -> list[tuple[str, Table]]:
    """Return a table of the real targets' distributions by site, if there are any."""
    lines = [
        [
            one["site"],
            target["name"],
            f"{target['mean']:.4g}",
            f"{target['deviation']:.4g}",
            f"{target['mean_elsewhere']:.4g}",
            f"{target['deviation_elsewhere']:.4g}",
        ]
        for one in diagnoses
        for target in (one.get("shift") or {}).get("distributions", ())
    ]
    if not lines:
        return []
    names = ["site", "target", "mean", "deviation", "mean elsewhere", "deviation elsewhere"]
    return [("Targets by site", Table(names, lines, words=(0, 1)))]


def _standing(record: RunRecord) -> Table:
    hidden = record.secure or record.private
    return Table(
        ["site", "state", "rows", "why"],
        [
            [name, state.standing, DASH if hidden else str(state.rows), state.reason]
            for name, state in sorted(record.standing.items())
        ],
        words=(0, 1, 3),
    )


_ADVICE = {
    "join": "benefit from joining",
    "join with a local head": "should join with a head of their own beside the shared one",
    "stay local": "do better on their own",
    "not enough rows to tell": "have too few rows for advice",
}


def _leave_one_out(diagnosis: Values) -> tuple[str, str]:
    found = diagnosis.get("comparison")
    if not found:
        return DASH, DASH
    shares = shares_of(found)
    return percent(shares["pooled"]), percent(shares["others"])


def shares_of(comparison: Values) -> dict[str, float]:
    """Return each head's share of correct rows, or of explained variance, in the comparison of a diagnosis."""
    if "explained" in comparison:
        return dict(comparison["explained"])
    return {name: right / comparison["rows"] for name, right in comparison["right"].items()}


def _coverage_sentences(record: RunRecord) -> list[str]:
    said = [
        one["sentence"] for one in record.evaluation.get("coverage", ()) if one["rests_on_one_site"] or not one["rows"]
    ]
    if len(said) > 8:
        return [*said[:8], f"{len(said) - 8} more classes depend on one site or have no rows: see the table."]
    return said


def _coverage(record: RunRecord) -> list[Figure]:
    classes: Sequence[Values] = record.evaluation.get("coverage", ())
    if not any(one["rows"] for one in classes):
        return []
    fewest = sorted(classes, key=lambda one: (one["rows"], one["name"]))[:MOST_LINES]
    shown = classes if len(classes) <= MOST_LINES else fewest
    table = Table(
        ["class", "training rows", "sites", "most at", "share there"],
        [
            [one["name"], str(one["rows"]), str(one["sites"]), one["largest_site"], percent(one["share"])]
            for one in classes
        ],
        words=(0, 3),
    )
    title = "Training rows by class" + (f", the {MOST_LINES} with the fewest" if len(classes) > MOST_LINES else "")
    lines = [(one["name"], (one["rows"] * one["share"], one["rows"] * (1 - one["share"]))) for one in shown]
    kinds = ("at the site with most", "elsewhere")
    return [Figure(title, charts.bars(lines, kinds, lambda count: f"{count:.0f}"), table)]
