"""What left the sites, and what protected it."""

from collections.abc import Mapping, Sequence

from fedhead.server.report.layout import Section, Table
from fedhead.server.report.record import RunRecord
from fedhead.wording import counted, size

RELEASES = {
    "describe": "its name, how many rows it has, and whether it holds the backbone",
    "install": "that it received the backbone",
    "statistics": "sums over its rows: how many of each class, the sum of their features, and products of features",
    "standardise": "that it noted the mean and scale of the features",
    "train": "a head trained on its rows, the loss while training, and how the head it received did",
    "evaluate": "how a head did: how many held-out rows, how many right, and the sum of the losses",
    "report": "counts on its held-out rows: true class by predicted class, and scores in bins",
    "compare": "on how many of its held-out rows which of three heads are right",
    "calibrate": "for a set of temperatures the sum of the losses, and counts of how often probabilities came true",
}
"""What a site's answer to each action tells, in plain words."""


def releases(record: RunRecord) -> Section:
    """What left the sites, and what protected it."""
    actions: Mapping[str, Sequence[int]] = record.evaluation.get("traffic", {}).get("actions", {})
    tables = []
    if actions:
        rows = [
            [RELEASES.get(name.rpartition(".")[2], name), str(replies), size(up)]
            for name, (replies, _, up) in actions.items()
            if replies
        ]
        tables.append(("What sites sent", Table(["what a site's message tells", "messages", "bytes"], rows)))
    withheld = record.result.get("rows_withheld")
    sentences = [
        "Every site's guard withholds classes and sites with few rows before anything is computed. "
        + _limits(record)
        + (f" {counted(withheld, 'row')} withheld in this run." if withheld else ""),
        "That prevents accidents. It does not hide rows from the coordinator: with fewer rows than features, one "
        "site's sums or first head tell whether a given row is among them.",
        _protection(record),
        _kept(record),
        _ledger(record),
    ]
    return Section(
        "releases",
        "What left the sites?",
        "No image, no text and no features of a single row: sums, heads and counts.",
        [sentence for sentence in sentences if sentence],
        tables=tables,
    )


def _limits(record: RunRecord) -> str:
    if not _simulated(record):
        return "Its limits are the site's own (5 rows of a class and 20 in all, unless its engineer chose others)."
    table = record.config.get("simulation", {})
    if not (table.get("min_class_count") or table.get("min_rows")):
        return "In this simulation it was off."
    return (
        f"In this simulation: classes with fewer than {table.get('min_class_count')} training rows at a site, and "
        f"sites with fewer than {table.get('min_rows')} rows."
    )


def _protection(record: RunRecord) -> str:
    privacy = record.config.get("privacy")
    if privacy:
        on = ", ".join(f"{key} = {value}" for key, value in privacy.items())
        return f"Protection against the coordinator, as configured: {on}."
    return (
        "Neither secure summation nor noise was on: the coordinator saw each site's sums and heads as they are, and "
        "could learn from them what they tell."
    )


def _kept(record: RunRecord) -> str:
    if record.config.get("keep_sums") == "none":
        return "The run folder keeps only what all sites' sums add up to."
    return "The run folder keeps each site's own sums, readable by its owner alone, so that sites can join and leave."


def _ledger(record: RunRecord) -> str:
    if _simulated(record):
        return "Simulated sites keep no ledger, as nothing leaves the process."
    return "Each site entered every release in its own ledger before it left; fedhead ledger shows it there."


def _simulated(record: RunRecord) -> bool:
    return bool(record.journal.get("simulated", "rows_extracted" in record.result))
