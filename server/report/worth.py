"""Whether joining was worth it: the shared head beside each site's own, and accuracy over what was exchanged."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from fedhead.diagnosis import HEADS
from fedhead.server.report import charts
from fedhead.server.report.layout import Figure, Section, Table
from fedhead.server.report.quality import MOST_LINES, interval
from fedhead.server.report.record import RunRecord, Values
from fedhead.wording import counted, percent, size


def worth(record: RunRecord) -> Section:
    """Was federation worth it: the shared head beside each site's own, and accuracy over what was exchanged."""
    compared = [one for one in record.diagnoses if one.get("comparison")]
    sentences = list(_baseline_sentences(record))
    figures = []
    answer = "Sites' own heads were not compared with the shared one" + (
        ", as rows have several classes each." if record.multi_label else "." if record.result else " so far."
    )
    if compared:
        rows = sum(one["comparison"]["rows"] for one in compared)
        right = Counter[str]()
        for one in compared:
            right.update(one["comparison"]["right"])
        gain = 100 * (right["pooled"] - right["own"]) / rows
        answer = (
            f"The shared head has {percent(right['pooled'] / rows)} of {counted(rows, 'held-out row')} right, the "
            f"sites' own heads {percent(right['own'] / rows)}: {abs(gain):.1f} points "
            f"{'more' if gain >= 0 else 'less'} than by themselves."
        )
        better = sum(one["comparison"]["right"]["pooled"] > one["comparison"]["right"]["own"] for one in compared)
        worse = sum(one["comparison"]["right"]["pooled"] < one["comparison"]["right"]["own"] for one in compared)
        sentences.insert(
            0,
            f"It is better at {counted(better, 'site')}, worse at {worse}, and equal at "
            f"{len(compared) - better - worse}. Heads made of all sites but the one that they are tested at have "
            f"{percent(right['others'] / rows)} right. All are solved from the sites' sums, for each site's own "
            "shares of the classes; a site's own head knows no class that the site does not hold.",
        )
        figures.append(_choices(compared))
    figures += _progress(record)
    return Section("worth", "Was it worth joining?", answer, sentences, figures)


def _baseline_sentences(record: RunRecord) -> list[str]:
    baseline = record.evaluation.get("baseline")
    if not baseline:
        return []
    return [
        f"Without transfer, on {baseline['backbone']}, the head of one exchange has "
        f"{interval(baseline['accuracy'])} right"
        + (f" ({percent(baseline['accuracy_test'])} on the test set)" if baseline.get("accuracy_test") else "")
        + "."
    ]


def _choices(compared: Sequence[Values]) -> Figure:
    sites = []
    for one in compared:
        found = one["comparison"]
        shares = {name: right / found["rows"] for name, right in found["right"].items()}
        sites.append(charts.Choice(one["site"], shares["own"], shares["pooled"], shares["others"], found["rows"]))
    sites.sort(key=lambda one: (one.pooled - one.own, one.name))
    table = Table(
        ["site", "rows", "own head", "shared head", "without the site", "own head better by (95 %)", "p"],
        [
            [
                one["site"],
                str(one["comparison"]["rows"]),
                *(percent(one["comparison"]["right"][name] / one["comparison"]["rows"]) for name in HEADS),
                "{:+.1f} to {:+.1f} points".format(*(100 * limit for limit in one["comparison"]["gain"])),
                f"{one['comparison']['p_value']:.3f}",
            ]
            for one in compared
        ],
        note="p: an exact McNemar test of the own head against the shared one.",
    )
    title = "Own head, shared head, and head without the site"
    if len(sites) <= MOST_LINES:
        return Figure(title, charts.choices(sites), table, "Sorted by what the shared head adds.")
    caption = "A dot for each site: above the line the shared head is better, below it the site's own."
    return Figure(title, charts.own_against_shared(sites), table, caption)


def _progress(record: RunRecord) -> list[Figure]:
    tested = any(line.get("test_accuracy") is not None for line in record.rounds)
    key = "test_accuracy" if tested else "accuracy"
    spent = list(accumulate(line["bytes_down"] + line["bytes_up"] for line in record.rounds))
    known = [(total, line) for total, line in zip(spent, record.rounds, strict=True) if line.get(key) is not None]
    if not known:
        return []
    points = [
        (float(total), float(line[key]), f"round {line['number']}: {percent(line[key])} after {size(total)}")
        for total, line in known
    ]
    kept = next((place for place, (_, line) in enumerate(known) if line["number"] == record.kept_round), -1)
    baseline = record.evaluation.get("baseline", {})
    reference = baseline.get("accuracy_test") if tested else (baseline.get("accuracy") or [None])[0]
    table = Table(
        ["round", "sites", "loss", "accuracy", *(["test"] if tested else []), "down", "up", "in all", "seconds"],
        [
            [
                str(line["number"]),
                str(line["sites"]) if line["number"] else "",
                "" if line["loss"] is None else f"{line['loss']:.4f}",
                percent(line["accuracy"]),
                *([percent(line["test_accuracy"])] if tested else []),
                size(line["bytes_down"]),
                size(line["bytes_up"]),
                size(total),
                f"{line['seconds']:.2f}",
            ]
            for total, line in zip(spent, record.rounds, strict=True)
        ],
        note="Round 0 is the head that the run starts from. What the closing evaluation took counts to the last line.",
    )
    where = "the pooled test set" if tested else "held-out rows"
    ringed = " The ringed one is kept." if kept >= 0 else ""
    caption = f"A dot for each head, on {where}.{ringed}"
    return [Figure("Accuracy over the bytes exchanged", charts.progress(points, kept, reference), table, caption)]
