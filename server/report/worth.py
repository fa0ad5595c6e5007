"""The section on the benefit of joining: the shared head against each site's own, and accuracy over traffic."""

from collections.abc import Sequence
from itertools import accumulate

from fedhead.evaluation.comparison import HEADS
from fedhead.server.report import charts
from fedhead.server.report.fit import shares_of
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.quality import MOST_LINES, interval
from fedhead.server.report.scores import number_interval
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent, signed, size


def worth(record: RunRecord) -> Section:
    """Return the section."""
    compared = [one for one in record.diagnoses if one.get("comparison")]
    sentences = list(_baseline_sentences(record))
    figures = []
    answer = "Sites' own heads were not compared with the shared one" + (
        f", because sites of the task {record.task.name!r} are not diagnosed."
        if not record.compares_sites
        else ": secure summation hides each site's sums."
        if record.secure
        else "."
        if record.result
        else " so far."
    )
    if compared:
        answer, sentence = _benefit(compared, classes=record.task.compares_classes)
        sentences.insert(0, sentence)
        figures.append(_choices(compared, classes=record.task.compares_classes))
    figures += _progress(record)
    return Section("worth", "Was it worth joining?", answer, sentences, figures)


def _benefit(compared: Sequence[Values], *, classes: bool) -> tuple[str, str]:
    """Return two sentences on the benefit of joining over all compared sites."""
    rows = sum(one["comparison"]["rows"] for one in compared)
    shares = [shares_of(one["comparison"]) for one in compared]
    totals = {
        name: sum(own[name] * one["comparison"]["rows"] for own, one in zip(shares, compared, strict=True)) / rows
        for name in HEADS
    }
    gain = 100 * (totals["pooled"] - totals["own"])
    changes = f"{'gains' if gain >= 0 else 'loses'} {abs(gain):.1f} points"
    held = counted(rows, "held-out row")
    pooled, own = percent(totals["pooled"]), percent(totals["own"])
    answer = (
        f"The shared head's accuracy is {pooled} on {held}, and that of the sites' own heads {own}: joining {changes}."
        if classes
        else f"The shared head explains {pooled} of the variance on {held}, and the sites' own heads {own}: joining "
        f"{changes}."
    )
    better = sum(one["pooled"] > one["own"] for one in shares)
    worse = sum(one["pooled"] < one["own"] for one in shares)
    own_heads = (
        "All heads are solved from the sites' sums, with each site's own class priors. A site's own head knows only "
        "the site's classes."
        if classes
        else "All heads are ridge heads, solved from the sites' sums with the same penalty."
    )
    return answer, (
        f"It is better at {counted(better, 'site')}, worse at {worse}, and equal at {len(compared) - better - worse}. "
        f"Heads from all other sites reach {percent(totals['others'])} (leave-one-site-out). {own_heads}"
    )


def _baseline_sentences(record: RunRecord) -> list[str]:
    baseline = record.evaluation.get("baseline")
    if not baseline:
        return []
    task = record.task
    if task.score_name == "accuracy":
        score = f"accuracy {interval(baseline['score'])}"
    else:
        score = f"{task.score_title if record.real else task.score_name} {number_interval(baseline['score'])}"
    return [
        f"Without transfer, on {baseline['backbone']}, the head of one exchange has {score}"
        + (f" ({record.words(baseline['score_test'])} on the test set)" if baseline.get("score_test") else "")
        + "."
    ]


def _choices(compared: Sequence[Values], *, classes: bool) -> Figure:
    sites = []
    for one in compared:
        shares = {name: max(share, 0.0) for name, share in shares_of(one["comparison"]).items()}
        sites.append(
            charts.Choice(one["site"], shares["own"], shares["pooled"], shares["others"], one["comparison"]["rows"])
        )
    sites.sort(key=lambda one: (one.pooled - one.own, one.name))
    table = Table(
        ["site", "rows", "own head", "shared head", "without the site", "own head better by (95 %)", "p"],
        [
            [
                one["site"],
                str(one["comparison"]["rows"]),
                *(percent(shares_of(one["comparison"])[name]) for name in HEADS),
                "{} to {} points".format(*(signed(100 * limit, 1) for limit in one["comparison"]["gain"])),
                f"{one['comparison']['p_value']:.3f}",
            ]
            for one in compared
        ],
        note=f"p: {'an exact McNemar test' if classes else 'a paired t test'} of the own head against the shared one.",
    )
    below = "" if classes else " Shares below 0 are drawn at 0."
    title = "Own head, shared head, and head without the site"
    measure = "accuracy" if classes else "share of the variance explained"
    if len(sites) <= MOST_LINES:
        return Figure(title, charts.choices(sites, measure), table, f"Sorted by the shared head's gain.{below}")
    caption = f"A dot for each site: above the line the shared head is better, below it the site's own.{below}"
    return Figure(title, charts.own_against_shared(sites, measure), table, caption)


def _progress(record: RunRecord) -> list[Figure]:
    tested = any(line.test_score is not None for line in record.rounds)
    scores = [line.test_score if tested else line.score for line in record.rounds]
    spent = list(accumulate(line.bytes_down + line.bytes_up for line in record.rounds))
    known = [
        (total, line.number, score)
        for total, line, score in zip(spent, record.rounds, scores, strict=True)
        if score is not None
    ]
    if not known:
        return []
    points = [
        (float(total), score, f"round {number}: {record.words(score)} after {size(total)}")
        for total, number, score in known
    ]
    kept = next((place for place, (_, number, _) in enumerate(known) if number == record.kept_round), -1)
    baseline = record.evaluation.get("baseline", {})
    reference = baseline.get("score_test") if tested else (baseline.get("score") or [None])[0]
    table = Table(
        [
            "round",
            "sites",
            "loss",
            record.task.score_name,
            *(["test"] if tested else []),
            "down",
            "up",
            "in total",
            "seconds",
        ],
        [
            [
                str(line.number),
                str(line.sites) if line.number else "",
                "" if line.loss is None else f"{line.loss:.4f}",
                record.words(line.score),
                *([record.words(line.test_score)] if tested else []),
                size(line.bytes_down),
                size(line.bytes_up),
                size(total),
                f"{line.seconds:.2f}",
            ]
            for total, line in zip(spent, record.rounds, strict=True)
        ],
        note=f"Round 0 is the {'base model' if record.headless else 'initial head'}. The last line includes the final "
        "evaluation.",
    )
    where = "the pooled test set" if tested else "held-out rows"
    ringed = " The ring marks the kept one." if kept >= 0 else ""
    caption = f"A dot for each {'round' if record.headless else 'head'}, on {where}.{ringed}"
    shares = record.task.score_name == "accuracy"
    title = f"{'Accuracy' if shares else record.task.score_title} over the bytes exchanged"
    return [Figure(title, charts.progress(points, kept, reference, shares=shares), table, caption)]
