"""Atoms: sets of rows that a site releases together or not at all, so that no two releases differ by a few rows.

Rows are divided into atoms when they are first admitted. An atom is of one part (training or held-out rows) and, where
rows have one class each, of one class. It has at least `min_class_count` rows whose contents were in no atom before, in
each group that it has rows of (of so many patients, where the data has these); held-out rows are grouped by their
calibration half, too. Atoms are kept and never changed. A release rests on whole atoms only, all of whose rows are
there and which share no row.

So the rows of two releases are equal, or differ by `min_class_count` or more in each part and group: the latest of the
atoms that only one of them rests on has that many contents that no earlier one has. Later rows wait until they are
enough for an atom. The rest of an atom that lost a row waits with them, as does a row whose target changed. The
exception is a class that comes with fewer held-out rows: these form one atom, which goes as a whole, unless the guard
does not evaluate so few.

Where the data names subgroups, such as sexes, held-out rows are divided into atoms of one subgroup each as far as these
have enough rows. Only atoms that have enough rows of each subgroup that they have rows of are counted by subgroup, and
always by the same subgroups, so that such counts, too, differ by `min_class_count` rows or more from all others.

Where the run divides rows by thresholds, such as the edges of time bins, sums under slightly moved ones would differ by
single rows. So the first thresholds that rows were admitted under are kept beside the atoms, and others are refused.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedhead.client.release.admission import Admission, KeptAtoms, held_out_as_before
from fedhead.client.release.guard import Guard
from fedhead.client.release.population import Population
from fedhead.data import BoolArray, IntArray, held_out
from fedhead.errors import FedheadError
from fedhead.files import disk_errors, locked, sync_folder, write_atomically
from fedhead.tasks import Targets, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """The rows that releases may rest on.

    Attributes:
        rows: `[m]`, positions in the population, ascending.
        held_out: `[m]`, which of them are held out.
        by_subgroup: `[m]`, which of them may be counted by subgroup; None if the data names no subgroups.
    """

    rows: IntArray
    held_out: BoolArray
    by_subgroup: BoolArray | None = None


class Atoms:
    """The atoms of a site, kept on disk across runs.

    Args:
        path: the file that keeps them; only its owner can read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def grid_path(self) -> Path:
        """The file beside it that keeps the thresholds of the first run that has any."""
        return self.path.with_suffix(".grid")

    def check_grid(self, task: Task) -> None:
        """Check that a task divides rows by the thresholds of earlier releases, if it does and there are any.

        Raises:
            FedheadError: if not, or if the file that keeps them is damaged.
        """
        kept = self._read_grid() if task.grid else None
        if kept is None or kept == list(task.grid):
            return
        logger.error(
            "The run has other time bins than earlier releases of this site, those until %s. If sums under both may be "
            "compared, which can disclose single rows, move %s away.",
            ", ".join(f"{edge:.12g}" for edge in kept),
            self.grid_path,
        )
        raise FedheadError(
            "Its earlier releases have other time bins, those until "
            f"{', '.join(f'{edge:.12g}' for edge in kept)}, and the difference of sums under both can be a single row. "
            "Begin a run with these bins as its classes, or ask the operator, to whom the site's log says how to allow "
            "others."
        )

    def _read_grid(self) -> list[float] | None:
        try:
            return [float(edge) for edge in json.loads(self.grid_path.read_bytes())]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise FedheadError(
                f"Nothing was sent: {self.grid_path}, which keeps the time bins of earlier releases, cannot be read "
                f"({error}). Restore it from a backup."
            ) from None

    def admit(self, rows: Population, targets: Targets, task: Task, guard: Guard, share: float) -> Admitted:
        """Return the rows that releases may rest on; once this returns, their atoms are on disk.

        Args:
            rows: the site's readable rows.
            targets: `[n, ...]`, their targets.
            task: names the groups that sums distinguish.
            guard: the site's own; with a `min_class_count` below 2, any difference may leave and all rows are admitted.
            share: of rows that are held out, unless a row or one of its group was admitted before.

        Raises:
            UserError: if the file may not be written.
            FedheadError: if it is damaged, the disk is full, or the task's thresholds are not those of earlier
                releases. Nothing may leave then.
        """
        if guard.min_class_count < 2:
            out = held_out(rows.keys, share)
            return Admitted(np.arange(len(rows.ids)), out, None if rows.subgroups is None else out)
        with disk_errors(self.path):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self.path.with_suffix(".lock")):
                self.check_grid(task)
                kept = self._read()
                out = held_out_as_before(kept, rows.keys, share)
                made = Admission(kept, rows, targets, task, guard, out)
                admitted = made.admitted()
                people = rows.people_at(admitted)
                left = guard.allowed_rows(admitted, targets[admitted], out[admitted], task, people)
                if task.grid and len(admitted) and not left.refusal and not self.grid_path.exists():
                    write_atomically(self.grid_path, json.dumps(task.grid))
                    sync_folder(self.path.parent)
                after, by_subgroup = made.noted(admitted)
                if after is not kept and not left.refusal:
                    write_atomically(self.path, after.to_bytes())
                    sync_folder(self.path.parent)
        return Admitted(admitted, out[admitted], by_subgroup)

    def _read(self) -> KeptAtoms:
        try:
            return KeptAtoms.from_bytes(self.path.read_bytes())
        except FileNotFoundError:
            return KeptAtoms()
        except ValueError as error:
            raise FedheadError(
                f"Nothing was sent: {self.path}, which keeps the rows that earlier releases rest on, is damaged "
                f"({error}). Restore it from a backup."
            ) from None
