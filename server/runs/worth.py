"""The value of each site of a finished run, computed from its kept sums and written to its folder."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.worth import LEAST_PERMUTATIONS, Progress, Worth, worth_of_sites
from fedhead.files import write_atomically
from fedhead.server.exact_sum import padded
from fedhead.server.runs.finished import FinishedRun, opened
from fedhead.server.runs.record import WORTH
from fedhead.server.site_sums import PARTS

logger = logging.getLogger(__name__)

_MOST_OPERATIONS = 1e12
"""A run whose exact values need more samples orders instead: this takes about a minute."""


def worth_of_run(
    run_dir: Path | str,
    *,
    permutations: int = 0,
    progress: Progress = lambda done, total: None,
) -> Worth:
    """Compute the value of each site of a finished run, and write it to `worth.json` in the run folder.

    Args:
        run_dir: the run folder.
        permutations: see `fedhead.evaluation.worth.worth_of_sites`.
        progress: see there.

    Raises:
        UserError: if the run keeps too few sums.
        FedheadError: if another process is changing the run.
    """
    with opened(run_dir) as run:
        return _write(run, permutations, progress)


def write_worth_if_possible(path: Path) -> None:
    """Do the same at the end of a run, whose folder the caller has locked; if it is not possible, say why."""
    try:
        run = FinishedRun(path)
        operations = 2 ** len(run.sums.sites()) * run.form().num_features ** 3 / 3
        _write(run, 0 if operations < _MOST_OPERATIONS else LEAST_PERMUTATIONS, lambda done, total: None)
    except FedheadError as problem:
        logger.warning("What each site brought was not computed: %s", problem)


def _write(run: FinishedRun, permutations: int, progress: Progress) -> Worth:
    if run.task().dense:
        raise UserError("The value of sites is not computed for tasks about places of items, such as pixels.")
    if run.sums.keep == "none":
        raise UserError(
            f"{run.path} keeps only the total of its sites' sums (keep_sums = 'none', or secure summation), which does "
            "not show what a single site brought."
        )
    if "held_out" not in run.parts():
        raise UserError(
            f"{run.path} keeps no sums of held-out rows, on which the value of a site is measured"
            + (f", because it delivers the head of round {run.gradient_round}" if run.gradient_round else "")
            + "; start the run with worth = true (--worth), and with rows held out."
        )
    names = run.sums.sites()
    loaded = {part: [run.sums.load(name, part) for name in names] for part in PARTS}
    classes = len(run.classes)
    train = [padded(one, classes) for one in loaded["train"] if one is not None]
    held_out = [None if one is None else padded(one, classes) for one in loaded["held_out"]]
    if len(train) < len(names):
        raise UserError(f"A file of training sums is missing from {run.sums.path}; restore it from a backup.")
    found = worth_of_sites(names, train, held_out, permutations=permutations, seed=run.config.seed, progress=progress)
    write_atomically(run.path / WORTH, json.dumps(asdict(found), indent=1) + "\n")
    return found
