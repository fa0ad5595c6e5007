"""Counts by subgroup and of all rows, at any times, are equal or differ by enough rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedhead.client.release.atoms import Admitted, Atoms
from fedhead.client.release.guard import Guard
from fedhead.client.release.population import Population
from fedhead.client.release.subgroups import Subgroups, countable
from fedhead.data import Samples, calibration_half, held_out, samples_from_numbers
from fedhead.tasks import make_task

LEAST, SHARE = 3, 0.7
CLASSES = ("well", "ill")
# Counts of classes with few held-out rows leave by themselves unless the guard forbids it.
GUARD = Guard(LEAST, 0, evaluate_few=False)
TASK = make_task("classification", CLASSES)


@dataclass(frozen=True)
class Row:
    """One row: its content, its class and its subgroup; an empty one for none."""

    content: int
    target: int
    subgroup: str


def keys_of(rows: list[Row]) -> np.ndarray:
    return np.array([(row.content + 1) * 2_654_435_761 % 2**64 for row in rows], dtype=np.uint64)


def samples_of(rows: list[Row], *, named: bool = True) -> Samples:
    return samples_from_numbers(
        np.array([[float(row.content)] for row in rows]),
        labels=np.array([row.target for row in rows]),
        classes=CLASSES,
        subgroups=[row.subgroup or None for row in rows] if named else None,
    )


def admit(path: Path, rows: list[Row], *, named: bool = True, guard: Guard = GUARD) -> Admitted:
    targets = np.array([row.target for row in rows])
    contents = np.array([row.content for row in rows], dtype=np.uint64)
    population = Population.of(samples_of(rows, named=named), np.arange(len(rows)), keys_of(rows), contents)
    return Atoms(path).admit(population, targets, TASK, guard, SHARE)


def released(path: Path, rows: list[Row], *, named: bool = True) -> set[frozenset[Row]]:
    """Return the sets of held-out rows that are counted apart: all, either half, each class, and each subgroup."""
    admitted = admit(path, rows, named=named)
    halves = calibration_half(keys_of(rows))
    chosen = [(rows[row], bool(halves[row])) for row in admitted.rows[admitted.held_out].tolist()]
    counted = (
        [] if admitted.by_subgroup is None else [rows[row] for row in admitted.rows[admitted.by_subgroup].tolist()]
    )
    assert set(counted) <= {row for row, _ in chosen}
    by_subgroup = [{row for row in counted if row.subgroup == name} for name in ("f", "m")]
    parts: list[Iterable[Row]] = [*by_subgroup, [row for row, _ in chosen]]
    parts += [[row for row, half in chosen if half == which] for which in (False, True)]
    parts += [[row for row, _ in chosen if row.target == target] for target in (0, 1)]
    parts += [[row for row, _ in chosen if row not in set().union(*by_subgroup)]]
    return {frozenset(part) for part in parts}


def rows_of(contents: Iterable[int], seed: int) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [
        Row(content, int(generator.integers(2)), str(generator.choice(["f", "m", ""], p=[0.4, 0.4, 0.2])))
        for content in contents
    ]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.booleans()), min_size=2, max_size=5),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_two_counts_differ_by_few_rows(changes: list[tuple[int, int, bool]], seed: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "atoms"
        rows: list[Row] = []
        generator, seen = np.random.default_rng(seed), set[frozenset[Row]]()
        for number, (added, removed, moved) in enumerate(changes):
            rows = [rows[place] for place in sorted(generator.permutation(len(rows))[removed:].tolist())]
            if moved and rows:
                rows[0] = Row(rows[0].content, rows[0].target, "m" if rows[0].subgroup == "f" else "f")
            rows = rows + rows_of(range(1000 * number, 1000 * number + added), seed + number)
            if rows:
                seen |= released(path, rows, named=number != 1 or seed % 2 == 0)
        for one, other in combinations(seen | {frozenset()}, 2):
            contents = {row.content for row in one}, {row.content for row in other}
            assert not 0 < len(contents[0] ^ contents[1]) < LEAST


def test_most_rows_of_a_site_are_counted_and_the_same_ones_again(tmp_path: Path) -> None:
    rows = [Row(content, content % 2, "fm"[content // 2 % 2]) for content in range(300)]
    first = admit(tmp_path / "atoms", rows)
    assert first.by_subgroup is not None
    assert first.by_subgroup.sum() > 0.95 * first.held_out.sum()
    again = admit(tmp_path / "atoms", rows)
    np.testing.assert_array_equal(first.by_subgroup, again.by_subgroup)
    plain = admit(tmp_path / "others", rows, named=False)
    assert plain.by_subgroup is None
    # Subgroups withhold no row.
    np.testing.assert_array_equal(plain.rows, first.rows)


def test_rows_that_were_counted_by_one_column_are_not_by_another(tmp_path: Path) -> None:
    rows = [Row(content, content % 2, "fm"[content // 2 % 2]) for content in range(300)]
    assert admit(tmp_path / "atoms", rows).by_subgroup is not None
    scanners = [Row(row.content, row.target, ("old", "new")[row.content // 4 % 2]) for row in rows]
    other = admit(tmp_path / "atoms", scanners)
    assert other.by_subgroup is not None
    assert not other.by_subgroup.any()
    back = admit(tmp_path / "atoms", rows)
    assert back.by_subgroup is not None
    assert back.by_subgroup.any()


def test_atoms_of_earlier_versions_are_read(tmp_path: Path) -> None:
    rows = [Row(content, content % 2, "f") for content in range(100)]
    path = tmp_path / "atoms"
    before = admit(path, rows, named=False)
    arrays = load(path.read_bytes())
    del arrays["subgroups"]
    from hashlib import sha256

    digest = sha256()
    for name in ("ids", "contents", "keys", "strata", "held_out", "atoms"):
        digest.update(arrays[name].tobytes())
    path.write_bytes(save({**arrays, "digest": np.frombuffer(digest.digest(), np.uint8)}))
    after = admit(path, rows)
    np.testing.assert_array_equal(before.rows, after.rows)
    # All are of one subgroup, so that atoms of any rows can be counted by it.
    assert after.by_subgroup is not None
    assert after.by_subgroup.sum() > 0.9 * after.held_out.sum()


@given(st.lists(st.tuples(st.integers(-1, 2), st.booleans()), max_size=60), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_one_release_leaves_no_few_rows(rows: list[tuple[int, bool]], least: int) -> None:
    numbers = np.array([number for number, _ in rows], np.int64)
    halves = np.array([half for _, half in rows], np.bool_)
    kept = countable(Guard(least, 0), numbers, halves, None)
    assert not (kept & (numbers < 0)).any()
    if least < 2:
        np.testing.assert_array_equal(kept, numbers >= 0)
    if not kept.any():
        return
    for subgroup in (-1, 0, 1, 2):
        own = ~kept if subgroup < 0 else kept & (numbers == subgroup)
        for half in (False, True):
            assert not 0 < (own & (halves == half)).sum() < least


def test_patients_are_counted_in_place_of_rows() -> None:
    numbers, halves = np.array([0] * 6 + [1] * 6), np.zeros(12, np.bool_)
    people = np.array([0, 0, 0, 0, 0, 0, *range(6, 12)])
    assert countable(Guard(5, 0), numbers, halves, None).all()
    # Six rows of one patient are too few, and so are the rows without them beside all rows.
    assert not countable(Guard(5, 0), numbers, halves, people).any()


def test_positions_of_subgroups_that_a_site_lacks_are_none() -> None:
    rows = [Row(0, 0, "f"), Row(1, 0, ""), Row(2, 1, "m")]
    subgroups = Subgroups.of(samples_of(rows))
    assert subgroups is not None
    assert subgroups.positions(np.arange(3), ("x", "m", "y")).tolist() == [-1, -1, 1]
    assert Subgroups.of(samples_of(rows, named=False)) is None


def test_without_a_guard_all_held_out_rows_are_counted(tmp_path: Path) -> None:
    rows = rows_of(range(20), 0)
    admitted = admit(tmp_path / "atoms", rows, guard=Guard.off())
    assert admitted.by_subgroup is not None
    np.testing.assert_array_equal(admitted.by_subgroup, held_out(keys_of(rows), SHARE))
