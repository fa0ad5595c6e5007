"""The section on the data that left the sites, and its protection."""

from collections import Counter
from collections.abc import Mapping, Sequence

from fedhead.config import GENERATION
from fedhead.protocol.actions import ACTIONS
from fedhead.secure.session import MIN_SITES, most_colluding, threshold_for
from fedhead.server.report.layout import Section, Table
from fedhead.server.report.privacy import attack_figure, attack_sentences, confusion, outcome, promise
from fedhead.server.runs.record import RunRecord
from fedhead.server.starting_head import UNSOLVED
from fedhead.wording import counted, size

MOST_CLASSES = 30
"""Of more classes the noisy confusion is in `evaluation.json` only."""

MOST_LISTS = 5
"""Different lists of release steps that the report shows."""

_PLAIN = (
    "This prevents accidental disclosure. It does not hide rows from the coordinator: with fewer rows than features, "
    "one site's sums or first head reveal whether a given row is among them.",
    "Neither secure summation nor noise was on: the coordinator saw each site's exact sums and heads, and could "
    "infer information about rows from them.",
)


_ADAPTERS = (
    "This prevents accidental disclosure. Adapters of several rounds can reproduce parts of single conversations.",
    "Neither secure summation nor noise was on: the coordinator saw each site's own adapters.",
)


def secure_sentences(record: RunRecord) -> list[str]:
    """Return sentences on secure summation: the protection, and its limits."""
    sites, privacy = record.num_sites, record.config.get("privacy", {})
    threshold = threshold_for(sites, int(privacy.get("max_colluding", 0)))
    colluding = most_colluding(sites, min(threshold, sites)) if sites >= MIN_SITES else 0
    hides = "" if privacy.get("epsilon") else " (no noise was added)"
    protected = (
        "Secure summation was simulated: sums were added in its fixed-point arithmetic, and no masks were needed "
        "because nothing left the process. At real sites the same run shows the coordinator only totals over all sites."
        if _simulated(record)
        else "Secure summation was on: each site masked its sums and heads, and the coordinator learned only totals "
        "over all sites that answered. This holds even if the coordinator colludes with up to "
        f"{counted(colluding, 'site')}, provided that the sites' signed roster is genuine."
    )
    return [
        protected,
        f"Not protected: what the totals and the final head reveal about rows{hides}, which sites took "
        "part, and the correctness of the totals. One site can falsify them within the bounds that the total is "
        "checked against, and cannot be identified.",
    ]


def releases(record: RunRecord) -> Section:
    """Return the section."""
    actions: Mapping[str, Sequence[int]] = record.evaluation.get("traffic", {}).get("actions", {})
    tables = []
    if actions:
        rows = [
            [ACTIONS[name].tells if name in ACTIONS else name, str(replies), size(up)]
            for name, (replies, _, up) in actions.items()
            if replies
        ]
        tables.append(("What sites sent", Table(["content of a site's message", "messages", "bytes"], rows)))
    privacy, attack = record.evaluation.get("privacy"), record.evaluation.get("attack")
    if privacy and "evaluation" in privacy and len(record.classes) <= MOST_CLASSES:
        tables.append(("Noisy counts of held-out rows", confusion(privacy, list(record.classes))))
    language = record.task.name == GENERATION
    withheld = record.result.rows_withheld if record.result else None
    sentences = [
        _steps(record) + (f" In this run they withheld {counted(withheld, record.task.row_name)}." if withheld else ""),
        *(secure_sentences(record) if record.secure else ()),
        *((*promise(privacy), *outcome(privacy)) if privacy else ()),
        *(() if record.secure or privacy else _ADAPTERS if language else _PLAIN),
        *(attack_sentences(attack) if attack else ()),
        _kept(record),
        _ledger(record),
    ]
    return Section(
        "releases",
        "What left the sites?",
        "Adapters, sums and counts. No conversation, and no states of single tokens."
        if language
        else "Sums, heads and counts. No image, no text and no features of a single row.",
        [sentence for sentence in sentences if sentence],
        figures=[attack_figure(attack)] if attack and "roc" in attack else [],
        tables=tables,
    )


def _steps(record: RunRecord) -> str:
    """Return sentences on the steps that every reply passed."""
    steps = record.journal.release_steps
    if steps is not None:
        return f"Release steps: {' '.join(steps) or 'none in this simulation.'}"
    described = Counter(site.steps for site in record.journal.sites.values() if site.steps)
    if not described:
        return (
            "Release steps: each site's own guard, which withholds classes and sites with few rows before anything is "
            "computed (by default below 5 rows per class and 20 in all)."
        )
    lists = [f"{counted(sites, 'site')}: {' '.join(each)}" for each, sites in described.most_common(MOST_LISTS)]
    rest = described.total() - sum(sites for _, sites in described.most_common(MOST_LISTS))
    more = f" {counted(rest, 'more site')} described other steps." if rest else ""
    return f"Release steps, as the sites described them. {' '.join(lists)}{more}"


def _kept(record: RunRecord) -> str:
    if record.evaluation.get("privacy"):
        return "The run folder keeps the noisy evaluation and the model, and no sums."
    if record.config.get("init") in UNSOLVED:
        return "The run requested no feature statistics, and its folder keeps none."
    kept = record.config.get("keep_sums")
    if kept == "total":
        return "Only the total of all sites' sums was computed; the run folder keeps no sums."
    if kept == "none":
        return "The run folder keeps the total of all sites' sums and each site's digest, but no single site's sums."
    return "The run folder keeps each site's own sums, readable only by its owner, so that sites can join and leave."


def _ledger(record: RunRecord) -> str:
    if _simulated(record):
        return "Simulated sites keep no ledger, since nothing leaves the process."
    return "Each site recorded every release in its own ledger before sending it; `fedhead ledger` shows it there."


def _simulated(record: RunRecord) -> bool:
    earlier = record.result is not None and record.result.rows_extracted is not None
    return earlier if record.journal.simulated is None else record.journal.simulated
