"""The comparison of sites by the shared model's score, for tasks whose sites are not compared with the pool by sums."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from fedhead.server.report.layout import DASH, Section, Table
from fedhead.server.report.scores import number_interval
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, signed

CHANCE = 0.05
"""Probability that any of the sites is called unlike the others where all are alike."""

UNLIKE = 2.0
"""Factor by which a share of the data differs from the others' for it to be named."""

FEWEST = 10
"""Held-out rows or images of a site below which its score is not tested: the standard errors of fewer are too small."""

_Z = NormalDist().inv_cdf(0.975)

_ADVICE: Mapping[str, str] = {
    "detection": "compare sizes of its objects, image resolution and annotated classes with the others' (fedhead data)",
    "segmentation": "compare its masks, image resolution and staining or contrast with the others' (fedhead data)",
    "survival": "compare how time and events are recorded there, and for how long rows are followed (fedhead data)",
    "tagging": "compare its guidelines of annotation and its tokenisation with the others' (fedhead data)",
    "generation": "compare the style and length of its answers, and their language, with the others' (fedhead data)",
    "ordinal": "compare how its levels are graded, and the units of its columns, with the others' (fedhead data)",
}
"""What to look at first, by task."""


@dataclass(frozen=True)
class SiteScore:
    """The shared model's score at a site and at all others.

    Attributes:
        name: of the site.
        report: of its held-out rows.
        own: the score there.
        others: the mean of the other sites' scores, weighted by rows.
        errors: the difference in its standard errors; None if these are unknown, or the site has too few rows.
        unlike: how its data differs, in words; empty if it does not.
        sign: of the difference where the site is better.
    """

    name: str
    report: Values
    own: float
    others: float
    errors: float | None
    unlike: str
    sign: int = 1

    def is_worse(self, sites: int) -> bool:
        """Return whether the score is worse than by chance, given the number of sites that are compared."""
        return self.errors is not None and self.sign * self.errors < NormalDist().inv_cdf(CHANCE / (2 * sites))


def site_scores(record: RunRecord) -> list[SiteScore]:
    """Compare each site that has a score with the others, the worst first; nothing for fewer than two."""
    score, sign = record.task.score_name, -1 if record.task.lower_is_better else 1
    known = {name: one for name, one in record.sites.items() if one.get(score) and one[score][0] is not None}
    found = []
    for name, one in known.items():
        rest = [other for at, other in known.items() if at != name]
        if not rest:
            continue
        rows = sum(other["rows"] for other in rest)
        others = sum(other["rows"] * other[score][0] for other in rest) / rows
        variances = [_variance(other[score]) for other in (one, *rest)]
        errors = None
        if one["rows"] >= FEWEST and all(variance is not None for variance in variances):
            own, *elsewhere = [variance or 0.0 for variance in variances]
            spread = own + sum((other["rows"] / rows) ** 2 * v for other, v in zip(rest, elsewhere, strict=True))
            errors = (one[score][0] - others) / math.sqrt(spread) if spread else None
        found.append(SiteScore(name, one, one[score][0], others, errors, _unlike(one, rest), sign))
    return sorted(found, key=lambda site: (sign * (site.own - site.others), site.name))


def compared(record: RunRecord, question: str) -> Section | None:
    """Return the section on sites by their scores; None if fewer than two have one."""
    sites = site_scores(record)
    if not sites:
        return None
    title, row = record.task.score_title, record.task.row_name
    worse = [one for one in sites if one.is_worse(len(sites))]
    answer = (
        f"The shared model does worse at {counted(len(worse), 'site')} of {len(sites)} than at the others, by more "
        "than chance."
        if worse
        else f"The shared model does as well at each of {counted(len(sites), 'site')} as at the others, within chance."
    )
    advice = _ADVICE.get(record.task.name, "compare its data with the others' (fedhead data)")
    then = (
        "train adapters without it, and see whether the others do better"
        if record.headless
        else "compare with a model of its data alone, and see whether the others do better without it (fedhead leave)"
    )
    said = [
        f"{one.name}: {title} {one.own:.3f} on {counted(one.report['rows'], f'held-out {row}')}, {one.others:.3f} at "
        f"the other sites.{f' Its data differs: {one.unlike}.' if one.unlike else ''} First {advice}; then {then}."
        for one in worse
    ]
    said += [f"{one.name}: its data differs: {one.unlike}." for one in sites if one.unlike and one not in worse][:8]
    table = Table(
        ["site", f"{row}s", title, "others", "difference", "standard errors", "unlike the others"],
        [
            [
                one.name,
                str(one.report["rows"]),
                number_interval(one.report[record.task.score_name]),
                f"{one.others:.3f}",
                signed(one.own - one.others, 3),
                DASH if one.errors is None else signed(one.errors, 1),
                one.unlike,
            ]
            for one in sites
        ],
        note="Scores of the shared model on held-out data; a site's own model is not solved for this task.",
        words=(0, 6),
    )
    return Section("fit", question, answer, said, tables=[("Sites", table)])


def _variance(figure: Sequence[float | None]) -> float | None:
    _, low, high = figure
    return None if low is None or high is None else float(((high - low) / (2 * _Z)) ** 2)


def _unlike(one: Values, rest: list[Values]) -> str:
    """Return how a site's held-out data differs from the others', by a factor of `UNLIKE` or more."""
    said = []
    for name, own, others in _shares(one, rest):
        if own is not None and others and not others / UNLIKE < own < others * UNLIKE:
            said.append(f"{name} {own:.3g}, {others:.3g} at the others")
    return "; ".join(said[:3])


def _shares(one: Values, rest: list[Values]) -> list[tuple[str, float | None, float | None]]:
    """Return names of shares of the data, with the site's own and the mean of the others'."""
    found: list[tuple[str, float | None, float | None]] = []
    for place, part in enumerate(one.get("areas", ())):
        elsewhere = [other["areas"][place]["share"] for other in rest if other["areas"][place]["share"] is not None]
        mean = sum(elsewhere) / len(elsewhere) if elsewhere else None
        found.append((f"share of pixels of {part['name']}", part["share"], mean))
    for place, part in enumerate(one.get("boxes", ())):
        boxes, rows = (
            sum(values) for values in zip(*((o["boxes"][place]["boxes"], o["rows"]) for o in rest), strict=True)
        )
        found.append((f"boxes per image of {part['name']}", part["boxes"] / max(one["rows"], 1), boxes / max(rows, 1)))
    if "events" in one:
        events, rows = sum(other["events"] for other in rest), sum(other["rows"] for other in rest)
        found.append(("share of rows with an event", one["events"] / max(one["rows"], 1), events / max(rows, 1)))
    return found
