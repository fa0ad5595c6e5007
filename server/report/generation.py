"""The section on a language model's quality: perplexity pooled and by site, with the adapters and without."""

from collections.abc import Callable, Mapping

from fedhead.server.report.layout import DASH, Figure, Section, Table
from fedhead.server.report.scores import number_interval, on_test_set, score_by_site, worst_first
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted


def generation_quality(record: RunRecord, key: str, question: str, unknown: Callable[[RunRecord], str]) -> Section:
    """Return the section on a language model's quality."""
    on_test = on_test_set(record, "perplexity")
    pooled = record.pooled
    if not pooled:
        return Section(key, question, on_test or unknown(record))
    answer = (
        f"Perplexity is {number_interval(pooled['perplexity'])} on {counted(pooled['rows'], 'held-out conversation')} "
        f"from {counted(record.num_evaluated, 'site')}, with {counted(pooled['tokens'], 'token')} of answers."
    )
    said = [
        on_test,
        _before(record),
        "Ranges in brackets are 95 % intervals; they assume independent conversations.",
        "Perplexity is the exponential of the mean loss of a token of the answers; less is better. It depends on the "
        "tokenizer, so only models with the same one can be compared by it.",
        _cut(pooled),
        *_worst(record),
    ]
    return Section(key, question, answer, [one for one in said if one], _by_site(record))


def _before(record: RunRecord) -> str:
    before = record.evaluation.get("before", {}).get("pooled")
    if record.tuned and before:
        return f"Without the adapters it is {number_interval(before['perplexity'])} on the same conversations."
    return "" if record.tuned else "The base model is delivered: no adapters were proven to be better."


def _cut(pooled: Values) -> str:
    if not pooled["cut"]:
        return ""
    return f"{pooled['cut']:,} of these conversations are longer than the model takes: their beginnings were left out."


def _worst(record: RunRecord) -> list[str]:
    sites = worst_first(record, "perplexity")
    if len(sites) < 2:
        return []
    name, one = sites[0]
    return [f"Worst site: {name}, {number_interval(one['perplexity'])} on {counted(one['rows'], 'conversation')}."]


def _by_site(record: RunRecord) -> list[Figure]:
    sites = worst_first(record, "perplexity")
    if not sites:
        return []
    before: Mapping[str, Values] = record.evaluation.get("before", {}).get("sites", {})
    table = Table(
        ["site", "conversations", "tokens", "perplexity", "base model"],
        [
            [
                name,
                str(one["rows"]),
                str(one["tokens"]),
                number_interval(one["perplexity"]),
                number_interval(before[name]["perplexity"]) if name in before else DASH,
            ]
            for name, one in sites
        ],
    )
    caption = "Dots with 95 % intervals; the dashed line is the pooled one."
    return [score_by_site(record, sites, "perplexity", "perplexity", table, caption)]
