"""The rules of atoms: which kept ones count among the rows of today, and how waiting rows are divided into new ones."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedhead.client.release.guard import Guard, count_people
from fedhead.client.release.population import Population
from fedhead.client.release.subgroups import divisible
from fedhead.data import BoolArray, IntArray, KeyArray, calibration_half, held_out
from fedhead.tasks import Targets, Task

Groups = tuple[IntArray, IntArray]
"""Pairs of a row's position and a group it is in; see `Task.memberships`."""


@dataclass(frozen=True)
class KeptAtoms:
    """All rows of all atoms `[r]`; a row may be in several, of which at most one counts."""

    ids: KeyArray = field(default_factory=lambda: np.empty(0, np.uint64))
    contents: KeyArray = field(default_factory=lambda: np.empty(0, np.uint64))
    keys: KeyArray = field(default_factory=lambda: np.empty(0, np.uint64))
    strata: KeyArray = field(default_factory=lambda: np.empty(0, np.uint64))
    held_out: BoolArray = field(default_factory=lambda: np.empty(0, np.bool_))
    atoms: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    subgroups: KeyArray = field(default_factory=lambda: np.empty(0, np.uint64))
    """The subgroups that rows were counted by; 0 for none. An atom is only ever counted by one division."""

    def with_atoms(self, made: Sequence[IntArray], rows: Population, out: BoolArray) -> Self:
        """Return these and further atoms, given by the positions of their rows."""
        first = int(self.atoms.max(initial=-1)) + 1
        added = np.concatenate([np.empty(0, np.int64), *made])
        numbers = np.repeat(np.arange(first, first + len(made)), [len(one) for one in made])
        return type(self)(
            np.concatenate([self.ids, rows.ids[added]]),
            np.concatenate([self.contents, rows.contents[added]]),
            np.concatenate([self.keys, rows.keys[added]]),
            np.concatenate([self.strata, rows.strata[added]]),
            np.concatenate([self.held_out, out[added]]),
            np.concatenate([self.atoms, numbers]),
            np.concatenate([self.subgroups, np.zeros(len(added), np.uint64)]),
        )

    def counted_by(self, rows: Population, atom: IntArray) -> tuple[Self, BoolArray]:
        """Note the subgroups of atoms that were not counted by any.

        Args:
            rows: the population.
            atom: `[n]`, the atom of each row to count by subgroup, or -1.

        Returns:
            The atoms, and `[n]`, the rows of those that are counted by the same subgroups as ever.
        """
        assert rows.subgroups is not None
        if not len(self.ids) or not len(atom):
            return self, np.zeros(len(atom), np.bool_)
        order = rows.ids.argsort()
        places = order[np.searchsorted(rows.ids, self.ids, sorter=order).clip(max=len(order) - 1)]
        chosen = (rows.ids[places] == self.ids) & (atom[places] == self.atoms)
        named = np.isin(self.atoms, self.atoms[self.subgroups != 0])
        other = chosen & named & (self.subgroups != rows.subgroups[places])
        noted = replace(self, subgroups=np.where(chosen & ~named, rows.subgroups[places], self.subgroups))
        return noted, (atom >= 0) & ~np.isin(atom, self.atoms[other])

    def to_bytes(self) -> bytes:
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return save({**arrays, "digest": np.frombuffer(self._digest(), np.uint8)})

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Undo `to_bytes`.

        Raises:
            ValueError: if they are damaged.
        """
        try:
            arrays = load(blob)
            digest = arrays.pop("digest").tobytes()
            kept = cls(**arrays)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(str(error)) from None
        if kept._digest() != digest:
            raise ValueError("its digest differs")
        if not len(kept.subgroups):
            # Earlier versions counted nothing by subgroup.
            return replace(kept, subgroups=np.zeros(len(kept.ids), np.uint64))
        return kept

    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for name in self.__dataclass_fields__:
            digest.update(getattr(self, name).tobytes())
        return digest.digest()


class Admission:
    """One look at the rows: the atoms that count, and those that are new."""

    def __init__(
        self, kept: KeptAtoms, rows: Population, targets: Targets, task: Task, guard: Guard, out: BoolArray
    ) -> None:
        self.kept = kept
        self.rows, self.targets, self.task, self.guard, self.out = rows, targets, task, guard, out
        self.half = calibration_half(rows.keys)
        self.exclusive = task.kind.exclusive
        # A copy of an admitted row, or one that changed its class or group, is nothing that others could hide among.
        self.new = ~np.isin(rows.contents, kept.contents)
        self.first_time = ~np.isin(rows.strata, kept.strata)
        self.atom = _counting(kept, rows.ids)
        if not guard.evaluate_few:
            for stratum in np.unique(rows.strata):
                self.atom[self._small_atom(stratum)] = -1
        self.atoms: list[IntArray] = []
        self._next = int(kept.atoms.max(initial=-1)) + 1
        self._admit_training_rows()
        self._admit_held_out_rows()

    def admitted(self) -> IntArray:
        """Return the positions of the rows of all atoms that the guard leaves whole."""
        admitted = self.atom >= 0
        while True:
            rows = np.flatnonzero(admitted)
            lost = np.unique(self.atom[rows[~self._left_by_guard(rows)]])
            if not len(lost):
                return rows
            admitted &= ~np.isin(self.atom, lost)

    def noted(self, admitted: IntArray) -> tuple[KeptAtoms, BoolArray | None]:
        """Return all atoms as they are to be kept, and `[m]`, which admitted rows may be counted by subgroup.

        These are the held-out rows of atoms that have enough rows of each subgroup that they have rows of, and of none.
        """
        after = self.kept.with_atoms(self.atoms, self.rows, self.out) if self.atoms else self.kept
        if self.rows.subgroups is None:
            return after, None
        rows = admitted[self.out[admitted]]
        _, first = np.unique(after.contents, return_index=True)
        firsts = dict(zip(after.contents[first].tolist(), after.atoms[first].tolist(), strict=True))
        contents = self.rows.contents[rows].tolist()
        new = np.array([firsts[content] for content in contents], np.int64) == self.atom[rows]
        cells = np.stack([self.rows.subgroups[rows], self.half[rows]])
        cell = np.unique(cells, axis=1, return_inverse=True)[1].reshape(-1)
        fit = divisible(self.atom[rows], cell, new, self.rows.people_at(rows), self.guard.min_class_count)
        atom = np.full(len(self.atom), -1, np.int64)
        atom[rows[fit]] = self.atom[rows[fit]]
        noted, counted = after.counted_by(self.rows, atom)
        unchanged = np.array_equal(noted.subgroups, after.subgroups)
        return after if unchanged else noted, counted[admitted]

    def _left_by_guard(self, rows: IntArray) -> BoolArray:
        memberships = self.task.memberships(self.targets[rows])
        return self.guard.largest(memberships, ~self.out[rows], people=self.rows.people_at(rows))

    def _admit_training_rows(self) -> None:
        waiting = np.flatnonzero((self.atom < 0) & ~self.out)
        for atom in self._divided(waiting):
            self._add(atom)

    def _admit_held_out_rows(self) -> None:
        considered = np.flatnonzero((self.atom >= 0) | self.out)
        left = considered[self._left_by_guard(considered)]
        waiting = left[(self.atom[left] < 0) & self.out[left]]
        atoms = self._divided(waiting)
        for stratum in np.unique(self.rows.strata[waiting]).tolist():
            of_stratum = waiting[self.rows.strata[waiting] == np.uint64(stratum)]
            own = [atom for atom in atoms if self.rows.strata[atom[0]] == np.uint64(stratum)]
            all_fit = sum(map(len, own)) == len(of_stratum)
            if self.guard.evaluate_few and self.first_time[of_stratum[0]] and not all_fit:
                own = [of_stratum]
            elif own and len(small := self._small_atom(np.uint64(stratum))):
                # The few rows that came with the class can go with these, and not by themselves.
                own = [np.concatenate([*own, small])]
            for atom in own:
                self._add(atom)

    def _small_atom(self, stratum: np.uint64) -> IntArray:
        """Return the rows of the atom of too few held-out rows that came with a class, if it counts."""
        held = np.flatnonzero((self.atom >= 0) & self.out & (self.rows.strata == stratum))
        for atom in np.unique(self.atom[held]).tolist():
            rows: IntArray = held[self.atom[held] == atom]
            positions, groups = self._groups(rows)
            counts = count_people(groups, np.ones(len(groups), np.bool_), self.rows.people_at(rows[positions]))
            if counts[groups].min() < self.guard.min_class_count:
                return rows
        return held[:0]

    def _add(self, rows: IntArray) -> None:
        self.atom[rows] = self._next
        self._next += 1
        self.atoms.append(rows)

    def _groups(self, rows: IntArray) -> Groups:
        """Return the groups of rows of one part; a half of the held-out rows has groups of its own.

        Where a row has one group, its class at the site divides it further, which matters in runs without classes: an
        atom of several classes would go as a whole where a run with classes withholds one of them.
        """
        positions, groups = self.task.memberships(self.targets[rows])
        if self.exclusive and len(groups):
            _, strata = np.unique(self.rows.strata[rows[positions]], return_inverse=True)
            groups = groups * (int(strata.max()) + 1) + strata
        halves = (self.half & self.out)[rows[positions]]
        return positions, 2 * groups + halves

    def _divided(self, waiting: IntArray) -> list[IntArray]:
        """Divide waiting rows of one part into atoms, leaving out those that are too few."""
        people = self.rows.people_at(waiting)
        rows = waiting[self.guard.largest(self._groups(waiting), self.new[waiting], people=people)]
        rows = rows[np.lexsort((self.rows.ids[rows], self.rows.keys[rows]))]
        positions, groups = self._groups(rows)
        alike, has_group = groups, np.empty((0, 0), np.bool_)
        if not self.exclusive:
            has_group = np.zeros((len(rows), int(groups.max(initial=0)) + 1), dtype=np.bool_)
            has_group[positions, groups] = True
            alike = np.unique(np.packbits(has_group, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        atoms, rest = [], []
        for places in _runs(alike):
            cut, remainder = self._cut_by_subgroup(rows, places)
            atoms += cut
            rest += remainder
        if rest:
            people = self._people(rows)
            atoms = _joined(atoms, np.array(rest), has_group, self.new[rows], people, self.guard.min_class_count)
        return [rows[atom] for atom in atoms]

    def _people(self, rows: IntArray) -> IntArray:
        people = self.rows.people_at(rows)
        return rows if people is None else people

    def _cut_by_subgroup(self, rows: IntArray, places: IntArray) -> tuple[list[IntArray], list[int]]:
        """Cut rows of the same groups into atoms, held-out rows of one subgroup each as far as these are enough.

        Rows of subgroups that are too few are atoms together or, where they are too few, too, part of another atom.
        """
        if self.rows.subgroups is None or not self.exclusive or not self.out[rows[places]].all():
            return self._cut(rows, places)
        atoms: list[IntArray] = []
        few: list[int] = []
        for own in _runs(self.rows.subgroups[rows[places]]):
            cut, rest = self._cut(rows, places[own])
            atoms += cut
            few += rest
        if not few:
            return atoms, []
        cut, rest = self._cut(rows, np.sort(np.array(few)))
        if rest and atoms:
            smallest = min(range(len(atoms)), key=lambda number: len(atoms[number]))
            atoms[smallest] = np.sort(np.concatenate([atoms[smallest], rest]))
            return atoms, []
        return atoms + cut, rest

    def _cut(self, rows: IntArray, places: IntArray) -> tuple[list[IntArray], list[int]]:
        """Cut rows of the same groups into atoms, without dividing a group of rows such as a patient.

        Returns:
            The atoms, as places in `rows`; and all `places`, where too few of them are new.
        """
        enough, atoms = self.guard.min_class_count, []
        current: list[int] = []
        count, last, counted = 0, -1, -1
        chosen = rows[places]
        people = np.where(self.new[chosen], self._people(chosen), -1)
        for place, key, person in zip(places.tolist(), self.rows.keys[chosen].tolist(), people.tolist(), strict=True):
            if count >= enough and key != last:
                atoms.append(current)
                current, count = [], 0
            current.append(place)
            last = key
            if person not in (-1, counted):
                count, counted = count + 1, person
        if count >= enough:
            atoms.append(current)
        elif atoms:
            atoms[-1] += current
        else:
            return [], current
        return [np.array(atom) for atom in atoms], []


def _joined(
    atoms: list[IntArray], rest: IntArray, has_group: BoolArray, new: BoolArray, people: IntArray, enough: int
) -> list[IntArray]:
    """Make one atom of the rest, with as many of the other atoms as give each of its groups enough new rows."""
    while True:
        places, groups = np.nonzero(has_group[rest])
        of_pair = rest[places]
        counts = np.zeros(has_group.shape[1], np.int64)
        found = count_people(groups, new[of_pair], people[of_pair])
        counts[: len(found)] = found
        thin = has_group[rest].any(0) & (counts < enough)
        if not thin.any():
            return [*atoms, rest]
        chosen = next(number for number, atom in enumerate(atoms) if has_group[atom][:, thin].any())
        rest = np.concatenate([rest, atoms.pop(chosen)])


def _runs(values: IntArray | KeyArray) -> list[IntArray]:
    """Return the places of each distinct value, ascending."""
    order = values.argsort(kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(values) else []


def held_out_as_before(kept: KeptAtoms, keys: KeyArray, share: float) -> BoolArray:
    """Return which rows are held out: as they or others of their group were before, else by the share."""
    out = held_out(keys, share)
    known, first = np.unique(kept.keys, return_index=True)
    if len(known):
        places = np.searchsorted(known, keys).clip(max=len(known) - 1)
        admitted = known[places] == keys
        out[admitted] = kept.held_out[first[places[admitted]]]
    return out


def _counting(kept: KeptAtoms, ids: KeyArray) -> IntArray:
    """Return `[n]`, the atom that each row counts in, or -1: the latest atoms whose rows are all there and free."""
    atom = np.full(len(ids), -1, dtype=np.int64)
    if not len(ids):
        return atom
    order = ids.argsort()
    places = order[np.searchsorted(ids, kept.ids, sorter=order).clip(max=len(ids) - 1)]
    there = ids[places] == kept.ids
    for rows in reversed(_runs(kept.atoms)):
        if there[rows].all() and (atom[places[rows]] < 0).all():
            atom[places[rows]] = kept.atoms[rows[0]]
    return atom
