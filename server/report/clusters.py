"""The section on the clusters of a run without labels: their sizes, and the likelihood of other numbers of clusters."""

from fedhead.server.report.layout import Section, Table
from fedhead.server.runs.record import RunRecord, Values
from fedhead.wording import counted, percent


def clusters(record: RunRecord) -> Section | None:
    """Return the section; None if the run has found no clusters."""
    found: Values = record.evaluation.get("clusters") or {}
    rows = found.get("rows") or []
    if not rows:
        return None
    total, sites = sum(rows), found.get("sites") or []
    answer = (
        f"{counted(total, 'row')} form {counted(len(rows), 'cluster')}; the largest has {percent(rows[0] / total)}."
    )
    columns = ["cluster", "rows", "share", *(["sites"] if sites else [])]
    lines = [
        [f"cluster {number}", f"{count:,}", percent(count / total), *([str(sites[number])] if sites else [])]
        for number, count in enumerate(rows)
    ]
    note = "A site gives the rows of a cluster with fewer than its min_class_count to the next nearest one."
    tables = [("Clusters", Table(columns, lines, note))]
    likelihoods = found.get("likelihoods") or []
    if len(likelihoods) > 1:
        compared = [[str(one["clusters"]), f"{one['mean']:.3f}", f"{one['error']:.3f}"] for one in likelihoods]
        tables.append(
            (
                "Other numbers of clusters",
                Table(
                    ["clusters", "mean log-likelihood", "standard error"],
                    compared,
                    f"Of {counted(found['held_out'], 'held-out row')}, under a mixture of von Mises-Fisher "
                    "distributions.",
                ),
            )
        )
    sentences = [
        *(f"{one['question']}: {one['taken']}. {one['reason']}" for one in record.evaluation.get("choices", ())),
        "Each site can look at its own rows in them: fedhead cluster show. People name them: fedhead cluster name.",
    ]
    return Section("clusters", "Which groups do the rows form?", answer, sentences, tables=tables)
