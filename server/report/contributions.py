"""The section on the value of each site's rows for the shared head."""

from fedhead.server.report import charts
from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.quality import MOST_LINES
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, signed

QUESTION = "What did each site bring?"
_KEY = "contributions"


def contributions(record: RunRecord) -> list[Section]:
    """Return the section, if the values were computed or the run is to compute them."""
    found = record.worth
    if not found:
        reason = "They were not computed" if record.result else "They are computed at the end of the run"
        return [Section(_KEY, QUESTION, f"{reason}.")] if record.config.get("worth") else []
    sites = sorted(found["sites"], key=lambda one: (-one["shapley"], one["site"]))
    best, last = sites[0], sites[-1]
    answer = f"The sites' rows together explain {_points(found['value'])} of the held-out targets' variance"
    if len(sites) > 1:
        answer += (
            f": {best['site']} brought most ({_points(best['shapley'])}), {last['site']} least "
            f"({_points(last['shapley'])})"
        )
    return [Section(_KEY, QUESTION, f"{answer}.", _sentences(found, sites), [_figure(found, sites)])]


def _points(value: float) -> str:
    return f"{100 * value:.1f} %"


def _sentences(found: Values, sites: list[Values]) -> list[str]:
    how = (
        f"estimated from {counted(found['permutations'], 'random order')}, with 95 % intervals for the sampling"
        if found["permutations"]
        else f"exact, over all {2 ** len(sites):,} coalitions of sites"
    )
    said = [
        "A site's Shapley value is its mean gain in explained variance over all orders in which the sites could join; "
        f"the values add up to that of all sites. They are {how}.",
        "They are values of the ridge head, which follows for each coalition from the sites' sums, on the held-out "
        "rows of all sites. They depend on which sites took part, and on what the sites themselves report.",
    ]
    if needless := [one["site"] for one in sites if one["leave_one_out"] < 0]:
        names = ", ".join(needless[:8]) + (f" and {counted(len(needless) - 8, 'other')}" if len(needless) > 8 else "")
        said.append(f"Without each of these sites alone, the others' head is better on all held-out rows: {names}.")
    return said


def _figure(found: Values, sites: list[Values]) -> Figure:
    sampled = bool(found["permutations"])
    table = Table(
        ["site", "rows", "held out", "Shapley value", "alone", "lost without it", "lost at the other sites"],
        [
            [
                one["site"],
                str(one["rows"]),
                str(one["rows_held_out"]),
                _points(one["shapley"])
                + (f" ({100 * one['low']:.1f}{DASH}{100 * one['high']:.1f})" if sampled else ""),
                _points(one["alone"]),
                signed(100 * one["leave_one_out"], 2),
                DASH if one["leave_one_out_elsewhere"] is None else signed(100 * one["leave_one_out_elsewhere"], 2),
            ]
            for one in sites
        ],
        note="In per cent of the held-out targets' variance. Alone: explained by the head from the site's rows only.",
    )
    shown = sites if len(sites) <= MOST_LINES else [*sites[: MOST_LINES // 2], *sites[-MOST_LINES // 2 :]]
    title = "Shapley value by site"
    if len(sites) > MOST_LINES:
        title += f", the {MOST_LINES // 2} highest and lowest"
    lines = [(one["site"], (max(one["shapley"], 0.0), max(-one["shapley"], 0.0))) for one in shown]
    chart = charts.bars(lines, ("gain", "loss"), lambda value: f"{100 * value:.1f}")
    return Figure(title, chart, table, "In per cent of the held-out targets' variance.")
