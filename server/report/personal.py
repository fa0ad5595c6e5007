"""The section on personal heads: shared, own and personal heads of each site, with paired intervals."""

from fedhead.server.report.layout import Section, Table
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent, signed

_MADE = {
    "closed": "from the pooled sums, with the site's own counted more often, by leave-one-out loss",
    "head": "by training the shared head further at the site",
    "ditto": "by training near the shared head at the site",
}

ADAPTERS = (
    "The result of this run is a family of personal models: the sites share the first matrix of each adapter and a "
    "head, and each site's second matrices never left it. Each site keeps its model: fedhead predict --site-model. The "
    "delivered model is the solved head without adapters, for anybody else."
)


def personal(record: RunRecord) -> Section | None:
    """Return the section; None if the run made no personal heads."""
    made: Values = record.evaluation.get("personal") or {}
    pooled = made.get("pooled")
    if not pooled:
        return None
    right, rows = pooled["right"], pooled["rows"]
    answer = (
        f"On {counted(rows, 'held-out row')} of all sites, personal heads classify {percent(right['personal'] / rows)} "
        f"correctly, the shared head {percent(right['shared'] / rows)} and the sites' own heads "
        f"{percent(right['own'] / rows)}."
    )
    sentences = [ADAPTERS]
    if made["mode"] in _MADE:
        sentences = [f"Each site made a head {_MADE[made['mode']]}, and keeps it: fedhead predict --site-model."]
    sites = made.get("sites", {})
    worse = [name for name, one in sites.items() if one["gain"][1] < 0 or one["gain_over_own"][1] < 0]
    if worse:
        sentences.append(f"The personal head is significantly worse than another one at: {', '.join(worse)}.")
    lines = [_line(name, one) for name, one in sites.items()]
    table = Table(
        ["site", "rows", "shared head", "own head", "personal head", "gain over shared", "gain over own"],
        [_line("all sites", pooled), *lines],
        note="Gains are 95 % intervals of the difference in accuracy on the same rows (Bonett and Price).",
        words=(0,),
    )
    return Section("personal", "Does a head of its own help a site?", answer, sentences, tables=[("Heads", table)])


def _line(name: str, one: Values) -> list[str]:
    rows, right = one["rows"], one["right"]
    accuracies = [percent(right[head] / rows) for head in ("shared", "own", "personal")]
    return [name, str(rows), *accuracies, _interval(one["gain"]), _interval(one["gain_over_own"])]


def _interval(gain: tuple[float, float]) -> str:
    return f"{signed(100 * gain[0], 0)} to {signed(100 * gain[1], 0)} points"
