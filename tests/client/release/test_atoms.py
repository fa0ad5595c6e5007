"""Any sequence of changes and restarts leaves row sets that are equal, or differ by enough rows."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client.release.atoms import Atoms
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Ledger, entry_of
from fedhead.client.release.population import Population
from fedhead.client.release.row_sets import HELD_OUT_ROWS, TRAINING_ROWS, keys_of
from fedhead.data import KeyArray, calibration_half, held_out, samples_from_numbers
from fedhead.errors import FedheadError
from fedhead.protocol.messages import Payload
from fedhead.protocol.steps import Release
from fedhead.tasks import make_task

LEAST = 3
GUARD = Guard(LEAST, 0)
SHARE = 0.3


@dataclass(frozen=True)
class Row:
    """One row: its patient, its content, and its target."""

    patient: int
    content: int
    target: tuple[int, ...]


Released = dict[tuple[str, object], Counter[Row]]
"""The rows behind a release, by part and group."""


class Ward:
    """Rows that change, and the releases that a site makes of them."""

    def __init__(self, path: Path, task: str, classes: int) -> None:
        self.path = path
        self.kind = task
        self.task = make_task(task, [f"c{number}" for number in range(classes)])
        self.classes = classes
        self.rows: list[Row] = []
        self.share = SHARE
        self.guard = GUARD

    def release(self) -> Released:
        if not self.rows:
            return {}
        rows = sorted(self.rows, key=lambda row: (row.content, row.patient, row.target))
        targets = self.targets(rows)
        keys = np.array([(row.patient + 1) * 2_654_435_761 % 2**64 for row in rows], dtype=np.uint64)
        samples = samples_from_numbers(
            np.array([[row.content] for row in rows], dtype=float).reshape(len(rows), 1),
            **({"targets": targets} if self.kind == "regression" else {"labels": targets}),
            **({} if self.kind == "regression" else {"classes": self.task.columns}),
        )
        every = np.arange(len(rows))
        contents = np.array([row.content for row in rows], dtype=np.uint64)
        population = Population.of(samples, every, keys, contents)
        admitted = Atoms(self.path).admit(population, targets, self.task, self.guard, self.share)
        chosen = {TRAINING_ROWS: admitted.rows[~admitted.held_out], HELD_OUT_ROWS: admitted.rows[admitted.held_out]}
        named = {
            name: own
            for part, numbers in chosen.items()
            for name, own in keys_of(part, numbers, contents, targets, self.task).items()
        }
        # The ledger refuses nothing that atoms allow.
        Ledger(self.path.with_suffix(".jsonl"), self.guard.min_class_count).record(
            entry_of(Payload({}), Release("train", "ward")), named
        )
        return self.by_part(rows, targets, keys, admitted.rows, admitted.held_out)

    def targets(self, rows: list[Row]) -> np.ndarray:
        if self.kind == "classification":
            return np.array([row.target[0] for row in rows], dtype=np.int64)
        if self.kind == "regression":
            return np.array([[float(value) for value in row.target] for row in rows]).reshape(len(rows), self.classes)
        return np.array([row.target for row in rows], dtype=np.int64).reshape(len(rows), self.classes)

    def by_part(
        self, rows: list[Row], targets: np.ndarray, keys: KeyArray, chosen: np.ndarray, out: np.ndarray
    ) -> Released:
        released: Released = {}
        half = calibration_half(keys)
        for row in chosen[~out].tolist():
            released.setdefault(("train", "total"), Counter())[rows[row]] += 1
        positions, groups = self.task.memberships(targets[chosen])
        for position, group in zip(positions.tolist(), groups.tolist(), strict=True):
            row = int(chosen[position])
            parts = ("held out", f"half {half[row]}") if out[position] else ("train",)
            for part in (*parts, "both"):
                released.setdefault((part, group), Counter())[rows[row]] += 1
        return released


def differing(first: Counter[Row], second: Counter[Row]) -> int:
    """Return of how many patients are the contents that only one of two sets of rows has: a difference shows these."""
    one, other = contents(first), contents(second)
    shown = (one - other) + (other - one)
    return len({row.patient for row in (*first, *second) if row.content in shown})


def contents(rows: Counter[Row]) -> Counter[int]:
    counted: Counter[int] = Counter()
    for row, count in rows.items():
        counted[row.content] += count
    return counted


def check(ward: Ward, releases: list[Released]) -> None:
    """Compare the latest release with all earlier ones."""
    *earlier, latest = releases
    for one in earlier:
        for name in one.keys() | latest.keys():
            before, after = one.get(name, Counter()), latest.get(name, Counter())
            if name[0] in ("train", "both") or (before and after):
                # Training and held-out rows together: what few held-out rows add or take comes with a whole class.
                counted_whole = name[0] == "both" and few_come_whole(one, latest, name[1])
                assert counted_whole or not 0 < differing(before, after) < LEAST, (name, before, after)


def few_come_whole(one: Released, other: Released, group: object) -> bool:
    held = [release.get(("held out", group), Counter()) for release in (one, other)]
    return not all(held) and any(0 < rows.total() < LEAST for rows in held)


def drawn(ward: Ward, count: int, generator: np.random.Generator) -> list[Row]:
    """Rows of few patients and contents, so that equal rows and rows of one patient are common."""
    return [
        Row(
            int(generator.integers(40)),
            int(generator.integers(60)),
            tuple(generator.integers(0, 2, 1 if ward.kind == "classification" else ward.classes).tolist()),
        )
        for _ in range(count)
    ]


def change(ward: Ward, action: str, count: int, generator: np.random.Generator, gone: list[Row]) -> None:
    chosen = sorted(generator.permutation(len(ward.rows))[:count].tolist(), reverse=True)
    if action == "add":
        ward.rows += drawn(ward, count, generator)
    elif action == "copy":
        ward.rows += [ward.rows[number] for number in chosen]
    elif action == "put back":
        while gone and count:
            ward.rows.append(gone.pop())
            count -= 1
    elif action == "share":
        ward.share = [0.0, 0.2, SHARE, 0.7][count % 4]
    else:
        for number in chosen:
            row = ward.rows.pop(number)
            gone.append(row)
            if action == "relabel":
                ward.rows.append(Row(row.patient, row.content, drawn(ward, 1, generator)[0].target))
            elif action == "replace":
                ward.rows.append(Row(row.patient, row.content + 1000, row.target))
            elif action == "regroup":
                ward.rows.append(Row(int(generator.integers(40)), row.content, row.target))


ACTIONS = ("add", "copy", "put back", "share", "remove", "relabel", "replace", "regroup")


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 80),
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 9)), min_size=1, max_size=8),
)
def test_releases_rest_on_equal_rows_or_differ_by_enough(
    task: str, seed: int, first: int, changes: list[tuple[str, int]]
) -> None:
    generator = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        ward = Ward(Path(folder) / "ward.atoms", task, 2)
        ward.rows = drawn(ward, first, generator)
        gone: list[Row] = []
        releases = [ward.release()]
        for action, count in changes:
            change(ward, action, count, generator, gone)
            releases.append(ward.release())
            check(ward, releases)


def ward_of(tmp_path: Path, rows: int) -> Ward:
    ward = Ward(tmp_path / "ward.atoms", "classification", 2)
    ward.rows = [Row(number, number, (number % 2,)) for number in range(rows)]
    return ward


def test_rows_that_come_wait_until_they_are_enough(tmp_path: Path) -> None:
    ward = ward_of(tmp_path, 60)
    first = ward.release()
    assert sum(rows.total() for (part, _), rows in first.items() if part == "both") == 60
    keys = np.arange(1000, 1100)
    train = [int(key) for key in keys if not held_out(np.array([key * 2_654_435_761], np.uint64), SHARE)[0]]
    for count in range(1, LEAST):
        ward.rows.append(Row(train[count], train[count], (0,)))
        assert ward.release() == first
    ward.rows.append(Row(train[0], train[0], (0,)))
    last = ward.release()
    assert differing(first["train", 0], last["train", 0]) == LEAST
    assert first["train", 1] == last["train", 1]
    assert first["held out", 0] == last["held out", 0]


def test_a_row_that_goes_takes_its_atom_along_and_both_return(tmp_path: Path) -> None:
    ward = ward_of(tmp_path, 60)
    first = ward.release()
    gone = next(iter(first["train", 0]))
    ward.rows.remove(gone)
    without = ward.release()
    assert gone not in without["train", 0]
    assert LEAST <= differing(first["train", 0], without["train", 0]) < 2 * LEAST
    assert without["train", 1] == first["train", 1]
    ward.rows.append(gone)
    assert ward.release() == first


def test_the_rest_of_an_atom_returns_with_enough_new_rows(tmp_path: Path) -> None:
    ward = ward_of(tmp_path, 60)
    first = ward.release()
    gone = next(iter(first["train", 0]))
    ward.rows.remove(gone)
    ward.release()
    ward.rows += [Row(1000 + number, 1000 + number, (0,)) for number in range(40)]
    later = ward.release()
    assert later["both", 0].total() == first["both", 0].total() - 1 + 40
    ward.rows.append(gone)
    assert ward.release() == later


def test_a_row_that_is_replaced_in_a_group_waits(tmp_path: Path) -> None:
    ward = Ward(tmp_path / "ward.atoms", "classification", 2)
    ward.rows = [Row(number // 2, number, (0,)) for number in range(60)]
    first = ward.release()
    replaced = next(iter(first["train", 0]))
    ward.rows[ward.rows.index(replaced)] = Row(replaced.patient, 999, (0,))
    assert differing(first["train", 0], ward.release()["train", 0]) >= LEAST


def test_another_share_moves_no_row_that_was_admitted(tmp_path: Path) -> None:
    ward = ward_of(tmp_path, 60)
    first = ward.release()
    for ward.share in (0.0, 0.25, 0.9):
        assert ward.release() == first


def test_a_site_that_is_refused_keeps_no_atoms(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.uint64)
    samples = samples_from_numbers(np.arange(6.0)[:, None], labels=np.zeros(6, np.int64), classes=["a", "b"])
    population = Population.of(samples, np.arange(6), rows, rows)
    task = make_task("classification", ("a", "b"))
    atoms = Atoms(tmp_path / "ward.atoms")
    atoms.admit(population, np.zeros(6, np.int64), task, Guard(3, 20), 0.0)
    assert not atoms.path.exists()
    atoms.admit(population, np.zeros(6, np.int64), task, Guard(3, 6), 0.0)
    assert atoms.path.stat().st_mode & 0o077 == 0


def test_damaged_atoms_let_nothing_leave(tmp_path: Path) -> None:
    ward = ward_of(tmp_path, 60)
    ward.release()
    content = ward.path.read_bytes()
    for damage in (b"", content[:-1], content[:-50] + b"x" + content[-49:]):
        ward.path.write_bytes(damage)
        with pytest.raises(FedheadError, match="Restore it from a backup"):
            ward.release()


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
def test_a_guard_that_evaluates_no_few_leaves_enough_rows_of_each_group_and_half(task: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    ward = Ward(tmp_path / "ward.atoms", task, 2)
    ward.rows = drawn(ward, 25, generator)
    lenient = ward.release()
    assert any(rows.total() < LEAST for rows in lenient.values())
    ward.guard = Guard(LEAST, 0, evaluate_few=False)
    releases = [lenient]
    for _ in range(6):
        releases.append(ward.release())
        assert all(rows.total() >= LEAST for rows in releases[-1].values())
        check(ward, releases)
        ward.rows += drawn(ward, 8, generator)
    assert any(part.startswith("half") for part, _ in releases[-1])
