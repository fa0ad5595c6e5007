"""The section on the run's configuration, and on excluded sites and replies."""

from collections.abc import Mapping
from typing import Any

from fedhead.server.report.layout import Section, Table
from fedhead.server.report.privacy import solver_of
from fedhead.server.runs.record import RunRecord
from fedhead.wording import by_reason, counted, listed, percent, size

_MOST_NAMES = 40


def about(record: RunRecord) -> Section:
    """Return the section."""
    config, journal = record.config, record.journal
    backbone = journal.backbone
    facts = [
        ("Backbone", str(config.get("backbone", ""))),
        ("Layer", f"{config.get('layer', '')}, {backbone.num_features or '?'} features"),
        ("Backbone's licence", backbone.licence or "unknown"),
        ("Backbone's size", _size(backbone.num_bytes)),
        ("Weights digest", "" if backbone.num_bytes == 0 else backbone.weights_digest or "unknown"),
        ("Backbone digest", backbone.digest or "unknown"),
        ("Preprocessing", ", ".join(f"{key} {value}" for key, value in backbone.preprocessing.items())),
        ("Map of features", _map(config)),
        *((str(one["question"]), f"{one['taken']}. {one['reason']}") for one in record.evaluation.get("choices", ())),
        ("Foreign inputs", _foreign(record.evaluation.get("foreign") or {})),
        ("Head", "" if record.headless else f"{config.get('head', '')}, {_start(record)}"),
        ("Strategy", _strategy(record)),
        ("Seed", str(config.get("seed", ""))),
        (record.task.output_names[1].capitalize(), "" if record.headless else _outputs(record)),
        ("Started", journal.started or "unknown"),
        ("Ended", journal.ended or "not yet"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in journal.versions.items())),
    ]
    missing = [("never took part", _refused(record))]
    missing += [(f"round {line.number}", line.dropped) for line in record.rounds]
    rows = [
        [when, listed(sites, _MOST_NAMES), reason]
        for when, reasons in missing
        for reason, sites in by_reason(reasons).items()
    ]
    tables = []
    if rows:
        table = Table(["when", "sites", "why"], rows, words=(0, 1, 2))
        tables.append(("Excluded sites and replies", table))
    nothing = "" if tables else " No reply was excluded."
    fedhead = f"fedhead {journal.versions.get('fedhead', '')}".strip()
    trained = f"adapters {_layers(config)}" if record.headless else f"a {config.get('head', '')} head"
    answer = f"{config.get('backbone', '')} with {trained}, in {fedhead}.{nothing}"
    return Section(
        "about",
        "What ran?",
        answer,
        facts=[(name, value) for name, value in facts if value],
        tables=tables,
        code=[("run.toml, which reproduces the run", record.toml)],
    )


def _layers(config: Mapping[str, Any]) -> str:
    tune = config.get("tune", {})
    return repr(tune.get("layers", "") if isinstance(tune, dict) else tune)


def _outputs(record: RunRecord) -> str:
    names = record.task.shown(record.classes)
    return f"{len(names)}: {listed(names, 20)}"


def _size(num_bytes: int | None) -> str:
    if num_bytes == 0:
        return "nothing: it has no weights"
    return "unknown" if num_bytes is None else size(num_bytes)


def _strategy(record: RunRecord) -> str:
    """Name the strategy and its rounds; empty for a private run, which has none."""
    if record.private:
        return ""
    rounds = counted(int(record.config.get("rounds", 0)), "round")
    return f"{record.config.get('strategy', {}).get('name', '')}, {rounds}"


def _start(record: RunRecord) -> str:
    """Describe where the head comes from."""
    if record.private:
        return solver_of(record.evaluation.get("privacy")) or "solved from noisy sums"
    return f"starting from {record.config.get('init') or 'its default'}"


def _map(config: Mapping[str, Any]) -> str:
    """Describe the map of features; empty for plain ones."""
    basis, lift = config.get("basis", "none"), config.get("lift", "none")
    if lift == "none":
        return "" if basis == "none" else f"rows of unit length ({basis})"
    return (
        f"rows of unit length ({basis}), lifted by {lift}. Sums of more features protect single rows less: sites ask "
        "for more rows in proportion, and secure summation is recommended"
    )


def _foreign(test: Mapping[str, Any]) -> str:
    """Describe the test for foreign inputs; empty if there is none."""
    if not test:
        return ""
    return (
        f"recognised by their distances from the sites' rows; at most {percent(test['share'])} of rows like the "
        f"{counted(test['rows'], 'held-out row')} exceed a limit. This took two more exchanges: sums of rows of unit "
        "length, and counts of held-out rows by distance"
    )


def _refused(record: RunRecord) -> Mapping[str, str]:
    refused = dict(record.result.sites_refused) if record.result else {}
    for site, state in record.standing.items():
        if state.standing in ("refused", "lost") and site not in refused:
            refused[site] = state.reason
    return refused
