"""What ran, and what did not count."""

from collections.abc import Mapping

from fedhead.server.report.layout import Section, Table
from fedhead.server.report.record import RunRecord
from fedhead.wording import by_reason, counted, listed, size

_MOST_NAMES = 40


def about(record: RunRecord) -> Section:
    """What ran."""
    config, journal = record.config, record.journal
    backbone = journal.get("backbone", {})
    facts = [
        ("Backbone", str(config.get("backbone", ""))),
        ("Layer", f"{config.get('layer', '')}, {backbone.get('num_features', '?')} features"),
        ("Backbone's licence", str(backbone.get("licence", "not known"))),
        ("Backbone's size", size(int(backbone["num_bytes"])) if "num_bytes" in backbone else "not known"),
        ("Weights digest", str(backbone.get("weights_digest", "not known"))),
        ("Backbone digest", str(backbone.get("digest", "not known"))),
        ("Preprocessing", ", ".join(f"{key} {value}" for key, value in backbone.get("preprocessing", {}).items())),
        ("Head", f"{config.get('head', '')}, starting from {config.get('init') or 'its default'}"),
        ("Strategy", f"{config.get('strategy', {}).get('name', '')}, {counted(int(config.get('rounds', 0)), 'round')}"),
        ("Seed", str(config.get("seed", ""))),
        ("Classes", f"{len(record.classes)}: {listed(record.classes, 20)}"),
        ("Started", str(journal.get("started", "not known"))),
        ("Ended", str(journal.get("ended") or "not yet")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in journal.get("versions", {}).items())),
    ]
    missing = [("never took part", _refused(record))]
    missing += [(f"round {line['number']}", line.get("dropped", {})) for line in record.rounds]
    rows = [
        [when, listed(sites, _MOST_NAMES), reason]
        for when, reasons in missing
        for reason, sites in by_reason(reasons).items()
    ]
    tables = []
    if rows:
        table = Table(["when", "sites", "why"], rows, words=(0, 1, 2))
        tables.append(("Sites and replies that did not count", table))
    nothing = "" if tables else " Every reply counted."
    fedhead = f"fedhead {journal.get('versions', {}).get('fedhead', '')}".strip()
    answer = f"{config.get('backbone', '')} with a {config.get('head', '')} head, under {fedhead}.{nothing}"
    return Section(
        "about",
        "What ran?",
        answer,
        facts=[(name, value) for name, value in facts if value],
        tables=tables,
        code=[("run.toml, which reproduces the run", record.toml)],
    )


def _refused(record: RunRecord) -> Mapping[str, str]:
    refused = dict(record.result.get("sites_refused", {}))
    for site, state in record.standing.items():
        if state.get("standing") in ("refused", "lost") and site not in refused:
            refused[site] = state.get("reason", "")
    return refused
