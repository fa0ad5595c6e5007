"""Names for the clusters of a finished run: they become the classes of a model."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedhead.errors import UserError
from fedhead.server.runs.solve import Solved, SubProblem, solve
from fedhead.server.runs.summary import RunSummary
from fedhead.wording import listed


def name_clusters(run_dir: Path | str, out: Path | str, names: Mapping[int, str], rest: str = "") -> Solved:
    """Solve a classifier from a run's sums, with named clusters as classes; clusters of one name are one class.

    Args:
        run_dir: the run folder; it does not change.
        out: a new or empty folder for the model.
        names: the class of each cluster, by number.
        rest: the class of all other clusters; empty if there are none.

    Raises:
        UserError: if the run has found no clusters, a cluster has no name, or a name belongs to an unknown one.
        FedheadError: if the folder cannot be written.
    """
    path = Path(run_dir)
    found = RunSummary.read(path) if path.is_dir() else None
    if found is None:
        raise UserError(f"There is no finished run in {path}.")
    clusters = clusters_of(path)
    if unknown := sorted(set(names) - set(range(clusters))):
        raise UserError(f"There is no cluster {unknown[0]}; the clusters of {path} are 0 to {clusters - 1}.")
    unnamed = [str(number) for number in range(clusters) if number not in names]
    if unnamed and not rest:
        raise UserError(
            f"The clusters {listed(unnamed, 30)} have no names: name them too, or give all of them one with --rest."
        )
    given = [names.get(number, rest) for number in range(clusters)]
    if len(set(given)) < 2:
        raise UserError("A classifier needs clusters of two names or more.")
    groups: dict[str, list[str]] = {}
    for number, name in enumerate(given):
        groups.setdefault(name, []).append(f"cluster {number}")
    merges = tuple(f"{'+'.join(group)}={name}" for name, group in groups.items())
    return solve(path, out, SubProblem(merge=merges))


def clusters_of(path: Path) -> int:
    """Return the number of clusters that a finished run has found.

    Raises:
        UserError: if it is not one of clusters.
    """
    from fedhead.server.runs.record import RunRecord

    record = RunRecord.read(path)
    rows = record.evaluation.get("clusters", {}).get("rows", ())
    if not rows:
        raise UserError(f"{path} is not a finished run of the task 'clusters'.")
    return len(rows)


def parse_names(given: Sequence[str]) -> dict[int, str]:
    """Read names of clusters such as `0=rose`.

    Raises:
        UserError: for another form, or a cluster that is named twice.
    """
    names: dict[int, str] = {}
    for text in given:
        number, equals, name = text.partition("=")
        _add(names, number, name if equals else "", f"Expected NUMBER=NAME, as in 0=rose, not {text!r}.")
    return names


def read_names(path: Path) -> dict[int, str]:
    """Read names of clusters from a CSV file with the columns cluster and name.

    Raises:
        UserError: if it cannot be read, or a line has another form.
    """
    names: dict[int, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line[0].strip().casefold() == "cluster"):
            continue
        fault = f"{path}, line {number}: expected a cluster's number and its name, as in 0,rose."
        _add(names, line[0], line[1] if len(line) == 2 else "", fault)
    return names


def _add(names: dict[int, str], number: str, name: str, fault: str) -> None:
    if not number.strip().isdecimal() or len(number.strip()) > 6 or not name.strip():
        raise UserError(fault)
    if int(number) in names:
        raise UserError(f"The cluster {int(number)} is named twice.")
    names[int(number)] = name.strip()
